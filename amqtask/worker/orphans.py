"""Being process 1, as a container's only program is: the kernel gives it all orphans, and somebody has to wait for them.

Which zombies are orphans nobody can tell from those that a task is about to wait for: one that has been a zombie for so long is.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

# Seconds.
LONG = 30.0
LOOK_EVERY = 10.0


class Orphans:
    """`reap` waits for the zombies that have been there for LONG."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._since: dict[int, float] = {}

    def reap(self) -> None:
        """Look now; cheap, and it never blocks."""
        now, me = time.monotonic(), os.getpid()
        zombies = [pid for pid in self._pids() if self._is_zombie_of(pid, me)]
        self._since = {pid: self._since.get(pid, now) for pid in zombies}
        for pid, since in self._since.items():
            if now - since >= LONG:
                try:
                    os.waitpid(pid, os.WNOHANG)
                except ChildProcessError:
                    pass  # somebody has waited for it meanwhile

    def _pids(self) -> list[int]:
        return [int(name) for name in os.listdir(self._proc) if name.isdigit()]

    def _is_zombie_of(self, pid: int, parent: int) -> bool:
        try:
            # "pid (name) state ppid …", where the name may hold anything.
            state, ppid = (self._proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            return False
        return state == "Z" and int(ppid) == parent

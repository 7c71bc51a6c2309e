"""For a worker that is process 1, a container's only program: the kernel gives it all orphaned processes, which it has to reap.

An orphan cannot be told from a child that a task is about to wait for; a process that has been a zombie for LONG counts as one.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

# Seconds.
LONG = 30.0
LOOK_EVERY = 10.0


class Orphans:
    """`reap` reaps the processes that have been zombies for LONG."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._since: dict[int, float] = {}

    def reap(self) -> None:
        """Look now; cheap, and it never blocks."""
        now, own_pid = time.monotonic(), os.getpid()
        zombies = [pid for pid in self._pids() if self._is_zombie_of(pid, own_pid)]
        self._since = {pid: self._since.get(pid, now) for pid in zombies}
        for pid, since in self._since.items():
            if now - since >= LONG:
                try:
                    os.waitpid(pid, os.WNOHANG)
                except ChildProcessError:
                    pass  # another thread has reaped it meanwhile

    def _pids(self) -> list[int]:
        return [int(name) for name in os.listdir(self._proc) if name.isdigit()]

    def _is_zombie_of(self, pid: int, parent: int) -> bool:
        try:
            # "pid (name) state ppid …", where the name may have any characters.
            state, ppid = (self._proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            return False
        return state == "Z" and int(ppid) == parent

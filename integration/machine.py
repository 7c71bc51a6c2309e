"""What starting a real server needs of the machine: a free port, a Debian package, a process that is stopped again.

Only the standard library is used: this runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from integration.waiting import LONG, Patience, eventually

# Above the ports of well-known servers. Below those from which connections go out (Linux begins at 32,768), so that no
# connection takes a port between the question and its use; and 10,000 above each there is room for a Redis cluster's bus.
PORTS = range(10_000, 20_000)


class NodeError(RuntimeError):
    """A node could not be installed, started or asked."""


def _shuffled_ports() -> Iterator[int]:
    # Each process in an order of its own; none is given out twice before all others were. Of processes that test side by side
    # (integration.run) each has ports of its own, so that nobody takes the port of a server that is stopped for a while.
    side = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    own = PORTS[side % 2 :: 2]
    chance = random.Random(f"{os.getpid()} {time.time_ns()}")
    return itertools.cycle(chance.sample(own, len(own)))


_ports = _shuffled_ports()


def free_port() -> int:
    """A TCP port that nobody uses now, on no interface, and that nobody was given lately."""
    return next(port for port in _ports if _is_free(port))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def answers(port: int) -> bool:
    """Whether something accepts connections on that port of the loopback interface."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def apt_install(*packages: str) -> bool:
    """Install Debian packages; False where that is impossible."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return False
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    print(f"installing {', '.join(packages)} with apt-get …", file=sys.stderr, flush=True)
    deadline = time.monotonic() + APT_SECONDS
    for command in (["apt-get", "-qq", "update"], ["apt-get", "-qq", "install", "-y", *_FLAGS, *packages]):
        while True:
            done = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
            )
            if b"Could not get lock" not in done.stdout or time.monotonic() > deadline:
                break
            time.sleep(1.0)
    if done.returncode:
        sys.stderr.write(done.stdout.decode(errors="replace"))
    return done.returncode == 0


_FLAGS = ("--no-install-recommends",)
# How long an installation waits for another one to end: a new machine often brings itself up to date.
APT_SECONDS = 300.0


def program(name: str, package: str, hint: str = "") -> str:
    """The path of a program, from its Debian package if it is missing. Raises: NodeError."""
    found = shutil.which(name)
    if found is None and apt_install(package):
        found = shutil.which(name)
    if found is None:
        raise NodeError(f"{name} is not installed: apt-get install {package}{hint}")
    return found


def kill_session(process: subprocess.Popen[Any]) -> None:
    """SIGKILL to a process that began a session, and to what it started there; it may have ended long ago."""
    # Once it has been waited for, the number may be another's. While some of its session are left, nobody else gets it.
    if process.returncode is None or not _exists(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_all(process: subprocess.Popen[Any]) -> None:
    """The same, and to those of its children that began sessions of their own; returns when all have ended.

    PostgreSQL's do, and a server does not start again while one of the last one's is left.
    """
    children: list[int] = []
    if process.poll() is None:
        process.send_signal(signal.SIGSTOP)  # it makes no more of them
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], stdout=subprocess.PIPE, text=True, check=True).stdout
        pairs = (map(int, line.split()) for line in listed.splitlines())
        children = [pid for pid, parent in pairs if parent == process.pid]
    kill_session(process)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    eventually(lambda: not any(map(is_running, children)), what=lambda: f"processes that do not end: {children}")


def is_running(pid: int) -> bool:
    """Whether there is such a process; one that only waits to be waited for is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return not Path("/proc/self").exists() and _exists(pid)  # not Linux


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _account(user: str) -> str:
    try:
        return pwd.getpwnam(user).pw_name
    except KeyError:
        return "nobody"  # its package is not there, only its programs are


class Server:
    """A server process in a folder of its own, as an unprivileged user when we are root and `user` is given."""

    def __init__(self, name: str, *, user: str | None = None) -> None:
        self.name = name
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix=f"amqtask-{name}-"))
        self._user = _account(user) if user is not None and os.geteuid() == 0 else None
        if self._user is not None:
            account = pwd.getpwnam(self._user)
            os.chown(self.folder, account.pw_uid, account.pw_gid)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return None if self._process is None else self._process.pid

    def run(
        self, command: Sequence[str], ready: Callable[[], bool], *, timeout: float = LONG,
        environment: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Start (again) and return once `ready` says so. Raises: NodeError with the log."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.folder, user=self._user, group=self._group(),
                start_new_session=True, env=None if environment is None else dict(environment),
            )  # fmt: skip
        patience = Patience(timeout)
        while not ready():
            if patience.is_over or self._process.poll() is not None:
                raise NodeError(f"{self.name} did not start within {timeout:g} s\n{self.log_tail()}")
            patience.pause(0.05)

    def once(self, command: Sequence[str]) -> str:
        """Run a command to its end, as the server's user; what it printed. Raises: NodeError."""
        done = subprocess.run(
            command, cwd=self.folder, user=self._user, group=self._group(),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise NodeError(f"{' '.join(command)}: {done.stdout}")
        return done.stdout

    def kill(self) -> None:
        """SIGKILL to it and all of its processes: what a power cut looks like."""
        if self._process is not None:
            kill_all(self._process)
            self._process = None

    def remove(self) -> None:
        """Kill it and delete its folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of what it printed."""
        log = self.folder / "log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else "(no log)"

    def _group(self) -> int | None:
        return None if self._user is None else pwd.getpwnam(self._user).pw_gid

"""Worker processes as users start them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from integration.machine import kill_session
from integration.waiting import LONG, NeverHappened, eventually

if TYPE_CHECKING:
    from typing_extensions import Self

ROOT = Path(__file__).resolve().parent.parent
READY = " ready."


class LoggedProcess:
    """A program in a session of its own, logging into a file; it is ready when `ready` stands there."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        ready: str = READY,
        folder: Path = ROOT,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.log_path = Path(tempfile.mkstemp(prefix="amqtask-worker-", suffix=".log")[1])
        self._command = list(command)
        self._ready = ready
        self._folder = folder
        # The fault handler makes a process that is stuck tell where, see `_until`.
        spoken = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        self._environment = {**os.environ, **spoken, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True, timeout: float = LONG) -> Self:
        """Start (again); returns once it said that it is ready."""
        offset = self.log_path.stat().st_size
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self._folder, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        if wait:
            self._until_said(self._ready, timeout, offset)
        return self

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The running process."""
        assert self._process is not None, "not started"
        return self._process

    @property
    def pid(self) -> int:
        """The main process."""
        return self.process.pid

    @property
    def log(self) -> str:
        """Everything it printed."""
        return self.log_path.read_text(errors="replace")

    @property
    def children(self) -> list[int]:
        """The process ids of its direct children."""
        done = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.pid)], capture_output=True, text=True, check=False
        )
        return [int(word) for word in done.stdout.split()]

    def await_log(self, text: str, timeout: float = LONG) -> None:
        """Wait until `text` stands in the log."""
        self._until_said(text, timeout)

    def _until_said(self, text: str, timeout: float, offset: int = 0) -> None:
        def is_said() -> bool:
            has_ended = self.process.poll() is not None
            if text in self.log[offset:]:
                return True
            if has_ended:
                raise NeverHappened(f"{self._never(text)}: {self._ending()}")
            return False

        self._until(is_said, timeout, what=lambda: self._never(text))

    def _never(self, text: str) -> str:
        return f"{text!r} never came up in the log of {self._command}"

    def _ending(self) -> str:
        return f"it ended with exit code {self.process.returncode}; its log:\n{self.log[-8000:]}"

    def _until(self, condition: Callable[[], object], timeout: float, what: Callable[[], str]) -> None:
        """`eventually`; a process that is still there at the end is made to tell what it was at, which ends it."""
        try:
            eventually(condition, timeout, what=what)
        except NeverHappened as error:
            if self.process.poll() is not None:
                raise
            state = describe(self.pid)
            self.process.send_signal(signal.SIGABRT)
            self.process.send_signal(signal.SIGCONT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                state += "\nit takes no notice of SIGABRT"
            raise NeverHappened(f"{error}\n{state}\nafter SIGABRT, {self._ending()}") from None

    def signal(self, signum: int) -> None:
        """Send a signal to the main process only."""
        self.process.send_signal(signum)

    def wait(self, timeout: float = LONG) -> int:
        """Its exit code."""
        self._until(lambda: self.process.poll() is not None, timeout, what=lambda: f"{self._command} did not end")
        return self.process.returncode

    def stop(self, timeout: float = LONG) -> int:
        """Warm shutdown; the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(timeout)

    def kill(self) -> None:
        """End it and everything it started, at once."""
        if self._process is not None:
            kill_session(self._process)

    def __enter__(self) -> Self:
        return self if self._process else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        if error is None:
            self.log_path.unlink(missing_ok=True)


def describe(pid: int) -> str:
    """What Linux knows of a process that does not get on, and of the machine: does it wait, and for what?"""
    lines = [
        line for line in _read(f"/proc/{pid}/status").splitlines() if line.startswith(("State:", "Threads:", "VmRSS:"))
    ]
    ticks = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()[11:13]
    lines += [f"wchan: {_read(f'/proc/{pid}/wchan')}", f"utime, stime: {' '.join(ticks)}"]
    lines += [f"load: {_read('/proc/loadavg')}"]
    lines += [f"{name}: {_read(f'/proc/pressure/{name}')}" for name in ("cpu", "io", "memory")]
    return "\n".join(line.strip() for line in lines)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as error:
        return str(error)


class WorkerProcess(LoggedProcess):
    """`amqtask -A app worker …`."""

    def __init__(
        self, app: str, *options: str, environment: dict[str, str] | None = None, loglevel: str = "INFO"
    ) -> None:
        super().__init__(
            [sys.executable, "-m", "amqtask", "-A", app, "worker", "-l", loglevel, *options], environment=environment
        )


class BeatProcess(LoggedProcess):
    """`amqtask -A app beat …`."""

    def __init__(self, app: str, *options: str, environment: dict[str, str] | None = None) -> None:
        super().__init__(
            [sys.executable, "-m", "amqtask", "-A", app, "beat", "-l", "INFO", *options],
            ready="beat: Starting...",
            environment=environment,
        )

    @property
    def is_leading(self) -> bool:
        """Whether it said so last."""
        log = self.log
        return self.process.poll() is None and log.rfind("beat: leading;") > log.rfind("beat: not leading")


def run_cli(*arguments: str, environment: dict[str, str] | None = None, timeout: float = LONG) -> tuple[int, str]:
    """Run `amqtask …` to its end: exit code, and standard output with standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "amqtask", *arguments],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    return done.returncode, done.stdout


def run_session(command: Sequence[str], *, timeout: float = 120.0, **environment: str) -> tuple[int, str, str]:
    """Run a program to its end: exit code, standard output, standard error.

    What it started and left ends with it: a beat that outlives its example would go on sending to the other tests' broker.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    with process:
        try:
            printed, said = process.communicate(timeout=timeout)
        finally:
            kill_session(process)
    return process.returncode, printed, said


def python(code: str, environment: dict[str, str] | None = None, timeout: float = LONG) -> str:
    """What a piece of Python prints in an interpreter of its own (monkey-patching, forks …)."""
    command: Sequence[str] = [sys.executable, "-c", code]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


__all__ = [
    "READY", "ROOT", "BeatProcess", "LoggedProcess", "NeverHappened", "WorkerProcess", "describe", "eventually",
    "python", "run_cli", "run_session",
]  # fmt: skip

"""Worker processes as users start them, and the one way to wait for anything: `eventually`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

ROOT = Path(__file__).resolve().parent.parent
READY = " ready."


class NeverHappened(AssertionError):
    """What a test waited for did not come true before its deadline."""


def eventually(condition: Callable[[], bool], timeout: float = 30.0, *, what: str = "", every: float = 0.02) -> None:
    """Return once `condition()` is true; raises NeverHappened after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise NeverHappened(what or f"still not so after {timeout:g} s")
        time.sleep(every)


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
        self._environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True, timeout: float = 30.0) -> Self:
        """Start (again); returns once it said that it is ready."""
        offset = self.log_path.stat().st_size
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self._folder, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        if wait:
            eventually(lambda: self._is_ready(offset), timeout, what=f"not ready: {self._command}; see {self.log_path}")
        return self

    def _is_ready(self, offset: int) -> bool:
        if self.process.poll() is not None:
            raise NeverHappened(f"ended with exit code {self.process.returncode}:\n{self.log[-4000:]}")
        return self._ready in self.log[offset:]

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

    def await_log(self, text: str, timeout: float = 30.0) -> None:
        """Wait until `text` stands in the log."""
        eventually(lambda: text in self.log, timeout, what=f"{text!r} never came up in:\n{self.log[-4000:]}")

    def signal(self, signum: int) -> None:
        """Send a signal to the main process only."""
        os.kill(self.pid, signum)

    def wait(self, timeout: float = 30.0) -> int:
        """Its exit code."""
        return self.process.wait(timeout)

    def stop(self, timeout: float = 30.0) -> int:
        """Warm shutdown; the exit code."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        return self.wait(timeout)

    def kill(self) -> None:
        """End it and everything it started, at once."""
        if self._process is not None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._process.wait()

    def __enter__(self) -> Self:
        return self if self._process else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        if error is None:
            self.log_path.unlink(missing_ok=True)


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


def run_cli(*arguments: str, environment: dict[str, str] | None = None, timeout: float = 60.0) -> tuple[int, str]:
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


def python(code: str, environment: dict[str, str] | None = None, timeout: float = 60.0) -> str:
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

"""`--reload`: a command in a child process, which is replaced when files of the project change.

The successor imports the project while the worker still runs, and only when that went well is the worker told to stop: warm, and
after some seconds cold, so that what it has goes back to the broker. The successor connects when it has ended. So a mistake costs
nothing but a message, and no two of them work at once. To start Python and import amqtask takes longest, so a process that has
done that, and knows nothing of the project, always stands by.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

from amqtask.cli.base import echo_text, signals_to
from amqtask.cli.handover import GO, LOAD, LOADED, REPEATED
from amqtask.exceptions import ConfigurationError
from amqtask.ground.plugins import load
from amqtask.ground.startup import RELOADED

Event = Callable[[], None]
# Milliseconds without a change after which changes are complete: editors write in several steps. And the most of them.
QUIET, BURST = 30, 500
# Seconds before the next process is prepared, so that it takes no processor from the one that begins.
STAND_BY_SECONDS = 1.0
# Seconds that running tasks have to end, where nobody says another number.
PATIENCE_SECONDS = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP)
# A command that was called in a wrong way.
_WRONG_USE = 2


class Watcher:
    """Tells of changed files in these folders, from a thread. Raises: ConfigurationError where watchfiles is not installed."""

    def __init__(self, folders: Sequence[Path], patterns: Sequence[str], told: Callable[[list[Path]], None]) -> None:
        try:
            self._watchfiles = load("watchfiles")
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                "to watch files, watchfiles must be installed: pip install 'amqtask[reload]'"
            ) from error
        self._folders, self._patterns, self._told = folders, patterns, told
        self._usual = self._watchfiles.DefaultFilter()
        self._stop = threading.Event()

    def start(self) -> None:
        """Begin; `told` is called in the thread."""
        threading.Thread(target=self._run, name="amqtask reload", daemon=True).start()

    def stop(self) -> None:
        """End."""
        self._stop.set()

    def _run(self) -> None:
        try:
            changes = self._watchfiles.watch(
                *self._folders, watch_filter=self._is_watched, step=QUIET, debounce=BURST, stop_event=self._stop
            )
            for change in changes:
                self._told(sorted({Path(path) for _, path in change}))
        except Exception as error:  # noqa: BLE001 - whatever the system has against it (too many files, a folder that is gone)
            say(f"files are not watched any more, so nothing is reloaded: {error}")

    def _is_watched(self, change: Any, path: str) -> bool:
        return self._usual(change, path) and any(fnmatch(Path(path).name, pattern) for pattern in self._patterns)


class Child:
    """A process of the command, which waits for its orders. `told` and `ended` are called in a thread."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        told: Callable[[Child, bytes], None],
        ended: Callable[[Child, int], None],
    ) -> None:
        self._ours, theirs = socket.socketpair()
        number = theirs.fileno()
        with theirs:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **environment, RELOADED: str(number)},
                pass_fds=[number],
            )
        # `is_stopping`: told to end because another one is ready.
        self.is_ordered = self.is_loaded = self.is_stopping = False
        self._told, self._ended = told, ended
        threading.Thread(target=self._listen, name="amqtask reload", daemon=True).start()

    def order(self, order: bytes) -> None:
        """Tell it to go on."""
        self.is_ordered = True
        try:
            self._ours.sendall(order)
        except OSError:
            pass  # it has ended, which is told

    def signal(self, signum: int) -> None:
        """Send it a signal."""
        self._process.send_signal(signum)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()

    def _listen(self) -> None:
        with self._ours, self._ours.makefile("rb") as lines:
            try:
                for line in lines:
                    self._told(self, line)
            except ConnectionResetError:
                pass  # it was killed before it had read its order
            code = self._process.wait()
        self._ended(self, code if code >= 0 else 128 - code)


class Sources:
    """Which changed files cannot be compiled: a worker that runs is better than one that cannot start."""

    def __init__(self) -> None:
        self._broken: set[Path] = set()

    def check(self, changed: Iterable[Path]) -> str:
        """What is wrong with these files, and with those that were wrong before; nothing: ''."""
        complaints = []
        for path in sorted({*changed, *self._broken}):
            complaint = _complaint(path) if path.suffix == ".py" else ""
            (self._broken.add if complaint else self._broken.discard)(path)
            complaints += [complaint] if complaint else []
        return "".join(complaints)


def _complaint(path: Path) -> str:
    try:
        # Compiled files are known by second and size, so that of a file which was changed twice in a second may be the former's.
        Path(importlib.util.cache_from_source(path)).unlink(missing_ok=True)
        source = path.read_bytes()
    except OSError:
        return ""  # deleted, or not for us: who imports it says so
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the worker's own import tells them
            compile(source, str(path), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        return "".join(traceback.format_exception_only(type(error), error))
    return ""


class Reloader:
    """`patience`: seconds that running tasks have before a worker is stopped cold. `stands_by`: whether the next process may
    start before a change (not where its start imports the project, as Django's commands do). `on_start` is called whenever a
    process that has imported the project begins to work, in the thread of `run`, as all that `post` and `later` are given."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        folder: Path,
        watched: Sequence[Path],
        patterns: Sequence[str],
        patience: float,
        stands_by: bool,
        environment: Mapping[str, str] | None = None,
        on_start: Callable[[Reloader], None] | None = None,
    ) -> None:
        self._command, self._folder, self._environment = command, folder, environment or {}
        self._patience, self._stands_by, self._on_start = patience, stands_by, on_start
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._timers: dict[str, tuple[float, Event]] = {}
        self._watcher = Watcher(watched, patterns, lambda paths: self.post(lambda: self._changed(paths)))
        self._sources = Sources()
        # The process that works, and the one after it.
        self._current: Child | None = None
        self._next: Child | None = None
        self._has_worked = False
        self._is_stopping = False
        self._exit_code: int | None = None

    def run(self) -> int:
        """Until a signal, or until the command ends by itself with 0; its exit code."""
        with signals_to(self._on_signal, *_SIGNALS):
            self._watcher.start()
            self._load_next()
            try:
                while self._exit_code is None:
                    self._turn()
            finally:
                self._watcher.stop()
                for child in (self._current, self._next):
                    if child is not None:
                        child.kill()
        return self._exit_code

    # -- events and timers

    def _turn(self) -> None:
        due = min((at for at, _ in self._timers.values()), default=None)
        try:
            event = self._events.get(timeout=None if due is None else max(0.0, due - time.monotonic()))
        except Empty:
            name = min(self._timers, key=lambda name: self._timers[name][0])
            _, event = self._timers.pop(name)
        event()

    def post(self, event: Event) -> None:
        """Call it soon, from any thread."""
        self._events.put(event)

    def later(self, name: str, seconds: float, event: Event) -> None:
        """Call it after so long, in place of what has the same name."""
        self._timers[name] = (time.monotonic() + seconds, event)

    def forget(self, name: str) -> None:
        """Call off what `later` was given."""
        self._timers.pop(name, None)

    # -- children

    def _start(self) -> Child:
        return Child(
            self._command,
            self._folder,
            {**self._environment, **({REPEATED: "1"} if self._has_worked else {})},
            lambda child, said: self.post(lambda: self._said(child, said)),
            lambda child, code: self.post(lambda: self._ended(child, code)),
        )

    def _stand_by(self) -> None:
        if self._next is None and not self._is_stopping:
            self._next = self._start()

    def _load_next(self) -> None:
        """Let a process import the project as it is now."""
        outdated = self._next
        if outdated is None or outdated.is_ordered:
            self._next = self._start()
        if outdated is not None and outdated is not self._next:
            outdated.kill()
        self.forget("stand by")
        assert self._next is not None
        self._next.order(LOAD)

    def _changed(self, paths: list[Path]) -> None:
        if self._is_stopping:
            return
        say(f"{', '.join(self._short(path) for path in paths)} changed")
        complaint = self._sources.check(paths)
        if complaint:
            say(f"{complaint}{self._what_goes_on()}")
        else:
            self._load_next()

    def _short(self, path: Path) -> str:
        return str(path.relative_to(self._folder) if path.is_relative_to(self._folder) else path)

    def _what_goes_on(self) -> str:
        if self._current is None:
            before = "nothing runs"
        elif not self._current.is_stopping:
            before = "the worker goes on as it was"
        elif self._next is not None and self._next.is_ordered:
            before = "the worker ends its tasks, then the code of the last change that could be compiled runs"
        else:
            before = "the worker ends its tasks, then nothing runs"
        return f"{before} until the next change"

    def _said(self, child: Child, said: bytes) -> None:
        if child is not self._next or said != LOADED:
            return
        child.is_loaded = True
        if self._current is None:
            self._hand_over()
        else:
            self._stop_current(self._current)

    def _stop_current(self, current: Child) -> None:
        """Once: a second TERM would end its tasks, and patience counts from the first change."""
        if not current.is_stopping:
            current.is_stopping = True
            current.signal(signal.SIGTERM)
        if "patience" not in self._timers:
            self.later("patience", self._patience, self._lose_patience)

    def _lose_patience(self) -> None:
        if self._current is not None:
            say("running tasks are ended, and run again with the new code")
            self._current.signal(signal.SIGTERM)

    def _hand_over(self) -> None:
        assert self._next is not None
        self.forget("patience")
        self._current, self._next, self._has_worked = self._next, None, True
        self._current.order(GO)
        if self._on_start is not None:
            self._on_start(self)
        if self._stands_by:
            self.later("stand by", STAND_BY_SECONDS, self._stand_by)

    def _ended(self, child: Child, code: int) -> None:
        if child is self._current:
            self._current = None
            self._after_current(code, was_told=child.is_stopping)
        elif child is self._next:
            self._next = None
            if self._is_stopping or (code == _WRONG_USE and not self._has_worked):
                self._exit_code = code
            elif child.is_ordered:
                self.forget("patience")  # there is nothing to make room for
                say(f"the new code cannot be started; {self._what_goes_on()}")
                if self._stands_by:
                    self.later("stand by", STAND_BY_SECONDS, self._stand_by)

    def _after_current(self, code: int, *, was_told: bool) -> None:
        if self._is_stopping:
            self._exit_code = code
        elif self._next is not None and self._next.is_loaded:
            self._hand_over()
        elif self._next is not None and self._next.is_ordered:
            pass  # it was stopped for one that is outdated already; the one that is being loaded follows it
        elif code == 0 and not was_told:
            self._exit_code = 0
        else:
            say(f"ended with exit code {code}; {self._what_goes_on()}")

    # -- the end

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.post(lambda: self._stop(signum))

    def _stop(self, signum: int) -> None:
        self._is_stopping = True
        self._timers.clear()
        if self._next is not None:
            self._next.kill()
        self._next = None
        if self._current is None:
            self._exit_code = 0
        elif not _reached_all(signum):
            self._current.signal(signum)


def _reached_all(signum: int) -> bool:
    """Whether a terminal has sent this signal (Ctrl-C, Ctrl-\\, its end), to all that run in its foreground."""
    if signum == signal.SIGTERM:
        return False
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


def say(text: str) -> None:
    """A line to the developer."""
    echo_text(f"reload: {text}", err=True)

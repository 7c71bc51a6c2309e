"""What eventlet and gevent have in common, as the green pools use it."""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Callable
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from amqtask.ground.loop import OneTimer
from amqtask.ground.printable import bounded_logger

if TYPE_CHECKING:
    from selectors import DefaultSelector

    from amqtask.pool import Loop, Timer


class Hub(Protocol):
    """The functions that the pool needs of a library. `patch_line` is the line with which a program patches by itself."""

    patch_line: ClassVar[str]

    @staticmethod
    def patch() -> None:
        """Monkey-patch the standard library."""

    @staticmethod
    def is_patched() -> bool:
        """Whether it is patched, by us or by the program."""

    def current(self) -> object:
        """The green thread that runs."""

    def make(self, function: Callable[..., None], argument: object) -> tuple[object, tuple[object, ...]]:
        """A green thread that has not run, and the arguments for its first `switch`."""

    def spawn(self, function: Callable[[], None]) -> None:
        """Run a function in a green thread of its own, soon."""

    def call_soon(self, callback: Callable[..., object], *arguments: object) -> None:
        """Run a callback in the hub, soon. It must not wait."""

    def wait(self) -> None:
        """Leave the current green thread until another one switches to it."""

    def sleep(self, seconds: float) -> None: ...

    def wait_readable(self, fileno: int, seconds: float | None) -> None:
        """Leave the current green thread until the descriptor is readable, the time is over or another one switches to it."""

    def native_selector(self) -> DefaultSelector:
        """The system's best selector, unpatched; it has a file descriptor of its own."""

    def timeout(self, seconds: float, error: BaseException) -> Timer:
        """Raise `error` in the current green thread unless it is cancelled before."""

    def start_native_thread(self, function: Callable[[], None]) -> None:
        """Start a thread of the operating system, unpatched."""

    def native_ident(self) -> int:
        """The id of the running operating system thread, as in sys._current_frames."""

    def native_sleep(self, seconds: float) -> None: ...

    def begin_anew(self) -> None:
        """In a process that was just forked: only the current green thread goes on, the parent's others are its own."""


# -- HubMonitor: logs which task blocks the hub, when all green threads (and the worker's I/O loop) have to wait for it.

logger = bounded_logger("amqtask.pools")

# Seconds without a turn of the loop before that is reported; how often the loop notes a turn, and the thread looks.
BLOCKED = 10.0
BEAT = 1.0


class HubMonitor:
    """A native thread that looks at the clock. `code` is the code of the function whose local `request` is the running request.

    `coroutine_code`, once it is set, is the code of the coroutine whose local `call` has the green thread that waits for it.
    """

    def __init__(self, hub: Hub, loop: Loop, code: CodeType, *, blocked_after: float = BLOCKED) -> None:
        self._hub = hub
        self._code = code
        self._blocked_after = blocked_after
        self._timer = OneTimer(loop)
        self._beat_at = 0.0
        self._thread = 0
        self._is_stopped = False
        self.coroutine_code: CodeType | None = None

    def start(self) -> None:
        """Start watching; called on the loop's thread."""
        self._thread = self._hub.native_ident()
        self._beat()
        self._hub.start_native_thread(self._look)

    def stop(self) -> None:
        """Stop; the thread ends after its present sleep."""
        self._is_stopped = True
        self._timer.cancel()

    def _beat(self) -> None:
        self._beat_at = time.monotonic()
        if not self._is_stopped:
            self._timer.set(min(BEAT, self._blocked_after / 2), self._beat)

    def _look(self) -> None:
        reported, pause = 0.0, min(BEAT, self._blocked_after / 2)
        while not self._is_stopped:
            before = time.monotonic()
            self._hub.native_sleep(pause)
            now, beat = time.monotonic(), self._beat_at
            if now - before > 2 * pause + 1:
                continue  # the whole process was stopped
            if now - beat > self._blocked_after and beat != reported and not self._is_stopped:
                reported = beat
                self._report(now - beat)

    def _report(self, seconds: float) -> None:
        frame = sys._current_frames().get(self._thread)
        request = self._running(frame)
        culprit = f"task {request.task}[{request.id}]" if request is not None else "something that is not a task"
        stack = "".join(traceback.format_stack(frame, limit=12)) if frame is not None else ""
        _log(
            f"{culprit} has kept the hub for {seconds:.0f} s without waiting;"
            f" no other task runs and the broker gets no heartbeats:\n{stack}"
        )

    def _running(self, frame: FrameType | None) -> Any:
        while frame is not None:
            if frame.f_code is self._code:
                return frame.f_locals.get("request")
            is_coroutine = frame.f_code is self.coroutine_code
            frame = frame.f_locals["call"].green.gr_frame if is_coroutine else frame.f_back
        return None


def _log(text: str) -> None:
    """Log a warning without the handlers' locks: patched locks belong to the hub, and two threads that wait for one both hang."""
    if not logger.isEnabledFor(logging.WARNING):
        return
    record = logger.makeRecord(logger.name, logging.WARNING, __file__, 0, text, (), None)
    source: logging.Logger | None = logger
    while source is not None:
        for handler in source.handlers:
            if record.levelno >= handler.level and handler.filter(record):
                handler.emit(record)
        source = source.parent if source.propagate else None

"""`worker.timer`: functions that are called later on a worker's loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from amqtask.ground.printable import bounded_logger

if TYPE_CHECKING:
    from amqtask.ground.shapes import Keywords
    from amqtask.pool import Loop
    from amqtask.pool import Timer as LoopTimer

logger = bounded_logger("amqtask.worker")


class Entry:
    """A pending call: `cancel()`."""

    def __init__(self, call: Callable[[], None], repeat: float | None) -> None:
        self._call = call
        self.repeat = repeat
        self.canceled = False
        self.timer: LoopTimer | None = None

    def __call__(self) -> None:
        """Make the call; what it raises is logged."""
        try:
            self._call()
        except Exception:  # a user's function
            logger.exception("worker: a function that a timer calls has failed")

    def cancel(self) -> None:
        """Cancel the call; from any thread."""
        self.canceled = True


class Timer:
    """Times are seconds. From any thread; the functions run on the worker's loop, so they must be short."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def call_after(
        self, secs: float, fun: Callable[..., Any], args: Sequence[Any] = (), kwargs: Any = None, priority: int = 0
    ) -> Entry:
        """Call a function once, after so many seconds."""
        return self._enter(secs, _bound(fun, args, kwargs), None)

    def call_repeatedly(
        self, secs: float, fun: Callable[..., Any], args: Sequence[Any] = (), kwargs: Any = None, priority: int = 0
    ) -> Entry:
        """Call a function again and again, until it is cancelled."""
        return self._enter(secs, _bound(fun, args, kwargs), secs)

    def cancel(self, tref: Entry) -> None:
        """Cancel a call."""
        tref.cancel()

    def _enter(self, seconds: float, call: Callable[[], None], repeat: float | None) -> Entry:
        entry = Entry(call, repeat)
        self._loop.call_soon_threadsafe(lambda: self._arm(entry, seconds))
        return entry

    def _arm(self, entry: Entry, seconds: float) -> None:
        if not entry.canceled:
            entry.timer = self._loop.call_later(seconds, lambda: self._fire(entry))

    def _fire(self, entry: Entry) -> None:
        if entry.canceled:
            return
        entry()
        if entry.repeat is not None:
            self._arm(entry, entry.repeat)


def _bound(function: Callable[..., Any], args: Sequence[Any], kwargs: Keywords | None) -> Callable[[], None]:
    return lambda: function(*args, **(kwargs or {}))

"""The I/O loop of a worker or of beat, as those know it who run on it; and a periodic call on it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Protocol


class Timer(Protocol):
    """A pending call; `cancel()` may be called twice and after it ran."""

    def cancel(self) -> None: ...


class Loop(Protocol):
    """What a pool, a service or a transport may ask of the loop. All but `call_soon_threadsafe` on the loop's own thread."""

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer: ...

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Run at the end of this loop turn; costs no system call."""

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        """From any thread, greenlet or signal handler: wakes the loop up."""

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None: ...

    def remove_reader(self, fd: int) -> None: ...

    def add_writer(self, fd: int, callback: Callable[[], None]) -> None: ...

    def remove_writer(self, fd: int) -> None: ...

    def service(self) -> None:
        """Turn once without waiting, from inside a callback (a task that keeps the loop's thread)."""


class TurnLoop(Loop, Protocol):
    """A loop whose turns have an end, at which connections write what was sent in the turn."""

    def call_last(self, callback: Callable[[], None]) -> None:
        """Run at the very end of this loop turn, after all `call_soon` callbacks."""


class OneTimer:
    """At most one pending call on a loop: `set` takes the place of the one that is pending."""

    __slots__ = ("_loop", "_timer", "is_set")

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._timer: Timer | None = None
        # Whether a call is pending; an attribute, as publishers look at each flush.
        self.is_set = False

    def set(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call once in so many seconds."""
        self.cancel()
        self._timer = self._loop.call_later(seconds, lambda: self._fire(callback))
        self.is_set = True

    def cancel(self) -> None:
        """Do not call; may be called when nothing is pending."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self.is_set = None, False

    def _fire(self, callback: Callable[[], None]) -> None:
        self._timer, self.is_set = None, False
        callback()


class Ticker:
    """Calls `tick` every `seconds` between `start` and `stop`; both may be called twice."""

    def __init__(self, loop: Loop, seconds: float, tick: Callable[[], None]) -> None:
        self._seconds = seconds
        self._tick = tick
        self._timer = OneTimer(loop)
        self._running = False

    def start(self) -> None:
        if not self._running:
            self._running = True
            self._timer.set(self._seconds, self._fire)

    def stop(self) -> None:
        self._running = False
        self._timer.cancel()

    def _fire(self) -> None:
        if self._running:
            self._timer.set(self._seconds, self._fire)
            self._tick()


def exponential_backoff(
    retries: int, *, factor: float = 1.0, maximum: float = 600.0, full_jitter: bool = False
) -> float:
    """`factor` × 2^retries seconds, at most `maximum`; with `full_jitter` a random part of that, as Celery does it."""
    seconds = min(maximum, factor * 2 ** min(retries, 64))
    return random.uniform(0, seconds) if full_jitter else seconds

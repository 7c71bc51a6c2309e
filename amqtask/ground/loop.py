"""The I/O loop of a worker or of beat, as those know it who run on it; calls on it, and what is too long for a turn of it."""

from __future__ import annotations

import os
import random

# Those from before a green pool patches them: a green thread would keep the loop waiting as well.
from _thread import allocate_lock, start_new_thread
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol


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


# -- Work that is too long for a loop's turn, such as a signature: in a thread, one after the other.

Then = Callable[[Any], None]
# Seconds that a fork waits at most for what is being made: what a library has locked meanwhile would stay locked in the child.
FORK_PATIENCE = 5.0
_busy = allocate_lock()
_is_held: list[bool] = []


def _before_fork() -> None:
    _is_held.append(_busy.acquire(timeout=FORK_PATIENCE))


def _after_fork() -> None:
    if _is_held.pop():
        _busy.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


class _Errand:
    """What is to be made, and who gets it."""

    __slots__ = ("make", "then")

    def __init__(self, make: Callable[[], Any], then: Then) -> None:
        self.make = make
        self.then = then


class Aside:
    """Makes one thing after the other beside a loop; without `is_slow` at once. Its methods are called on the loop's thread."""

    def __init__(self, loop: Loop, *, is_slow: bool) -> None:
        self._loop = loop
        self._is_slow = is_slow
        # The first one is being made.
        self._errands: deque[_Errand] = deque()

    def make(self, make: Callable[[], Any], then: Then) -> None:
        """Call `then` on the loop with what `make` returns, after those that were asked for before. What `make` raises is
        raised on the loop."""
        if not self._is_slow:
            then(make())
            return
        self._errands.append(_Errand(make, then))
        if len(self._errands) == 1:
            self._begin()

    def finish(self) -> None:
        """Make here and now what is not made yet, and all that follows."""
        self._is_slow = False
        while self._errands:
            errand = self._errands.popleft()
            errand.then(errand.make())

    def _begin(self) -> None:
        errand = self._errands[0]
        try:
            start_new_thread(self._run, (errand,))
        except RuntimeError:  # no more threads
            self._run(errand)

    def _run(self, errand: _Errand) -> None:
        made: Any = None
        error: BaseException | None = None
        try:
            with _busy:
                made = errand.make()
        except BaseException as raised:  # noqa: BLE001 - it is raised where somebody sees it
            error = raised
        self._loop.call_soon_threadsafe(lambda: self._made(errand, made, error))

    def _made(self, errand: _Errand, made: Any, error: BaseException | None) -> None:
        if not self._errands or self._errands[0] is not errand:
            return  # `finish` was faster
        self._errands.popleft()
        if self._errands:
            self._begin()
        if error is not None:
            raise error
        errand.then(made)

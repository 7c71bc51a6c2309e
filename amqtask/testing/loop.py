"""PlainLoop: the I/O loop contract in a page of Python, for tests of pools, workers and connections without RabbitMQ."""

from __future__ import annotations

import heapq
import itertools
import os
import selectors
import time
from collections import deque
from collections.abc import Callable

Callback = Callable[[], None]


class PlainTimer:
    """A pending call of a PlainLoop."""

    def __init__(self, callback: Callback) -> None:
        self.callback = callback
        self.is_cancelled = False

    def cancel(self) -> None:
        """Cancel the call."""
        self.is_cancelled = True


class PlainLoop:
    """See amqtask.ground.loop.TurnLoop. Timers follow `clock`: with a ManualClock one is due when the clock was advanced.

    Cooperative under monkey-patching: it polls with what that left of `selectors`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._selector = selectors.DefaultSelector()
        self._callbacks: dict[int, list[Callback | None]] = {}
        self._timers: list[tuple[float, int, PlainTimer]] = []
        self._count = itertools.count()
        self._soon: list[Callback] = []
        self._last: list[Callback] = []
        self._from_threads: deque[Callback] = deque()
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)
        self._is_closed = False
        self.add_reader(self._wake_reader, self._woken)

    # -- the contract

    def call_later(self, delay: float, callback: Callback) -> PlainTimer:
        """Run `callback` after `delay` seconds."""
        timer = PlainTimer(callback)
        heapq.heappush(self._timers, (self._clock() + delay, next(self._count), timer))
        return timer

    def call_soon(self, callback: Callback) -> None:
        """Run at the end of this turn."""
        self._soon.append(callback)

    def call_last(self, callback: Callback) -> None:
        """Run at the very end of this turn."""
        self._last.append(callback)

    def call_soon_threadsafe(self, callback: Callback) -> None:
        """Run at the next turn; may be called from any thread or signal handler. After `close` it does nothing: a task's thread
        may end long after its pool, and the descriptor's number may be somebody else's by then."""
        if self._is_closed:
            return
        self._from_threads.append(callback)
        try:
            os.write(self._wake_writer, b"\0")
        except BlockingIOError:
            pass  # so full that it will wake up anyway

    def add_reader(self, fd: int, callback: Callback) -> None:
        """Call when `fd` can be read."""
        self._set(fd, 0, callback)

    def remove_reader(self, fd: int) -> None:
        """Stop watching."""
        self._set(fd, 0, None)

    def add_writer(self, fd: int, callback: Callback) -> None:
        """Call while `fd` takes writes."""
        self._set(fd, 1, callback)

    def remove_writer(self, fd: int) -> None:
        """Stop watching."""
        self._set(fd, 1, None)

    # -- running

    def run_until(self, predicate: Callable[[], object], timeout: float = 60.0) -> None:
        """Turn until the predicate holds. Raises: TimeoutError."""
        deadline = time.monotonic() + timeout
        while not predicate():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError(f"it did not happen within {timeout:g} s")
            self._turn(min(remaining, 0.05))

    def run_once(self, timeout: float = 0.0) -> None:
        """One turn that waits up to `timeout` seconds (of real time) for something to do."""
        self._turn(timeout)

    def service(self) -> None:
        """One turn without waiting, for a task that keeps the loop's thread."""
        self._turn(0)

    def close(self) -> None:
        """Release the descriptors."""
        self._selector.close()
        self._is_closed = True
        os.close(self._wake_reader)
        os.close(self._wake_writer)

    def _turn(self, longest: float) -> None:
        for key, events in self._selector.select(self._until_next(longest)):
            for bit, which in ((selectors.EVENT_READ, 0), (selectors.EVENT_WRITE, 1)):
                callback = self._callbacks.get(key.fd, [None, None])[which]
                if events & bit and callback is not None:
                    callback()
        now = self._clock()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            if not timer.is_cancelled:
                timer.callback()
        batch, self._soon = self._soon, []
        for callback in batch:
            callback()
        while self._last:
            batch, self._last = self._last, []
            for callback in batch:
                callback()

    def _until_next(self, longest: float) -> float:
        if self._soon or self._last:
            return 0
        return max(0.0, min(longest, self._timers[0][0] - self._clock())) if self._timers else longest

    def _woken(self) -> None:
        os.read(self._wake_reader, 4096)
        while self._from_threads:
            self._from_threads.popleft()()

    def _set(self, fd: int, which: int, callback: Callback | None) -> None:
        is_registered = fd in self._callbacks
        callbacks = self._callbacks.setdefault(fd, [None, None])
        callbacks[which] = callback
        events = (selectors.EVENT_READ if callbacks[0] else 0) | (selectors.EVENT_WRITE if callbacks[1] else 0)
        if not events:
            del self._callbacks[fd]
            if is_registered:
                self._selector.unregister(fd)
        elif is_registered:
            self._selector.modify(fd, events)
        else:
            self._selector.register(fd, events)

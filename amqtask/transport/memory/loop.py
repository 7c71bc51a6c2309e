"""A worker's I/O loop in plain Python, with an injected clock and without a socket, pipe or poller."""

from __future__ import annotations

import heapq
import itertools
import queue
import time
from collections.abc import Callable

Callback = Callable[[], None]


class MemoryTimer:
    """A pending call."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callback) -> None:
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        """Forget it; harmless when it ran or was cancelled."""
        self.callback = None


class MemoryLoop:
    """See amqtask.ground.loop.TurnLoop; for pools that talk to their slots through `call_soon_threadsafe` (no file descriptors).

    Timers follow `clock`: with a ManualClock a timer is due when the clock was advanced.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._timers: list[tuple[float, int, MemoryTimer]] = []
        self._count = itertools.count()
        self._soon: list[Callback] = []
        self._last: list[Callback] = []
        self._from_threads: queue.SimpleQueue[Callback] = queue.SimpleQueue()
        self._is_stopping = False

    # -- the contract

    def call_later(self, delay: float, callback: Callback) -> MemoryTimer:
        """Run `callback` after `delay` seconds."""
        timer = MemoryTimer(callback)
        heapq.heappush(self._timers, (self._clock() + delay, next(self._count), timer))
        return timer

    def call_soon(self, callback: Callback) -> None:
        """Run at the end of this turn."""
        self._soon.append(callback)

    def call_last(self, callback: Callback) -> None:
        """Run at the very end of this turn."""
        self._last.append(callback)

    def call_soon_threadsafe(self, callback: Callback) -> None:
        """From any thread: wakes the loop up."""
        self._from_threads.put(callback)

    def add_reader(self, fd: int, callback: Callback) -> None:
        """Refused."""
        raise NotImplementedError("a MemoryLoop watches no file descriptors; use PlainLoop for pools that need that")

    add_writer = add_reader

    def remove_reader(self, fd: int) -> None:
        """Nothing is watched."""

    remove_writer = remove_reader

    # -- running

    def run(self) -> None:
        """Until `stop`; returns at once when it was stopped before."""
        while not self._is_stopping:
            self._turn(0.5)
        self._is_stopping = False

    def stop(self) -> None:
        """End `run` after the present turn; on the loop's thread."""
        self._is_stopping = True

    def run_once(self, timeout: float = 0.0) -> None:
        """One turn that waits up to `timeout` seconds (of real time) for something to do."""
        self._turn(timeout)

    def service(self) -> None:
        """One turn that waits for nothing, from inside a callback."""
        self._turn(0.0)

    def close(self) -> None:
        """Nothing to release."""

    def _turn(self, longest: float) -> None:
        wait = self._until_next(longest)
        try:
            callback = self._from_threads.get(timeout=wait) if wait > 0 else self._from_threads.get_nowait()
            while True:
                callback()
                callback = self._from_threads.get_nowait()
        except queue.Empty:
            pass
        now = self._clock()
        while self._timers and self._timers[0][0] <= now:
            self._run(heapq.heappop(self._timers)[2])
        batch, self._soon = self._soon, []
        for callback in batch:
            callback()
        while self._last:
            batch, self._last = self._last, []
            for callback in batch:
                callback()

    def _run(self, timer: MemoryTimer) -> None:
        callback, timer.callback = timer.callback, None
        if callback is not None:
            callback()

    def _until_next(self, longest: float) -> float:
        if self._soon or self._last:
            return 0.0
        return max(0.0, min(longest, self._timers[0][0] - self._clock())) if self._timers else longest

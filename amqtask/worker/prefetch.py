"""The adaptive prefetch window: how many unanswered deliveries of one queue a worker may hold.

Two wishes pull against each other. Fairness wants one delivery per slot: whatever waits here cannot run on
another worker that idles. Throughput wants enough in reserve that a slot finds its next task at once
although the broker needs a moment to refill the window. The reserve that is worth having is the number of
tasks that finish in that moment, `slots * REFILL_SECONDS / runtime`: nothing for tasks of a tenth of a
second and more, a hundred per slot for a no-op, and never more than MAX_RESERVE, which is plenty on any
link.

`runtime` is an exponentially weighted mean. When all slots are busy and nothing ends, the time since
something ended is what is known about the tasks of now, whatever those before them took: a window grown on short
tasks closes some tenths of a second after long ones have come.

The window starts at one per slot (fair before anything is known), may first change after 20 ms, then after
40, 80 … up to half a second, and only to the double, to the half, or back to one per slot. Changes are dear: a
consumer is started and another cancelled, and a busy quorum queue counts what is on its way to the cancelled one as
returned (seen on RabbitMQ 3.10: a few hundred redeliveries, each one step towards the delivery limit).
"""

from __future__ import annotations

import math

REFILL_SECONDS = 0.005
LONG_TASK_SECONDS = 0.1
MAX_RESERVE = 256
FIRST_PAUSE_SECONDS = 0.02
LONGEST_PAUSE_SECONDS = 0.5
LEAST_FACTOR = 2
# basic.qos has 16 bits.
MAX_WINDOW = 65535
_WEIGHT = 0.8


def fitting_window(slots: int, runtime: float | None, extra: int = 0) -> int:
    """The window for tasks of `runtime` seconds; None: nothing is known. `extra` is held on top (rate limits)."""
    reserve = 0
    if runtime is not None and runtime < LONG_TASK_SECONDS:
        wanted = slots * REFILL_SECONDS / max(runtime, 1e-6)
        reserve = min(MAX_RESERVE, math.ceil(wanted))
    return min(MAX_WINDOW, max(1, slots) + reserve + extra)


class Window:
    """The window of one queue. `pinned` stays what it is, but for `held`; times are of one monotonic clock."""

    __slots__ = (
        "_changes",
        "_held_in_current",
        "_next_change",
        "_shifted",
        "_slots",
        "burden",
        "count",
        "current",
        "extra",
        "held",
        "pinned",
        "runtime",
        "total",
    )

    def __init__(self, slots: int, pinned: int | None = None) -> None:
        self.pinned = pinned
        self.current = pinned if pinned is not None else fitting_window(slots, None)
        self.extra = 0
        # Room for deliveries whose tasks have ended and whose follow-ups the broker has not taken yet: they must not keep
        # others out.
        self.held = 0
        self._held_in_current = 0
        # Deliveries from before the window closed that are still here: so much less may come.
        self.burden = 0
        self.runtime: float | None = None
        # What ended since the last look: the worker adds to these two for every task.
        self.total = 0.0
        self.count = 0
        self._slots = slots
        self._shifted = 0
        self._changes = 0
        self._next_change = 0.0

    def resize(self, slots: int) -> None:
        """The pool has another number of slots now."""
        self._slots = slots

    def shift(self, by: int) -> int:
        """Hold so many more (or fewer) from now on; the new window."""
        self._shifted += by
        self.current = min(MAX_WINDOW, max(1, self.current + by))
        if self.pinned is not None:
            self.pinned = max(1, self.pinned + by)
        return self.current

    def saw_nothing_end(self, seconds: float) -> None:
        """All slots have been busy for so long."""
        if self.runtime is None or seconds > self.runtime:
            self.runtime = seconds

    @property
    def is_for_long_tasks(self) -> bool:
        """Nothing is held in reserve."""
        return self.runtime is not None and self.runtime >= LONG_TASK_SECONDS

    @property
    def room(self) -> int:
        """What its consumer may hold. It grows with each delivery that is dealt with, in powers of two: each step costs a
        consumer. At least one, so that the queue has a consumer at all times: some are deleted with their last one."""
        if not self.burden:
            return self.current
        return min(self.current, 1 << (max(1, self.current - self.burden) - 1).bit_length())

    def look(self, now: float) -> int | None:
        """Take in what ended; the new window if it should change now."""
        if self.count:
            self._take_in()
        if now < self._next_change:
            return None
        wanted = self._wanted()
        if not self._is_worth_it(wanted):
            return None
        pause = FIRST_PAUSE_SECONDS * 2**self._changes if self._changes < 8 else LONGEST_PAUSE_SECONDS
        self._next_change = now + min(LONGEST_PAUSE_SECONDS, pause)
        self._changes += 1
        self.current = wanted
        self._held_in_current = self.held
        return wanted

    def _wanted(self) -> int:
        if self.pinned is not None:
            return min(MAX_WINDOW, self.pinned + self.held)
        return max(1, fitting_window(self._slots, self.runtime, self.extra + self.held + self._shifted))

    def _is_worth_it(self, wanted: int) -> bool:
        if wanted == self.current:
            return False
        if self.pinned is not None or self.held != self._held_in_current:
            return True
        smaller, larger = sorted((wanted, self.current))
        return larger >= LEAST_FACTOR * smaller or wanted == self._slots + self.extra + self.held + self._shifted

    def _take_in(self) -> None:
        mean = self.total / self.count
        if self.runtime is None:
            self.runtime = mean
        else:
            self.runtime += (1.0 - _WEIGHT ** min(self.count, 50)) * (mean - self.runtime)
        self.total, self.count = 0.0, 0

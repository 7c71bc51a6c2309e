"""The adaptive prefetch window: how many unanswered deliveries of one queue a worker may hold.

Fairness needs one delivery per slot: a delivery that waits here cannot run on another worker that idles. Throughput needs a
reserve, so that a slot finds its next task at once although the broker needs a moment to refill the window. A useful reserve is
the number of tasks that finish in that moment, `slots * REFILL_SECONDS / runtime`: none for tasks of a tenth of a second and
more, a hundred per slot for a no-op, and never more than MAX_RESERVE, which is enough on any link.

`runtime` is an exponentially weighted mean. When all slots are busy and no task ends, the time since the last end replaces it:
the present tasks take at least that long, whatever earlier ones took. So a window that grew with short tasks closes some tenths
of a second after long ones have come.

The window starts at one per slot (which is fair before any runtime is known), may first change after 20 ms, then after 40, 80 …
up to half a second, and only to the double, to the half, or back to one per slot. Changes are expensive: a consumer is started
and another one cancelled, and a busy quorum queue counts deliveries under way to the cancelled one as returned (seen on RabbitMQ
3.10: a few hundred redeliveries, each one step towards the delivery limit).

A runtime alone changes the window only while deliveries come: so the broker can start a consumer. On a node that has just lost
the others (RabbitMQ 4.3, `rabbit_fifo_client:checkout`) the channel would stand still for a minute, with all that it holds.
Only closing does not wait, because what comes no more may be here already.

After a lost connection the window begins at one per slot again, for CALM_SECONDS: where connections are cut again and again, most
of a large window is lost each time before it can be read, and each time is a step towards the delivery limit.

`Windows` has those of all queues of a worker, and changes the consumer's prefetch when one changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amqtask.transport.contract import Consumer
    from amqtask.worker.dispatcher import Surplus
    from amqtask.worker.division import Division

REFILL_SECONDS = 0.005
LONG_TASK_SECONDS = 0.1
MAX_RESERVE = 256
FIRST_PAUSE_SECONDS = 0.02
LONGEST_PAUSE_SECONDS = 0.5
CALM_SECONDS = 2.0
LEAST_FACTOR = 2
# basic.qos has 16 bits.
MAX_WINDOW = 65535
_WEIGHT = 0.8


def fitting_window(slots: int, runtime: float | None, extra: int = 0) -> int:
    """The window for tasks of `runtime` seconds; None: not known yet. `extra` comes on top (rate limits)."""
    reserve = 0
    if runtime is not None and runtime < LONG_TASK_SECONDS:
        useful_reserve = slots * REFILL_SECONDS / max(runtime, 1e-6)
        reserve = min(MAX_RESERVE, math.ceil(useful_reserve))
    return min(MAX_WINDOW, max(1, slots) + reserve + extra)


class Window:
    """The window of one queue. A `pinned` window does not adapt, but grows by `held`; times are of one monotonic clock."""

    __slots__ = (
        "_changes", "_ended", "_ended_before", "_full_since", "_held_in_current", "_next_change", "_shifted", "_slots", "_wanted",
        "batch", "count", "current", "extra", "held", "old_deliveries", "pinned", "runtime", "total",
    )  # fmt: skip

    def __init__(self, slots: int, pinned: int | None = None) -> None:
        self.pinned = pinned
        self.current = pinned if pinned is not None else fitting_window(slots, None)
        self.extra = 0
        # The largest batch of the queue's tasks: one for each slot has room, and one that is gathered.
        self.batch = 0
        # Room for deliveries whose tasks have ended and whose follow-ups are not confirmed yet: they must not keep others out.
        self.held = 0
        self._held_in_current = 0
        # How many deliveries from before the window closed are still here: so many fewer may come.
        self.old_deliveries = 0
        self.runtime: float | None = None
        # The runtimes, and the number, of tasks that ended since the last look: the worker adds to these for every task.
        self.total = 0.0
        self.count = 0
        self._slots = slots
        self._shifted = 0
        self._changes = 0
        self._next_change = 0.0
        # What the present window was made for, beside the runtime.
        self._wanted = self._wishes
        # How many had ended when the queue was first seen with all its slots busy, and when that was.
        self._ended = 0
        self._ended_before = 0
        self._full_since: float | None = None

    def resize(self, slots: int, pinned: int | None) -> None:
        """The queue has another number of slots now, and another pinned window."""
        self._slots = slots
        if pinned is not None:
            self.pinned = max(1, pinned + self._shifted)

    def shift(self, by: int) -> None:
        """Make the window larger (or smaller) by so many."""
        self._shifted += by
        self.current = min(MAX_WINDOW, max(1, self.current + by))
        if self.pinned is not None:
            self.pinned = max(1, self.pinned + by)

    def begin_anew(self, now: float) -> None:
        """Its channel is lost."""
        self.old_deliveries = 0
        if self.pinned is None:
            self._next_change = now + CALM_SECONDS
            self.current = max(1, fitting_window(self._slots, None, self.extra + self._shifted))
            self._held_in_current = 0

    def saw_nothing_end(self, seconds: float) -> None:
        """All slots have been busy for so long, and no task ended."""
        if self.runtime is None or seconds > self.runtime:
            self.runtime = seconds

    def saw(self, *, is_full: bool, now: float) -> None:
        """All slots that this queue may take are busy, or not."""
        ended = self._ended + self.count
        if not is_full:
            self._full_since = None
        elif self._full_since is None or ended != self._ended_before:
            self._ended_before, self._full_since = ended, now
        else:
            self.saw_nothing_end(now - self._full_since)

    @property
    def is_for_long_tasks(self) -> bool:
        """Whether tasks are so long that there is no reserve."""
        return self.runtime is not None and self.runtime >= LONG_TASK_SECONDS

    @property
    def room(self) -> int:
        """How many deliveries the queue's consumer may hold. That grows as old deliveries are answered, in powers of two, because
        each step costs a consumer. At least one, so that the queue always has a consumer: some are deleted with their last."""
        if not self.old_deliveries:
            return self.current
        return min(self.current, 1 << (max(1, self.current - self.old_deliveries) - 1).bit_length())

    def look(self, now: float, *, arriving: bool = True) -> int | None:
        """Update the runtime; returns the new window if it should change now. `arriving`: deliveries come just now."""
        if self.count:
            self._take_in()
        if now < self._next_change:
            return None
        next_window = self._next_window()
        if not self._is_worth_it(next_window):
            return None
        wishes = self._wishes
        if not arriving and wishes == self._wanted and not (next_window < self.current and self.is_for_long_tasks):
            return None
        self._wanted = wishes
        pause = FIRST_PAUSE_SECONDS * 2**self._changes if self._changes < 8 else LONGEST_PAUSE_SECONDS
        self._next_change = now + min(LONGEST_PAUSE_SECONDS, pause)
        self._changes += 1
        self.current = next_window
        self._held_in_current = self.held
        return next_window

    @property
    def _wishes(self) -> tuple[int | None, ...]:
        return self._slots, self.pinned, self.extra, self.held, self.batch, self._shifted

    def _next_window(self) -> int:
        if self.pinned is not None:
            return min(MAX_WINDOW, max(self.pinned, self.batch) + self.held)
        return self._fitting(self.runtime, self.extra + self.held + self._shifted)

    def _fitting(self, runtime: float | None, extra: int) -> int:
        for_batches = min(MAX_WINDOW, self.batch * (self._slots + 1))
        return max(1, for_batches, fitting_window(self._slots, runtime, extra))

    def _is_worth_it(self, next_window: int) -> bool:
        if next_window == self.current:
            return False
        if self.pinned is not None or self.held != self._held_in_current:
            return True
        smaller, larger = sorted((next_window, self.current))
        return larger >= LEAST_FACTOR * smaller or next_window == self._slots + self.extra + self.held + self._shifted

    def _take_in(self) -> None:
        mean = self.total / self.count
        if self.runtime is None:
            self.runtime = mean
        else:
            self.runtime += (1.0 - _WEIGHT ** min(self.count, 50)) * (mean - self.runtime)
        self._ended += self.count
        self.total, self.count = 0.0, 0


# How often `look` really looks; it is called once per loop turn.
LOOK_SECONDS = 0.01
# Deliveries arrive: one came so many seconds ago. A node that has lost the others gives out no more, at once.
ARRIVING_SECONDS = 0.05
# The most extra deliveries per window while the broker confirms nothing.
MOST_ROOM = 4096


class Windows:
    """One Window per queue, for the slots that it may take, `pinned` if that is a number. `surplus` is told when one closes
    because the tasks have become long, and when it changes otherwise."""

    def __init__(self, consumer: Consumer, division: Division, surplus: Surplus, *, pinned: int | None) -> None:
        self._consumer = consumer
        self._division = division
        self._surplus = surplus
        self._pinned = pinned
        self._has_old_deliveries = False
        self._next_look = 0.0
        self._taken = 0
        self._taken_at = 0.0
        self._room = 0
        # The worker adds each ended task's runtime to these directly.
        self.by_queue: dict[str, Window] = {}

    def add(self, queue: str) -> Window:
        """Add the window of a queue that is going to be consumed."""
        window = self.by_queue[queue] = Window(self._division.most(queue), self._pinned_of(queue))
        window.held = self._room
        return window

    def remove(self, queue: str) -> None:
        self.by_queue.pop(queue, None)
        self._surplus.opened(queue)

    def resize(self) -> None:
        """Queues may take another number of slots than they could."""
        for queue, window in self.by_queue.items():
            window.resize(self._division.most(queue), self._pinned_of(queue))

    def _pinned_of(self, queue: str) -> int | None:
        """In proportion, if the queue may take only a part of the slots."""
        if self._pinned in (None, MAX_WINDOW):
            return self._pinned
        return max(1, round(self._pinned * self._division.most(queue) / self._division.slots))

    def widen(self, queue: str, by: int) -> None:
        """So many requests of the queue wait here for their rate limit: that must not narrow the window for its other tasks."""
        if queue in self.by_queue:
            self.by_queue[queue].extra = by

    def shift(self, by: int) -> None:
        """Make each window larger (or smaller) by so many, by remote control."""
        for queue, window in self.by_queue.items():
            window.shift(by)
            self._consumer.set_prefetch(queue, window.room)

    def connection_lost(self, now: float) -> None:
        """The deliveries are void, and there will be others over another connection."""
        for queue, window in self.by_queue.items():
            window.begin_anew(now)
            self._surplus.opened(queue)
            self._consumer.set_prefetch(queue, window.room)

    def hold(self, count: int) -> None:
        """Make room for so many that run no more (they wait for confirms) or not yet (for their turn). In powers of two, and not
        down and up again, because a change costs a consumer."""
        if self._room >> 2 < count <= self._room:
            return
        self._room = min(MOST_ROOM, 1 << (count - 1).bit_length()) if count else 0
        for window in self.by_queue.values():
            window.held = self._room

    def room_beside(self, queue: str) -> int:
        """How many deliveries that do not run may be kept: as long as there is no room for them, a half of the window."""
        window = self.by_queue.get(queue)
        return 0 if window is None else max(1, window.current // 2, self._room)

    def look(self, now: float, taken: int) -> None:
        """Change the windows that should change now. `taken`: how many deliveries have come to the worker at all."""
        if taken != self._taken:
            self._taken, self._taken_at = taken, now
        if now < self._next_look and not self._has_old_deliveries:
            return
        self._next_look = now + LOOK_SECONDS
        arriving = now - self._taken_at < ARRIVING_SECONDS
        self._has_old_deliveries = False
        for queue, window in self.by_queue.items():
            old_size = window.current
            new_size = window.look(now, arriving=arriving)
            if new_size is not None:
                self._changed(queue, window, has_closed=new_size < old_size and window.is_for_long_tasks)
            elif window.old_deliveries:
                self._set_prefetch(queue, window)

    def _changed(self, queue: str, window: Window, *, has_closed: bool) -> None:
        if has_closed and window.pinned is None:
            self._surplus.closed(queue)
        else:
            self._surplus.opened(queue)
        self._set_prefetch(queue, window)

    def _set_prefetch(self, queue: str, window: Window) -> None:
        """Set the prefetch to the window without the deliveries from before its closing."""
        window.old_deliveries = self._surplus.old_deliveries(queue)
        if window.room == window.current:
            window.old_deliveries = 0
        else:
            self._has_old_deliveries = True
        self._consumer.set_prefetch(queue, window.room)

    def are_long(self, queue: str) -> bool:
        """Whether the tasks of a queue are long now."""
        window = self.by_queue.get(queue)
        return window is not None and window.is_for_long_tasks

    def look_at_full(self, is_full: Callable[[str], bool], now: float) -> None:
        """Queues that may take no more slots show how long their tasks are at least."""
        for queue, window in self.by_queue.items():
            window.saw(is_full=is_full(queue), now=now)

    def nothing_ends(self, seconds: float) -> None:
        """All slots have been busy for so long, and no task ended."""
        for window in self.by_queue.values():
            window.saw_nothing_end(seconds)

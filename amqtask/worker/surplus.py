"""Surplus: the deliveries of a queue that a worker held when its window closed, because the tasks have become long. Other workers
may run them sooner.

A window that short tasks have opened holds many deliveries. When long tasks come, the deliveries that wait here wait for as long
as the present ones run, even while a slot of another worker idles. So they are requeued, in portions: the first one as large as
the pool, each further one twice as large. An idle worker may still have a wide window and take all that is requeued, until it has
run its first long tasks; so a requeue of everything at once would only move the surplus there. And a message must not be requeued
often, because older brokers count each requeue as a failed delivery. While the worker still has deliveries from before the
closing, its consumer gets only the rest of the window (see windows.py).

That consumer may get a requeued delivery again, and an idle worker may get more than it has slots for. So when all portions have
gone, waiting requests are requeued a second time, and never a third.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amqtask.execution.request import Request
    from amqtask.worker.deliveries import Deliveries
    from amqtask.worker.dispatcher import Dispatcher

# Seconds from the closing to the first portion, and between portions: other workers notice long tasks within half a second.
FIRST_SECONDS, PORTION_SECONDS = 0.2, 0.4


@dataclass(slots=True)
class _Closed:
    """A queue whose window has closed: the number of the last request before that, the size of the next portion (0: all of them
    for the second time; None: no more), and when it is due."""

    last: int
    portion: int | None
    due: float


class Surplus:
    """Requeues the surplus, so that another worker may run it."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        deliveries: Deliveries,
        *,
        delivery_limit: Callable[[str], int | None],
        slots: Callable[[], int],
        is_long: Callable[[str], bool],
        clock: Callable[[], float],
    ) -> None:
        self._dispatcher = dispatcher
        self._deliveries = deliveries
        self._delivery_limit = delivery_limit
        self._slots = slots
        self._is_long = is_long
        self._clock = clock
        self._closed: dict[str, _Closed] = {}

    def closed(self, queue: str, last: int) -> None:
        """The queue's window has closed; `last` is the number of the latest request."""
        self._closed[queue] = _Closed(last, max(1, self._slots()), self._clock() + FIRST_SECONDS)

    def opened(self, queue: str) -> None:
        """The tasks are short again, or the queue is not consumed any more."""
        self._closed.pop(queue, None)

    def old_deliveries(self, queue: str) -> int:
        """How many requests from before the closing are still here, waiting or running."""
        closed = self._closed.get(queue)
        if closed is None:
            return 0
        waiting, running = self._dispatcher, self._dispatcher.running.values()
        count = sum(
            request.number <= closed.last and request.queue == queue
            for requests in (waiting, running)
            for request in requests
        )
        if not count:
            del self._closed[queue]
        return count

    def look(self) -> None:
        """Requeue the portions that are due; called some times a second."""
        now = self._clock()
        for queue, closed in list(self._closed.items()):
            if not self._is_long(queue):
                self.opened(queue)
            elif closed.portion is not None and closed.due <= now:
                closed.due = now + PORTION_SECONDS
                closed.portion = self._next(queue, closed.last, closed.portion)

    def _next(self, queue: str, last: int, portion: int) -> int | None:
        """Requeue this portion; returns the size of the next one."""
        if not portion:
            self._give_back(queue, sys.maxsize, sys.maxsize, includes_redelivered=True)
            return None
        count = self._give_back(queue, last, portion, includes_redelivered=False)
        return 2 * portion if count == portion else 0

    def _give_back(self, queue: str, last: int, count: int, *, includes_redelivered: bool) -> int:
        """Requeue at most `count` waiting requests up to the number `last`, the last ones. Returns how many.

        Only first deliveries, or second ones: older brokers count the requeue as a failed delivery, and that must not
        dead-letter a message. No steps of a chain that has begun here."""
        self._deliveries.look_at_channel()
        limit = self._delivery_limit(queue) or sys.maxsize
        acks_early = self._deliveries.acks_early

        def allowed(request: Request) -> bool:
            return (
                request.queue == queue
                and request.number <= last
                and (not request.redelivered or (includes_redelivered and request.attempts <= 1))
                and request.attempts + 1 < limit
                and self._deliveries.is_present(request)
                and request.first is None
            )

        # A request that is acked early is acked when it goes from the line to the pool.
        taken = self._dispatcher.take_line(queue, allowed=allowed, limit=count)
        if len(taken) < count:
            unanswered = self._dispatcher.take_unbegun(
                lambda request: allowed(request) and request.number not in acks_early, count - len(taken)
            )
            taken = unanswered + taken
        self._deliveries.give_back(taken)
        return len(taken)

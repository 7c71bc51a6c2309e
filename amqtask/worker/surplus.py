"""What a worker held of a queue when its window closed, because the tasks have become long: others may run it sooner.

A window that short tasks have opened holds many deliveries. When long ones come, those that wait here wait for as long as the
present ones run, even while a slot of another worker idles. So they go back to the queue, in portions: the first one as large as
the pool, each further one twice as large. A worker that idles now may still take all that it is given, and only its first
long tasks tell it; and a message must not go round, because older brokers count each return as a failed delivery. Given
back at once, everything would lie in the next wrong hands. While the worker has not dealt with what it keeps, its consumer gets
only the rest of the window (see windows.py).

That consumer may have taken one of them again, and who was idle more than it has slots for. So when all portions have gone, what
waits here goes back a second time, and never a third.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amqtask.worker.dispatcher import Dispatcher

# From the closing to the first portion, and from one to the next: others notice within half a second that tasks are long.
FIRST_SECONDS, PORTION_SECONDS = 0.2, 0.4


@dataclass(slots=True)
class _Closed:
    """A queue whose window has closed: the number of the last request before, the next portion (0: the second time for
    all; None: nothing more), and when it is due."""

    last: int
    portion: int | None
    due: float


class Surplus:
    """`give_back(queue, last, most, again)` gives back what waits of the requests up to the number `last`, and says how many;
    with `again` also what comes from having been given back."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        *,
        give_back: Callable[[str, int, int, bool], int],
        slots: Callable[[], int],
        is_long: Callable[[str], bool],
        clock: Callable[[], float],
    ) -> None:
        self._dispatcher = dispatcher
        self._give_back = give_back
        self._slots = slots
        self._is_long = is_long
        self._clock = clock
        self._closed: dict[str, _Closed] = {}

    def closed(self, queue: str, last: int) -> None:
        """The queue's window has closed; `last` is the number of the latest request."""
        self._closed[queue] = _Closed(last, max(1, self._slots()), self._clock() + FIRST_SECONDS)

    def opened(self, queue: str) -> None:
        """The tasks are short again, or the queue is consumed no more."""
        self._closed.pop(queue, None)

    def held(self, queue: str) -> int:
        """How many requests from before the closing are still here, running ones too."""
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
        """Give back the portions that are due; called some times a second."""
        now = self._clock()
        for queue, closed in list(self._closed.items()):
            if not self._is_long(queue):
                self.opened(queue)
            elif closed.portion is not None and closed.due <= now:
                closed.due = now + PORTION_SECONDS
                closed.portion = self._next(queue, closed.last, closed.portion)

    def _next(self, queue: str, last: int, portion: int) -> int | None:
        """Give back this portion; the next one."""
        if not portion:
            self._give_back(queue, sys.maxsize, sys.maxsize, True)
            return None
        given = self._give_back(queue, last, portion, False)
        return 2 * portion if given == portion else 0

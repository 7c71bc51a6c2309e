"""Tasks whose process died: how often each may run again, and the pause before its message goes back to its queue.

The reason may pass (other programs used the memory) or not (a bug). So the message is tried again, later each time, and after
the delivery limit it is dead-lettered with a reason that says how the process ended.

Quorum queues count the deliveries of a message (`x-delivery-count`); for other queues this worker counts itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amqtask.execution.request import Request
    from amqtask.pool import Loop, Timer

# Seconds before the second run; the pause doubles with each run.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0


class Lost:
    """Holds lost requests for their pause; then `give_back(request)` requeues them."""

    def __init__(
        self,
        loop: Loop,
        *,
        give_back: Callable[[Request], None],
        delivery_limit: Callable[[str], int | None],
        remembered: int = 10_000,
    ) -> None:
        self._loop = loop
        self._give_back = give_back
        self._delivery_limit = delivery_limit
        self._remembered = remembered
        self._counts: OrderedDict[str, int] = OrderedDict()
        self._waiting: dict[int, tuple[Request, Timer]] = {}

    def __len__(self) -> int:
        """How many requests wait to be requeued."""
        return len(self._waiting)

    def count(self, task_id: str) -> int:
        """How often this task's process died here, for queues that do not count deliveries."""
        return self._counts.get(task_id, 0)

    def is_last(self, request: Request) -> bool:
        """Count a lost request; whether it must not be delivered again."""
        if "x-delivery-count" not in request.headers:
            self._add(request.id)
        limit = self._delivery_limit(request.queue)
        return limit is not None and 0 < limit <= request.attempts + 1

    def hold(self, request: Request) -> None:
        """Requeue the request after a pause."""
        seconds = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(request.attempts, 16))
        self._waiting[request.number] = request, self._loop.call_later(seconds, lambda: self._requeue_now(request))

    def stop(self) -> None:
        """Requeue all of them now."""
        for request, timer in list(self._waiting.values()):
            timer.cancel()
            self._requeue_now(request)

    def _requeue_now(self, request: Request) -> None:
        if self._waiting.pop(request.number, None) is not None:
            self._give_back(request)

    def _add(self, task_id: str) -> None:
        self._counts[task_id] = self._counts.get(task_id, 0) + 1
        self._counts.move_to_end(task_id)
        if len(self._counts) > self._remembered:
            self._counts.popitem(last=False)

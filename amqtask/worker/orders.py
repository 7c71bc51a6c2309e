"""What a running worker can be told: by remote control, and by the services that ride on it.

Everything here is called on the worker's loop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import ConfigurationError, NotRegistered
from amqtask.worker.intake import NEVER

if TYPE_CHECKING:
    from amqtask.entities import Queue
    from amqtask.execution.request import Request
    from amqtask.worker.worker import Worker

logger = logging.getLogger("amqtask.worker")


class Orders:
    """Changes to one worker, and questions about it."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    # -- changes

    def revoke(self, task_ids: Iterable[str], *, terminate: bool = False) -> list[str]:
        """Do not run these; with `terminate` also end them if they run. Returns the ids that were terminated."""
        worker, ids = self._worker, dict.fromkeys(task_ids)
        worker.revoked.add(ids, time.time())
        for request in worker.dispatcher:
            if request.id in ids:
                worker.dispatcher.watched[request.number] = NEVER
        terminated: list[str] = []
        if terminate:
            for request in list(worker.dispatcher.running.values()):
                if request.id in ids and worker.pool.terminate(request.number, "terminated"):
                    terminated.append(request.id)
                    worker.report.revoked(request, terminated=True)
        worker.wake()
        return terminated

    def set_rate_limit(self, task_name: str, limit: str | float | None) -> None:
        """Raises: NotRegistered, ConfigurationError."""
        self._known(task_name)
        self._worker.throttle.set_rate(task_name, limit)
        self._worker.wake()

    def set_time_limits(self, task_name: str, *, soft: float | None, hard: float | None) -> None:
        """For requests received from now on. Raises: NotRegistered, ConfigurationError."""
        self._known(task_name)
        for name, value in (("soft", soft), ("hard", hard)):
            if value is not None and name not in self._worker.pool.limits:
                raise ConfigurationError(f"the {self._worker.pool.name} pool has no {name} time limits")
        strategy = self._worker.strategies[task_name]
        strategy.soft_limit, strategy.hard_limit = soft, hard

    def resize(self, slots: int) -> int:
        """Another number of slots (at least one); the prefetch windows follow. Returns the number."""
        worker, slots = self._worker, max(1, slots)
        worker.pool.resize(slots)
        worker.windows.resize(slots)
        worker.wake()
        return slots

    def scale(self, slots: int) -> None:
        """Another number of slots, with the windows as they are (autoscale: they are sized for its maximum)."""
        self._worker.pool.resize(slots)
        self._worker.wake()

    def consume(self, queue: Queue, dead_letter: Queue | None) -> None:
        """One more queue, unless it is consumed already."""
        if queue.name not in self._worker.windows.by_queue:
            self._worker.lifecycle.consume(queue, dead_letter)

    def cancel(self, queue: str) -> bool:
        """Take no more deliveries from it; those that are here still run. False: it was not consumed."""
        if queue not in self._worker.windows.by_queue:
            return False
        self._worker.consumer.cancel_queue(queue)
        self._worker.windows.remove(queue)
        return True

    def shut_down(self) -> None:
        """Warm, as TERM does."""
        self._worker.lifecycle.shutdown.warm("remote control")

    def _known(self, task_name: str) -> None:
        strategy = self._worker.strategies[task_name]
        if strategy.task is None:
            raise NotRegistered(strategy.problem)

    # -- questions

    def running(self) -> list[Request]:
        return list(self._worker.dispatcher.running.values())

    def waiting(self) -> list[Request]:
        return list(self._worker.dispatcher)

    @property
    def backlog(self) -> int:
        """How many tasks this worker could run at once now, had it the slots."""
        return len(self._worker.dispatcher.running) + self._worker.dispatcher.waiting

    def stats(self) -> dict[str, Any]:
        """Numbers about the worker itself (the panel adds the process's)."""
        worker = self._worker
        totals = {name: strategy.count for name, strategy in worker.strategies.items() if strategy.count}
        return {
            "total": totals,
            "pool": {"max-concurrency": worker.pool.slots, "implementation": worker.pool.name, **worker.pool.stats()},
            "prefetch_count": sum(window.current for window in worker.windows.by_queue.values()),
            "prefetch": {queue: window.current for queue, window in worker.windows.by_queue.items()},
            "waiting": worker.dispatcher.waiting,
            "unconfirmed": worker.publisher.outstanding,
        }

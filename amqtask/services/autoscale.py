"""Autoscale: the pool grows with the number of tasks that could run at once, and shrinks when slots were idle for a while."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from amqtask.ground.loop import Ticker
from amqtask.ground.printable import bounded_logger, count

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonObject
    from amqtask.worker.operations import Operations
    from amqtask.worker.worker import Worker

logger = bounded_logger("amqtask.worker")

CHECK_SECONDS = 1.0
# Seconds that slots must have been idle before they are removed (Celery's AUTOSCALE_KEEPALIVE).
KEEP_SECONDS = 30.0


class Autoscale:
    """Keeps the pool (of several: the first) between `min_slots` and `max_slots`.

    The prefetch windows are sized for `max_slots`, so the requests that run and wait here tell how many slots have work:
    growing is immediate and to exactly that many, shrinking waits until the need has been lower for `keep_seconds`.
    """

    name = "autoscale"

    def __init__(
        self,
        worker: Worker,
        operations: Operations,
        *,
        max_slots: int,
        min_slots: int,
        keep_seconds: float = KEEP_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._worker = worker
        self._operations = operations
        self._keep_seconds = keep_seconds
        self._clock = clock
        self.max_slots = max_slots
        self.min_slots = max(1, min_slots)
        self._last_needed = clock()
        self._ticker = Ticker(worker.loop, CHECK_SECONDS, self.check)

    @property
    def _slots(self) -> int:
        return self._worker.pool.members[0].slots

    def start(self) -> None:
        self._ticker.start()

    def stop(self) -> None:
        self._ticker.stop()

    def check(self) -> None:
        """Compare need and slots once."""
        slots = self._slots
        needed = min(self.max_slots, max(self.min_slots, self._operations.backlog))
        now = self._clock()
        if needed >= slots:
            self._last_needed = now
        if needed > slots:
            self._scale(slots, needed)
        elif needed < slots and now - self._last_needed >= self._keep_seconds:
            self._last_needed = now
            self._scale(slots, needed)

    def set_bounds(self, max_slots: int | None, min_slots: int | None) -> tuple[int, int]:
        """Change the bounds, by remote control. Returns (max_slots, min_slots)."""
        self.max_slots = max(1, max_slots if max_slots is not None else self.max_slots)
        self.min_slots = max(1, min(self.max_slots, min_slots if min_slots is not None else self.min_slots))
        self._worker.division.most_slots = self.max_slots
        self._worker.windows.resize()
        slots = self._slots
        bounded = min(self.max_slots, max(self.min_slots, slots))
        if bounded != slots:
            self._scale(slots, bounded)
        return self.max_slots, self.min_slots

    def info(self) -> JsonObject:
        return {"max": self.max_slots, "min": self.min_slots, "current": self._slots}

    def _scale(self, before: int, slots: int) -> None:
        logger.info("Scaling %s to %s.", "up" if slots > before else "down", count(slots, "slot"))
        self._operations.scale(slots)

"""A scheduler as it was written for Celery."""

from __future__ import annotations

from amqtask.beat import Scheduler


class TableScheduler(Scheduler):  # type: ignore[misc]
    """Its table is empty."""

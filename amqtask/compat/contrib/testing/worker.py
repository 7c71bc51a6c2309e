"""`celery.contrib.testing.worker`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from amqtask.app import AmqTask
from amqtask.testing import worker as ours
from amqtask.worker.worker import Worker


@contextmanager
def start_worker(
    app: AmqTask,
    concurrency: int = 1,
    pool: str = "solo",
    loglevel: object = None,
    logfile: str | None = None,
    perform_ping_check: bool = True,
    ping_task_timeout: float = 10.0,
    shutdown_timeout: float = 10.0,
    **kwargs: Any,
) -> Iterator[Worker]:
    """A worker in a thread, ready when the block begins; see `amqtask.testing.worker.start_worker`."""
    with ours.start_worker(app, concurrency=concurrency, pool=pool, queues=kwargs.get("queues") or ()) as worker:
        yield worker

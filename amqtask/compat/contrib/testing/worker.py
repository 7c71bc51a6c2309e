"""`celery.contrib.testing.worker`."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from socket import gethostname
from typing import Any

from amqtask.app import AmqTask
from amqtask.testing import worker as ours
from amqtask.worker.worker import Worker

# Seconds that a worker may take to begin, and to end, whatever it is given.
_PATIENCE = 30.0


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
    """A worker in a thread, ready when the block begins, under a name of its own, whatever the application's broker is; see
    `amqtask.testing.worker.start_worker`. What is no option of ours is left out."""
    options = {
        "hostname": f"gen-{uuid.uuid4().hex[:8]}@{gethostname()}",
        **{name: value for name, value in kwargs.items() if name in ours.OPTIONS},
        "pool": pool,
        "concurrency": concurrency,
        "shutdown_timeout": max(shutdown_timeout, _PATIENCE),
    }
    with ours.start_worker(app, any_broker=True, **ours.options_of_celery(options)) as worker:
        yield worker

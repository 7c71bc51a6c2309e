"""The same tasks under a real Celery."""

import os
import time
from pathlib import Path
from typing import Any

from celery import Celery

app = Celery("peer", broker=os.environ["PEER_BROKER"], backend=os.environ["PEER_BACKEND"])
app.conf.task_default_queue = os.environ["PEER_QUEUE"]
app.conf.broker_connection_retry_on_startup = True
# Four seconds otherwise, which a machine that stands still uses up.
app.conf.broker_connection_timeout = 60
# Our worker has declared the queue as it likes it: quorum, with a dead-letter queue.
app.conf.task_create_missing_queues = True
app.conf.worker_pool_restarts = bool(os.environ.get("PEER_POOL_RESTARTS"))
if "PEER_EVENTS" in os.environ:
    app.conf.event_exchange = os.environ["PEER_EVENTS"]


@app.task(name="sample.add")
def add(x: int, y: int) -> int:
    """The one that everybody knows."""
    return x + y


@app.task(name="sample.leave")
def leave(path: str, text: str = "ran") -> None:
    """Append a line to a file."""
    with Path(path).open("a") as file:
        file.write(f"{text}\n")


@app.task(name="sample.wait_for")
def wait_for(started: str, release: str) -> str:
    """Say that it runs, then wait until a file appears."""
    Path(started).touch()
    while not Path(release).exists():
        time.sleep(0.01)
    return "released"


@app.task(name="sample.fail")
def fail(message: str) -> None:
    """An ordinary error."""
    raise ValueError(message)


@app.task(name="sample.retry", bind=True, max_retries=3, default_retry_delay=1)
def retry(self: Any, path: str, succeed_at: int) -> int:
    """Fails until its `succeed_at`-th retry."""
    if self.request.retries < succeed_at:
        raise self.retry(exc=RuntimeError("not yet"))
    return int(self.request.retries)

"""Numbered tasks in all forms (plain, delayed, retried, a chain of three) that note each run; for our workers and for Celery's.

STAGED_FILE gets a line per run: number, stage, id of the task, whether the message was redelivered, the worker's kind.
"""

from __future__ import annotations

import os
import time
from typing import Any

IS_CELERY = "STAGED_CELERY" in os.environ
BROKER, QUEUE = os.environ.get("AMQTASK_BROKER_URL"), os.environ.get("STAGED_QUEUE", "staged")


def _application() -> Any:
    if IS_CELERY:
        from celery import Celery  # noqa: PLC0415 - only there

        return Celery("staged", broker=BROKER, backend=BROKER)
    from amqtask import AmqTask  # noqa: PLC0415 - only here

    return AmqTask("staged", backend=BROKER)


app = _application()
app.conf.task_default_queue = QUEUE
app.conf.task_ignore_result = True
# What our workers do by themselves; a Celery worker loses what it runs without it.
app.conf.task_acks_late = True
app.conf.task_reject_on_worker_lost = True
if os.environ.get("STAGED_LEASE"):
    app.conf.broker_transport_options = {"lease": float(os.environ["STAGED_LEASE"])}
if os.environ.get("STAGED_MASTER"):
    app.conf.broker_transport_options = {"master_name": os.environ["STAGED_MASTER"]}
    app.conf.result_backend_transport_options = {"master_name": os.environ["STAGED_MASTER"]}


def _note(task: Any, number: int, stage: str) -> None:
    request = task.request
    is_again = bool((request.delivery_info or {}).get("redelivered"))
    line = f"{number} {stage} {request.id} {is_again:d} {'celery' if IS_CELERY else 'amqtask'}\n"
    file = os.open(os.environ["STAGED_FILE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


@app.task(name="staged.run", bind=True)  # type: ignore[untyped-decorator]
def run(self: Any, number: int, stage: str, seconds: float = 0.01) -> None:
    """Take a while, then note it."""
    time.sleep(seconds)
    _note(self, number, stage)


@app.task(name="staged.again", bind=True, max_retries=1)  # type: ignore[untyped-decorator]
def again(self: Any, number: int) -> None:
    """Runs twice, by a retry."""
    _note(self, number, f"try-{self.request.retries}")
    if not self.request.retries:
        raise self.retry(countdown=0.5)

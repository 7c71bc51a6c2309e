"""An application whose topology an operator declares: two work queues, delays, a periodic task."""

from __future__ import annotations

import logging
from typing import Any

from amqtask import AmqTask, Queue, chain, chord, group

logger = logging.getLogger(__name__)

app = AmqTask("guarded", backend="rpc://")
app.conf.task_queues = [Queue("jobs"), Queue("mail")]
app.conf.task_default_queue = "jobs"
app.conf.beat_schedule = {"tick": {"task": "guarded.tick", "schedule": 1.0}}


@app.task(name="guarded.add", ignore_result=False)
def add(x: int, y: int) -> int:
    """A plain one."""
    return x + y


@app.task(name="guarded.total")
def total(numbers: list[int]) -> int:
    """A chord's body."""
    return sum(numbers)


@app.task(name="guarded.told")
def told(value: int) -> None:
    """The end of the flow."""
    logger.info("the flow ended with %d", value)


@app.task(name="guarded.tick")
def tick() -> None:
    """Sent by beat."""


@app.task(name="guarded.retry", bind=True, max_retries=1)
def retry(self: Any) -> int:
    """Succeeds at its second run."""
    if self.request.retries < 1:
        raise self.retry(countdown=0.2)
    return int(self.request.retries)


@app.task(name="guarded.flow")
def flow() -> str:
    """A chord within a chain, published by the worker."""
    parts = group(add.s(n, n) for n in range(3))
    chain(chord(parts, total.s()), told.s()).apply_async(ignore_result=True)
    return "sent"

"""Tasks that note who called them, for hostile messages and for good ones between them (integration.fuzz)."""

from __future__ import annotations

import json
import os
from typing import Any

from amqtask import AmqTask
from amqtask.execution.context import Context
from amqtask.signals import task_prerun, task_revoked
from integration.waiting import PATIENT

NOTES = os.environ.get("FUZZ_NOTES", os.devnull)

app = AmqTask("fuzzed", backend=os.environ.get("FUZZ_BACKEND", "rpc://"), **PATIENT)
app.conf.task_default_queue = os.environ.get("FUZZ_QUEUE", "fuzzed")
app.conf.accept_content = ["json", "yaml", "msgpack"]
app.conf.result_extended = True
app.conf.task_track_started = True
# A window that narrows (tasks have become slow) gives back what waits behind them, which older brokers count.
app.conf.worker_prefetch_multiplier = 3


def _note(kind: str, request: Any) -> None:
    """One line in one write, with the three places where a message may still say which one it was."""
    message: Any = request.request if isinstance(request, Context) else request
    headers = message.headers if isinstance(message.headers, dict) else {}
    names = [str(found)[:100] for found in (request.id, request.correlation_id, headers.get("fuzz"))]
    counted = "x-delivery-count" in headers or (kind == "good" and request.delivery_info["redelivered"])
    descriptor = os.open(NOTES, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, json.dumps([kind, *names, counted]).encode() + b"\n")
    finally:
        os.close(descriptor)


@task_prerun.connect
def on_prerun(task: Any, **_: Any) -> None:
    """Before the call, which may fail by its arguments alone."""
    _note("good" if task.name == "fuzzed.good" else "ran", task.request)


@task_revoked.connect
def on_revoked(request: Any, **_: Any) -> None:
    """Expired ones: dropped by rule."""
    _note("dropped", request)


@app.task(name="fuzzed.good")
def good(number: int) -> int:
    """An innocent one."""
    return number


@app.task(name="fuzzed.total")
def total(numbers: list[int]) -> int:
    """The body of an innocent chord."""
    return sum(numbers)


@app.task(name="recorded.add")
def add(*args: Any, **kwargs: Any) -> Any:
    """What the recordings call, most of them."""
    return sum(args)


@app.task(name="recorded.echo")
def echo(*args: Any, **kwargs: Any) -> Any:
    """The others."""
    return [args, kwargs]


@app.task(name="recorded.early", acks_late=False)
def early(*args: Any, **kwargs: Any) -> None:
    """Acknowledged before it runs."""


@app.task(name="recorded.fail")
def fail(*args: Any, **kwargs: Any) -> None:
    """Fails with what it was told."""
    raise ValueError(*args)


@app.task(name="recorded.again", bind=True, max_retries=1)
def again(self: Any, *args: Any, **kwargs: Any) -> None:
    """Wants to be run once more."""
    raise self.retry(countdown=0.1)


@app.task(name="recorded.coroutine")
async def coroutine(*args: Any, **kwargs: Any) -> Any:
    """A coroutine that returns what it got."""
    return [args, kwargs]

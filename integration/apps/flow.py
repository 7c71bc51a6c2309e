"""An application with unique and limited tasks; it writes down when each run begins and ends."""

from __future__ import annotations

import os
import time
from typing import Any

import redis

from amqtask import AmqTask, Breaker, Concurrency, Rate, Unique

app = AmqTask(
    "flow",
    broker=os.environ["FLOW_BROKER"],
    backend=os.environ["FLOW_STORE"],
    task_default_queue=os.environ["FLOW_QUEUE"],
)
app.conf.flow_store = os.environ["FLOW_STORE"]
app.conf.flow_lease = 3
if os.environ["FLOW_BROKER"].startswith("redis"):
    app.conf.broker_transport_options = {"lease": 4}
journal = redis.Redis.from_url(os.environ["FLOW_STORE"])
JOURNAL = f"journal-{os.environ['FLOW_QUEUE']}"


def note(what: str) -> None:
    """One line of the journal; those of a key are in their order."""
    journal.rpush(JOURNAL, what)


@app.task(name="flow.work", limits=[Concurrency(3), Concurrency(1, by="tenant")], acks_on_timeout=False)
def work(number: int, tenant: str, seconds: float = 0.02) -> int:
    """Says who it is while it runs."""
    note(f"begin {tenant} {number}")
    time.sleep(seconds)
    note(f"end {tenant} {number}")
    return number


@app.task(name="flow.part", limits=Concurrency(2), unique=Unique(by="number"), bind=True)
def part(self: Any, number: int, children: int = 0) -> list[Any]:
    """A part of a workflow; a number that is odd is tried again first. Its deadline, and those of its children's runs."""
    note(f"begin part {number}")
    time.sleep(0.02)
    note(f"end part {number}")
    if number % 2 and not self.request.retries:
        raise self.retry(countdown=0)
    for child in range(children):
        part.delay(1000 * (number + 1) + 2 * child)
    return [number, self.request.deadline and self.request.deadline.isoformat()]


@app.task(name="flow.paced", limits=Rate("20/s", burst=1))
def paced(number: int) -> float:
    """When it ran."""
    return time.time()


@app.task(name="flow.call", breaker=Breaker(failures=2, pause=0.5, counts=ConnectionError))
def call() -> str:
    """Calls what is down until somebody says that it is up."""
    note("call")
    if not journal.exists(f"{JOURNAL}-up"):
        raise ConnectionError("down")
    return "up"


@app.task(name="flow.once", unique=Unique(by="key", until="success", ttl=60), deadline=120, bind=True)
def once(self: object, key: str, seconds: float = 0.0) -> str:
    """One at a time."""
    note(f"begin {key} once")
    time.sleep(seconds)
    note(f"end {key} once")
    return key

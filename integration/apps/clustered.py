"""Tasks that leave a line each time they run, of every kind that the cluster suite counts; and a schedule each second."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from amqtask import AmqTask

QUEUE, RARE = "clustered", "clustered.rare"
FOLDER = Path(os.environ.get("CLUSTER_FOLDER", "."))

app = AmqTask(
    "clustered",
    backend="rpc://",
    task_default_queue=QUEUE,
    task_routes={"clustered.rarely": {"queue": RARE}},
    # A beat waits for the broker as long as a fault lasts; what is due then is caught up with.
    beat_catch_up_window=600.0,
    beat_schedule={"every second": {"task": "clustered.tick", "schedule": 1.0}},
)


def write(name: str, *fields: object) -> None:
    """One line in a file of the suite's folder, by one write call: lines of many processes do not mix."""
    file = os.open(FOLDER / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, ("\t".join(map(str, fields)) + "\n").encode())
    finally:
        os.close(file)


def _ran(scenario: str, kind: str, number: str) -> None:
    write("runs", scenario, kind, number, f"{time.time():.3f}", os.environ.get("CLUSTER_WORKER", ""))


@app.task(name="clustered.note")
def note(scenario: str, kind: str, number: str) -> str:
    """The ordinary one."""
    time.sleep(0.01)
    _ran(scenario, kind, number)
    return number


@app.task(name="clustered.rarely")
def rarely(scenario: str, number: str) -> None:
    """In a queue that is nearly always empty."""
    _ran(scenario, "rare", number)


@app.task(name="clustered.again", bind=True, max_retries=5)
def again(self: Any, scenario: str, number: str) -> None:
    """Retries twice, a second later each time."""
    if self.request.retries < 2:
        raise self.retry(countdown=1)
    _ran(scenario, "retry", number)


@app.task(name="clustered.gather")
def gather(values: list[str], scenario: str, number: str) -> int:
    """A chord's body."""
    _ran(scenario, "chord", number)
    return len(values)


@app.task(name="clustered.tick", bind=True, ignore_result=True)
def tick(self: Any) -> None:
    """What beat sends."""
    write("ticks", self.request.id, self.request.headers["periodic_task_due"])

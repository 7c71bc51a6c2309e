"""The tasks of the composition suite, for worker processes; and one whose death the chord tests cause."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from amqtask import AmqTask
from amqtask.testing.suites.compositions import define

app = define(AmqTask("flows", backend=os.environ.get("FLOWS_BACKEND", "rpc://")))
app.conf.task_default_queue = os.environ.get("FLOWS_QUEUE", "flows")
app.conf.result_chord_expires = 600
if "FLOWS_DELIVERY_LIMIT" in os.environ:
    app.conf.task_delivery_limit = int(os.environ["FLOWS_DELIVERY_LIMIT"])
if "FLOWS_CHAIN_SECONDS" in os.environ:
    app.conf.worker_chain_seconds = float(os.environ["FLOWS_CHAIN_SECONDS"])
if "FLOWS_FOLLOW_UPS" in os.environ:
    app.conf.worker_max_follow_ups = int(os.environ["FLOWS_FOLLOW_UPS"])


@app.task(name="slow_same")
def slow_same(value: int, seconds: float) -> int:
    """Gives chaos the time to happen."""
    time.sleep(seconds)
    return value


@app.task(name="leave_step")
def leave_step(steps: int, folder: str, name: str) -> int:
    """A step whose runs can be counted; it gives how many there have been with it."""
    with (Path(folder) / name).open("a") as file:
        file.write(f"{steps}\n")
    time.sleep(0.01)
    return steps + 1


@app.task(name="leave_total", ignore_result=True)
def leave_total(values: list[int], folder: str, name: str) -> None:
    """A body whose runs can be counted."""
    with (Path(folder) / name).open("a") as file:
        file.write(f"{sum(values)}\n")


@app.task(name="leave_mark")
def leave_mark(folder: str, name: str) -> str:
    """A task whose runs can be counted."""
    with (Path(folder) / name).open("a") as file:
        file.write("ran\n")
    return name


@app.task(name="retries_badly", bind=True)
def retries_badly(self: Any, folder: str, name: str) -> None:
    """Asks for a retry that no broker takes."""
    leave_mark(folder, name)
    raise self.retry(countdown=0, headers={"large": 200_000 * "x"})

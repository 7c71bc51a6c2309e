"""An application with a batch task whose calls may kill the process that they are in."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from amqtask import AmqTask, Batch, BatchCall

FOLDER = Path(os.environ["BATCHED_FOLDER"])
app = AmqTask(
    "batched",
    broker=os.environ["BATCHED_BROKER"],
    backend=f"db+sqlite:///{FOLDER}/results.db",
    task_default_queue=os.environ["BATCHED_QUEUE"],
    task_delivery_limit=2,
)
if os.environ["BATCHED_BROKER"].startswith("redis"):
    app.conf.broker_transport_options = {"lease": 4}


@app.task(name="batched.add", batch=Batch(size=20, seconds=0.5), reject_on_worker_lost=True)
def add(calls: list[BatchCall]) -> list[int]:
    """Notes each run; a call without arguments kills the process, a file the whole worker."""
    with (FOLDER / "runs").open("a") as runs:
        runs.write(f"{len(calls)}\n")
    if not all(call.args for call in calls):
        os.kill(os.getpid(), signal.SIGKILL)
    for wish in FOLDER.glob("kill the worker"):
        wish.unlink()
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    return [sum(call.args) for call in calls]

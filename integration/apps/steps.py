"""Steps of chains that leave a trace, and that a test holds, kills or fails."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from amqtask import AmqTask

app = AmqTask("steps", backend=os.environ.get("STEPS_BACKEND", "rpc://"))
app.conf.task_default_queue = os.environ.get("STEPS_QUEUE", "steps")
app.conf.worker_chain_seconds = float(os.environ.get("STEPS_SECONDS", "30"))


@app.task(bind=True, name="steps.note", default_retry_delay=0.1)
def note(self: Any, before: list[str], folder: str, name: str) -> list[str]:
    """Write `name` into the file `runs`, then do what a file in `folder` says: `hold-<name>` while it is there,
    `kill-<name>`, `fail-<name>` and `retry-<name>` once."""
    place = Path(folder)
    with (place / "runs").open("a") as file:
        file.write(f"{name}\n")
    for what in ("kill", "fail", "retry"):
        order = place / f"{what}-{name}"
        if order.exists():
            order.unlink()
            _do(self, what)
    while (place / f"hold-{name}").exists():
        time.sleep(0.01)
    return [*before, name]


def _do(task: Any, what: str) -> None:
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "retry":
        raise task.retry()
    raise ValueError("told to fail")

"""The application: one task, and two remote commands."""

import time
from typing import Any

from amqtask import AmqTask, control_command, inspect_command

app = AmqTask("remote", backend="rpc://")
app.conf.task_default_queue = "remote-control-example"


@app.task
def sleep(seconds: float) -> float:
    """Takes its time."""
    time.sleep(seconds)
    return seconds


@control_command(args=[("n", int)], signature="[N=1]")
def increase_prefetch_count(state: Any, n: int = 1) -> dict[str, str]:
    """Let the worker hold N more deliveries of each queue."""
    state.consumer.qos.increment_eventually(n)
    return {"ok": "prefetch count incremented"}


@inspect_command()
def current_prefetch_count(state: Any) -> dict[str, int]:
    """How many deliveries the worker may hold."""
    return {"prefetch_count": state.consumer.qos.value}

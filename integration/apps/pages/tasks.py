"""An application in one module."""

from __future__ import annotations

from amqtask import AmqTask

app = AmqTask("tasks")


@app.task(name="tasks.add")
def add(x: int, y: int) -> int:
    """Adds."""
    return x + y

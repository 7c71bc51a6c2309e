"""Tasks worth watching; the broker is `memory://`, so the example needs no RabbitMQ."""

from __future__ import annotations

from typing import Any

from amqtask import AmqTask

app = AmqTask("watched", broker="memory://", backend="cache+memory://", set_as_current=False)
app.conf.worker_send_task_events = True  # what `amqtask worker -E` does
app.conf.task_send_sent_event = True  # producers tell too


@app.task(name="resize", bind=True)
def resize(self: Any, pictures: int) -> str:
    """Tells how far it has come."""
    for number in range(pictures):
        self.send_event("task-progress", done=number + 1, of=pictures)
    return f"{pictures} pictures"


@app.task(name="upload")
def upload(name: str) -> None:
    """Fails."""
    raise ConnectionError(f"nobody takes {name}")

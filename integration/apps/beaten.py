"""A periodic task each second that leaves a line in a file for each run: its id, and when it was due (BEATS_FILE)."""

from __future__ import annotations

import os
from typing import Any

from amqtask import AmqTask

app = AmqTask(
    os.environ.get("BEATS_NAME", "beaten"),
    task_default_queue=os.environ.get("BEATS_QUEUE", "beaten"),
    # Not 30 seconds: a slow machine may take longer until a broker that was killed is back, or another beat leads.
    beat_catch_up_window=600.0,
    beat_schedule={
        "every second": {
            "task": "beaten.tick",
            "schedule": float(os.environ.get("BEATS_EVERY", "1")),
            "args": ("tick",),
        }
    },
)


@app.task(name="beaten.tick", bind=True)
def tick(self: Any, word: str) -> None:
    """One write call, so that lines of several processes do not mix."""
    headers = self.request.headers
    file = os.open(os.environ["BEATS_FILE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, f"{self.request.id}\t{headers['periodic_task_due']}\t{headers['periodic_task_name']}\n".encode())
    finally:
        os.close(file)

"""Numbered tasks that leave a line in a file each time they run (SOAK_FILE)."""

from __future__ import annotations

import os
import time

from amqtask import AmqTask

app = AmqTask("numbered", backend=os.environ.get("SOAK_BACKEND"))
app.conf.task_default_queue = os.environ.get("SOAK_QUEUE", "numbered")
if "SOAK_HISTORY" in os.environ:
    app.conf.history_url = os.environ["SOAK_HISTORY"]


@app.task(name="numbered.record")
def record(number: int, seconds: float = 0.01) -> int:
    """Take a while, then write the number; one write call, so that lines of many processes do not mix."""
    time.sleep(seconds)
    file = os.open(os.environ["SOAK_FILE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, f"{number} {time.time():.6f}\n".encode())
    finally:
        os.close(file)
    return number


@app.task(name="numbered.due")
def due(number: int, eta: float) -> None:
    """Write how many seconds after its ETA it ran."""
    file = os.open(os.environ["SOAK_FILE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, f"{number} {time.time() - eta:.6f}\n".encode())
    finally:
        os.close(file)

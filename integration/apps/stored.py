"""One task whose runs can be counted, with the result store that the environment names."""

from __future__ import annotations

import os
from pathlib import Path

from amqtask import AmqTask

app = AmqTask("stored", backend=os.environ["STORED_BACKEND"])
app.conf.task_default_queue = os.environ["STORED_QUEUE"]
app.conf.result_backend_always_retry = bool(os.environ.get("STORED_ALWAYS_RETRY"))
app.conf.result_extended = True


@app.task(name="stored.leave")
def leave(path: str) -> int:
    """Append a line; how many there are."""
    with Path(path).open("a") as file:
        file.write("ran\n")
    return len(Path(path).read_text().splitlines())

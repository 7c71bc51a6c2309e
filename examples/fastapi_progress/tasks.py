"""`amqtask -A examples.fastapi_progress.tasks worker -l info`."""

from __future__ import annotations

import time
from typing import Any

from amqtask import AmqTask

# With several processes of the service say redis://…: rpc:// hands results to the process that published the task.
app = AmqTask("reports", backend="rpc://", task_default_queue="fastapi-progress-example")


@app.task(bind=True)
def report(self: Any, pages: int, seconds: float = 0.2) -> str:
    """Takes `seconds` for each page, and says after each how far it is."""
    for page in range(1, pages + 1):
        time.sleep(seconds)
        self.update_state(state="PROGRESS", meta={"page": page, "pages": pages})
    if not pages:
        raise ValueError("a report has pages")
    return f"{pages} pages"

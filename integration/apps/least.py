"""An application whose users may declare nothing: an operator made its topology."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from amqtask import AmqTask
from integration.waiting import PATIENT

app = AmqTask("least", task_default_queue="operated", worker_enable_remote_control=False, **PATIENT)


@app.task(name="least.retried", bind=True, ignore_result=True)
def retried(self: Any, name: str) -> None:
    """Leaves a file, at its second run."""
    if not self.request.retries:
        raise self.retry(countdown=1)
    (Path(os.environ["LEAST_FOLDER"]) / name).touch()

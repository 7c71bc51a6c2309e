"""Tasks of which some tenants have many, on a queue of a test's own; each run notes its tenant."""

from __future__ import annotations

import os
from pathlib import Path

from amqtask import AmqTask

app = AmqTask("fair", broker=os.environ["FAIR_BROKER"], set_as_current=False)
app.conf.update(task_default_queue=os.environ["FAIR_QUEUE"], task_fair_shards=4, worker_disable_prefetch=True)


@app.task(name="fair.serve", fair_by="tenant", ignore_result=True)
def serve(tenant: str, journal: str) -> None:
    """Append the tenant to a file."""
    with Path(journal).open("a") as file:
        file.write(f"{tenant}\n")

"""The demo's application: one task that waits for the network."""

from __future__ import annotations

import urllib.request

from amqtask import AmqTask

# The broker comes from AMQTASK_BROKER_URL; results travel back over it (rpc://).
app = AmqTask("demo", backend="rpc://")
app.conf.task_routes = {"examples.demo.tasks.*": {"queue": "cma_queue"}}


@app.task
def fetch(url: str) -> int:
    """Fetch a page and return its size in bytes."""
    with urllib.request.urlopen(url, timeout=10) as response:
        return len(response.read())

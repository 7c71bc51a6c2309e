"""The demo's application: one task that waits for the network."""

from __future__ import annotations

import os
import urllib.request

from amqtask import AmqTask

# On a broker that others use the demo takes a queue of its own; see __main__.
QUEUE = os.environ.get("AMQTASK_DEMO_QUEUE", "cma_queue")

# The broker comes from AMQTASK_BROKER_URL; results travel back over it (rpc://), or go where AMQTASK_RESULT_BACKEND says.
app = AmqTask("demo", backend=os.environ.get("AMQTASK_RESULT_BACKEND", "rpc://"))
app.conf.task_routes = {"examples.demo.tasks.*": {"queue": QUEUE}}


@app.task
def fetch(url: str) -> int:
    """Fetch a page and return its size in bytes."""
    with urllib.request.urlopen(url, timeout=10) as response:
        return len(response.read())

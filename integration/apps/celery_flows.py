"""The composition suite under a real Celery: the same source, with Celery's canvas in place of ours."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from celery import Celery

app = Celery("peer", broker=os.environ["PEER_BROKER"], backend=os.environ["PEER_BACKEND"])
app.conf.task_default_queue = os.environ["PEER_QUEUE"]
app.conf.broker_connection_retry_on_startup = True
# Four seconds otherwise, which a machine that stands still uses up.
app.conf.broker_connection_timeout = 60

SUITE = Path(__file__).resolve().parents[2] / "amqtask" / "testing" / "suites" / "compositions.py"
suite: dict[str, Any] = {"__name__": "celery_compositions"}
exec(  # the very text that ours is tested with
    SUITE.read_text().replace("from amqtask.canvas import", "from celery import"),
    suite,
)
suite["define"](app)


def run_all(names: list[str]) -> None:
    """Publish each composition; print a line of JSON with its value or its error."""
    tasks = suite["Tasks"](app)
    for name in names:
        build = (suite["COMPOSITIONS"].get(name) or suite["ERRORS"].get(name))[0]
        try:
            found: Any = {"value": build(tasks).apply_async().get(timeout=60)}
        except Exception as error:
            found = {"error": type(error).__name__, "text": str(error)}
        print(json.dumps([name, found]))
        sys.stdout.flush()

"""The sample's tasks and two with time limits, which only some pools can keep."""

from __future__ import annotations

import time

from amqtask.exceptions import SoftTimeLimitExceeded
from integration.apps.sample import app


@app.task(name="sample.ignore_soft_limit", soft_time_limit=0.5, time_limit=2)
def ignore_soft_limit() -> None:
    """Swallows its soft limit and goes on."""
    while True:
        try:
            time.sleep(60)
        except SoftTimeLimitExceeded:
            continue


# Long enough to reach the `try`, even when the machine stands still in front of it.
@app.task(name="sample.heed_soft_limit", soft_time_limit=3, time_limit=60)
def heed_soft_limit() -> str:
    """Cleans up at its soft limit."""
    try:
        time.sleep(60)
    except SoftTimeLimitExceeded:
        return "cleaned up"
    return "too late"

"""Periodic tasks: by decorator, by setting, by crontab."""

import json
import os
import time
from datetime import timedelta
from pathlib import Path

from amqtask import Celery
from amqtask.schedules import crontab, schedule

FOLDER = Path(os.environ["GUIDE_FOLDER"])
app = Celery("periodic")
app.conf.task_default_queue = "periodic-" + os.environ["GUIDE"]
app.conf.beat_schedule = {
    "add twice a second": {"task": "periodic.write", "schedule": 0.5, "args": ("by setting",)},
    "with a timedelta": {"task": "periodic.write", "schedule": timedelta(seconds=1), "kwargs": {"text": "timedelta"}},
    "on mondays": {"task": "periodic.write", "schedule": crontab(hour=7, minute=30, day_of_week=1), "args": ("never",)},
}
app.conf.timezone = "UTC"


@app.on_after_configure.connect
def setup_periodic_tasks(sender, **kwargs):
    sender.add_periodic_task(0.5, write.s("by decorator"), name="by decorator")
    sender.add_periodic_task(crontab(hour=0, minute=0, day_of_month=31, month_of_year=2), write.s("never"))


@app.task(name="periodic.write")
def write(text):
    with (FOLDER / "written").open("a") as file:
        file.write(text + "\n")


def written():
    path = FOLDER / "written"
    return path.read_text().splitlines() if path.exists() else []


def main():
    wanted, end = {"by setting", "timedelta", "by decorator"}, time.monotonic() + 30
    while any(written().count(text) < 2 for text in wanted) and time.monotonic() < end:
        time.sleep(0.1)
    found = {"written": sorted(set(written()))}
    every = crontab(minute="*/15", hour="8-17", day_of_week="mon-fri")
    found["minutes"] = sorted(every.minute)
    found["hours"] = sorted(every.hour)
    found["days"] = sorted(every.day_of_week)
    now = app.now()
    found["due"] = [schedule(10).is_due(now - timedelta(seconds=20)).is_due, schedule(3600).is_due(now).is_due]
    found["equal"] = crontab(minute=5) == crontab(minute=5)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""A schedule in the configuration, and one in code."""

from __future__ import annotations

from typing import Any

from amqtask import AmqTask, crontab

app = AmqTask("periodic-example", timezone="Europe/Berlin")
app.conf.task_default_queue = "periodic-example"
app.conf.worker_redirect_stdouts = False
app.conf.beat_schedule = {
    "look": {"task": "examples.periodic.tasks.look", "schedule": 1.0, "options": {"expires": 60}},
}


@app.task(bind=True)
def look(self: Any) -> None:
    """Say when this run was due: beat puts that into a header."""
    print(self.request.headers["periodic_task_due"], flush=True)


@app.task
def report(kind: str) -> str:
    """Once a day, for one."""
    return f"the {kind} report"


@app.on_after_configure.connect
def set_up(sender: AmqTask, **_: Any) -> None:
    """As in Celery."""
    sender.add_periodic_task(crontab(hour=7, minute=30, day_of_week="mon-fri"), report.s("daily"), name="daily report")
    sender.add_periodic_task(crontab(0, 0, day_of_month=1), report.s("monthly").set(queue="reports"))

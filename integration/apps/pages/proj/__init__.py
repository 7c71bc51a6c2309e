"""The project that the how-to pages speak of, as far as their lines need it (integration/test_pages.py)."""

from __future__ import annotations

from pathlib import Path

from amqtask import AmqTask, Queue

app = AmqTask("proj", include=[f"proj.{path.stem}" for path in Path(__file__).parent.glob("[!_]*.py")])
app.conf.task_queues = [Queue("amqtask"), Queue("cma_queue"), Queue("reports")]
app.conf.task_routes = {"crawler.*": {"queue": "cma_queue"}, "reports.*": {"queue": "reports"}}
app.conf.task_history = app.conf.task_history_arguments = True
# `amqtask console --host 0.0.0.0` wants to know who may come.
app.conf.console_user_header = "X-Forwarded-User"

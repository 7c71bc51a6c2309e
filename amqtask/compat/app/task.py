"""`celery.app.task`."""

from amqtask.execution.context import Context
from amqtask.task import Task

__all__ = ["Context", "Task"]

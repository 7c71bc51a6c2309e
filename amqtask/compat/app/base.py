"""`celery.app.base`."""

from amqtask.app import AmqTask
from amqtask.app import AmqTask as Celery

__all__ = ["AmqTask", "Celery"]

"""`celery.app.log`."""

from amqtask.log import TaskFormatter

__all__ = ["TaskFormatter"]

"""`celery.app.registry`."""

from amqtask.registry import TaskRegistry

__all__ = ["TaskRegistry"]

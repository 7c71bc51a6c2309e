"""`celery.app.registry`."""

from amqtask.client.registry import TaskRegistry

__all__ = ["TaskRegistry"]

"""`celery.app.events`."""

from amqtask.events.client import Events

__all__ = ["Events"]

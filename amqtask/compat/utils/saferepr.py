"""`celery.utils.saferepr`."""

from amqtask.protocol.task import saferepr

__all__ = ["saferepr"]

"""`celery.utils.dispatch`."""

from amqtask.signals import Signal

__all__ = ["Signal"]

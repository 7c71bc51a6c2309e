"""`celery.utils.graph`."""

from amqtask.graph import DependencyGraph

__all__ = ["DependencyGraph"]

"""`celery.utils.graph`."""

from amqtask.results import DependencyGraph

__all__ = ["DependencyGraph"]

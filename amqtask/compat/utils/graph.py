"""`celery.utils.graph`."""

from amqtask.results.graph import DependencyGraph

__all__ = ["DependencyGraph"]

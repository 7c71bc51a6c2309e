"""`celery.worker.request`."""

from amqtask.execution.request import Request

__all__ = ["Request"]

"""`celery.contrib.abortable`: tasks that look now and then whether they are to stop.

`result.abort()` stores the state ABORTED; the task asks `self.is_aborted()`. The result store must be one that the task can
read: not `rpc://`.
"""

from __future__ import annotations

from typing import Any

from amqtask.protocol.result import ResultMessage
from amqtask.result import AsyncResult
from amqtask.task import Task

__all__ = ["ABORTED", "AbortableAsyncResult", "AbortableTask"]

ABORTED = "ABORTED"


class AbortableAsyncResult(AsyncResult[Any]):
    """A result whose task can be asked to stop."""

    def is_aborted(self) -> bool:
        """Whether it was."""
        return bool(self.state == ABORTED)

    def abort(self) -> None:
        """Ask the task to stop. Raises: BackendNotConfigured, BackendUnreachable."""
        self.result_store.store(ResultMessage(self.id, ABORTED))


class AbortableTask(Task[Any, Any]):
    """`@app.task(bind=True, base=AbortableTask)`."""

    abstract = True

    def AsyncResult(self, task_id: str, **kwargs: object) -> AbortableAsyncResult:
        """The result of an earlier call."""
        return AbortableAsyncResult(task_id, app=self.app, task_name=self.name)

    def is_aborted(self, **kwargs: object) -> bool:
        """Whether the call that runs (or `task_id`) is to stop."""
        task_id = str(kwargs.get("task_id", self.request.id))
        return self.AsyncResult(task_id).is_aborted()

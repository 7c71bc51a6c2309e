"""`celery._state`: which application and which task are current."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from amqtask.execution.context import current_context
from amqtask.ground.current import current_app, note_shared, set_current
from amqtask.task import current_task

if TYPE_CHECKING:
    from amqtask.app import AmqTask

__all__ = [
    "_task_stack", "connect_on_app_finalize", "current_app", "current_task", "get_current_app", "get_current_task",
    "get_current_worker_task", "set_default_app",
]  # fmt: skip

set_default_app = set_current


def get_current_app() -> AmqTask:
    """The current application."""
    app: AmqTask = current_app()
    return app


def get_current_task() -> Any:
    """The task that runs here; None where none runs."""
    context = current_context()
    return None if context is None or context.task is None else current_app().tasks[context.task]


get_current_worker_task = get_current_task


def connect_on_app_finalize(callback: Callable[[AmqTask], object]) -> Callable[[AmqTask], Any]:
    """Call it with each application that is finalised."""
    note_shared(callback)
    return callback


class _TaskStack:
    """Only what runs is known: a stack of one."""

    @property
    def top(self) -> Any:
        """The task that runs here."""
        return get_current_task()

    @property
    def stack(self) -> list[Any]:
        """That task, if there is one."""
        top = self.top
        return [] if top is None else [top]


_task_stack = _TaskStack()

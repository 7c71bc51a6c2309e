"""`celery.app.trace`: our executor needs no optimising, so there is nothing to set up or to take back."""

from __future__ import annotations

from typing import Any


def setup_worker_optimizations(app: Any, hostname: str | None = None) -> None:
    """Nothing to do."""


def reset_worker_optimizations(app: Any = None) -> None:
    """Nothing to do."""


def task_has_custom(task: Any, attr: str) -> bool:
    """Whether a task's class has an attribute of its own in place of Task's."""
    from amqtask.task import Task

    return getattr(type(task), attr, None) is not getattr(Task, attr, None)

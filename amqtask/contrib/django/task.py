"""DjangoTask, at the path where Celery has it (celery/contrib/django/task.py)."""

from __future__ import annotations

from typing import ParamSpec, TypeVar

from amqtask.task import Task

P = ParamSpec("P")
R = TypeVar("R")


class DjangoTask(Task[P, R]):
    """For `base=DjangoTask`; every Task has `delay_on_commit` and `apply_async_on_commit`."""

    abstract = True

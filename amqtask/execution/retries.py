"""Automatic retries: which errors, and after how many seconds (Celery's autoretry_for and retry_backoff)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amqtask.exceptions import Ignore, Reject, Retry
from amqtask.ground.backoff import exponential_backoff

if TYPE_CHECKING:
    from amqtask.execution.contract import TaskLike


def wants_retry(task: TaskLike, error: BaseException) -> bool:
    """Whether the task's `autoretry_for` asks for another run after this error."""
    if not task.autoretry_for or isinstance(error, (Retry, Ignore, Reject)):
        return False
    return isinstance(error, task.autoretry_for) and not isinstance(error, task.dont_autoretry_for or ())


def retry_options(task: TaskLike, retries: int) -> dict[str, object]:
    """The keyword arguments for `task.retry`."""
    options: dict[str, object] = dict(task.retry_kwargs or {})
    if task.retry_backoff:
        options["countdown"] = exponential_backoff(
            retries, factor=float(task.retry_backoff), maximum=task.retry_backoff_max, full_jitter=task.retry_jitter
        )
    return options

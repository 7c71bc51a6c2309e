"""What a worker does for flow control beside running tasks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from amqtask.ground.printable import bounded_logger
from amqtask.pool import limits_of

if TYPE_CHECKING:
    from amqtask.execution.contract import TaskLike
    from amqtask.pool import Pool

logger = bounded_logger("amqtask.worker")


def warn_of_deadlines(tasks: Iterable[TaskLike], pool_class: type[Pool]) -> None:
    """A deadline is looked at before the start in every pool; it ends a running task only where there are soft limits."""
    unenforced = sorted(
        task.name
        for task in tasks
        if task.deadline is not None and "soft" not in limits_of(pool_class, is_async=task.is_async)
    )
    if unenforced:
        logger.warning(
            "the %s pool has no soft time limits for %s: their deadlines are looked at before they start, and do not end them",
            pool_class.name,
            ", ".join(unenforced),
        )

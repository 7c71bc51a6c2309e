"""Whether a task may wait for other tasks' results: only where `allow_join_result` says so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from amqtask.execution.context import current_context

_join_allowed: ContextVar[bool] = ContextVar("amqtask_join_allowed", default=False)


@contextlib.contextmanager
def allow_join_result() -> Iterator[None]:
    """Let the block wait for results inside a task."""
    token = _join_allowed.set(True)
    try:
        yield
    finally:
        _join_allowed.reset(token)


def check_not_in_task(disable_sync_subtasks: bool) -> None:
    """Raises: RuntimeError where waiting could take the slot that the awaited task needs."""
    context = current_context()
    if disable_sync_subtasks and context is not None and not context.is_eager and not _join_allowed.get():
        raise RuntimeError(
            "Never call result.get() within a task: it occupies a slot that the awaited task may need. Use a chain or a "
            "callback, or say disable_sync_subtasks=False if you know that it cannot deadlock."
        )

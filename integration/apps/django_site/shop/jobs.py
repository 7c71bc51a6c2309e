"""Tasks of Django's own kind (django.tasks, or its backport before Django 6)."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from django.contrib.auth.models import Group

if TYPE_CHECKING:
    from django.tasks import task
else:
    try:
        from django.tasks import task
    except ImportError:
        from django_tasks import task


@task
def add(first: Any, second: Any) -> Any:
    """What a task returns is what JSON makes of it."""
    return first + second


@task(priority=50, queue_name="slow")
def slow() -> str:
    """On a queue of its own, before others."""
    return "done"


@task
async def order(name: str) -> int:
    """A coroutine that uses the database."""
    made = await Group.objects.acreate(name=name)
    return int(made.pk)


@task
def fail() -> None:
    """Fails."""
    raise ValueError("no such customer")


@task
def no_json() -> datetime:
    """Returns what JSON has not."""
    return datetime(2026, 1, 1)


@task(takes_context=True)
def about(context: Any, note: str = "") -> list[Any]:
    """What a task knows of its own call."""
    result = context.task_result
    called = result.task
    return [
        result.id,
        context.attempt,
        result.status.value,
        called.queue_name,
        called.priority,
        result.args,
        result.kwargs,
        note,
    ]


@task(takes_context=True)
def third_time(context: Any) -> int:
    """Succeeds when it is run for the third time."""
    if context.attempt < 3:
        raise ConnectionError(f"attempt {context.attempt}")
    return int(context.attempt)

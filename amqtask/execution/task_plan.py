"""TaskPlan: attributes and options of a task that the executor looks up once, not per run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import NotRegistered
from amqtask.ground.near_names import LONGEST_COMPARED, did_you_mean
from amqtask.ground.plugins import plugins
from amqtask.ground.printable import printable

if TYPE_CHECKING:
    from amqtask.execution.contract import TaskLike

# Wraps the coroutine of a task in another one that awaits it.
Wrapper = Callable[[Coroutine[Any, Any, Any]], Coroutine[Any, Any, Any]]


class TaskPlan:
    """One task, ready to be called. `wants_result` and `track_started` are False without a result store."""

    __slots__ = ("call", "hooks", "is_async", "task", "track_started", "wants_result")

    def __init__(self, task: TaskLike, *, has_store: bool, wrapper: Wrapper | None = None) -> None:
        self.task = task
        # A class that overrides __call__ is called; for all others `run` is called directly.
        self.call: Callable[..., Any] = task.__call__ if "__call__" in task.overridden_hooks else task.run
        self.is_async = task.is_async
        if not self.is_async and (traced := plugins().celery_tracer(task)) is not None:
            self.call = traced
        if inspect.isasyncgenfunction(task.run):
            self.call, self.is_async = _no_async_generator(task.name), False
        if wrapper is not None and self.is_async:
            self.call = _in(wrapper, self.call)
        self.hooks = task.overridden_hooks
        self.track_started = task.track_started and has_store
        self.wants_result = has_store and not task.ignore_result


def plan_for(tasks: Mapping[str, TaskLike], name: str, *, has_store: bool, wrapper: Wrapper | None = None) -> TaskPlan:
    """The plan of a task. Raises: NotRegistered, with the nearest name."""
    task = tasks.get(name)
    if task is None:
        raise NotRegistered(
            f"no task {printable(name, LONGEST_COMPARED)!r} is registered in this worker.{did_you_mean(name, tasks)} "
            "Is the module that defines it imported (include, autodiscover_tasks)?"
        )
    return TaskPlan(task, has_store=has_store, wrapper=wrapper)


def _in(wrapper: Wrapper, call: Callable[..., Any]) -> Callable[..., object]:
    return lambda *args, **kwargs: wrapper(call(*args, **kwargs))


def _no_async_generator(name: str) -> Callable[..., object]:
    def refuse(*args: object, **kwargs: object) -> object:
        raise TypeError(f"task {name} is an async generator (async def with yield), which has no result; return a list")

    return refuse

"""`celery.app.trace`: our executor needs no optimising, so there is nothing to set up or to take back.

Tracing libraries replace `build_tracer` to have each run of a task in a call of theirs, and a task's `run` on that occasion.
What is in its place is asked once for each task, when a process runs that for the first time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple


def setup_worker_optimizations(app: object, hostname: str | None = None) -> None:
    """Nothing to do."""


def reset_worker_optimizations(app: object = None) -> None:
    """Nothing to do."""


def task_has_custom(task: Any, attr: str) -> bool:
    """Whether a task's class has an attribute of its own in place of Task's."""
    from amqtask.task import Task

    return getattr(type(task), attr, None) is not getattr(Task, attr, None)


class trace_ok_t(NamedTuple):
    """The end of a run: the value, or the exception, which `info` is, too."""

    retval: Any
    info: BaseException | None
    runtime: float
    retstr: str


def build_tracer(name: str, task: Any, *_: object, **__: object) -> Callable[..., Any]:
    """What runs a task: a function that takes (id, args, kwargs, request) and raises nothing."""

    def trace_task(uuid: str | None, args: Any, kwargs: Any, request: object = None) -> trace_ok_t:
        began = time.perf_counter()
        # Looked up at each run: a library may have replaced it since.
        call = task if task_has_custom(task, "__call__") else task.run
        try:
            value, error = call(*args, **kwargs), None
        except BaseException as raised:  # noqa: BLE001 - `replaced_tracer` raises it on the other side of the library
            value = error = raised
        return trace_ok_t(value, error, time.perf_counter() - began, "")

    return trace_task


_OURS = build_tracer


def replaced_tracer(task: Any) -> Callable[..., Any] | None:
    """The call of a task in what a library has put in the place of `build_tracer`; None if none has."""
    if build_tracer is _OURS:
        return None
    trace_task = build_tracer(task.name, task, app=task.app)

    def call(*args: object, **kwargs: object) -> object:
        request = task.request
        headers = {**request.request.headers, "headers": request.headers}
        ended = trace_task(request.id, args, kwargs, headers)
        if ended.info is not None:
            raise ended.info
        return ended.retval

    return call

"""TaskPlan: attributes and options of a task that the executor looks up once, not per run; what the task's hooks and receivers of
signals are told of a run; and `pydantic=True`."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from amqtask import signals, states
from amqtask.exceptions import ConfigurationError, NotRegistered
from amqtask.execution.context import current
from amqtask.execution.request import HIDDEN
from amqtask.ground.plugins import LONGEST_COMPARED, did_you_mean, plugins
from amqtask.ground.printable import bounded_logger, printable
from amqtask.protocol.result import ENDS
from amqtask.protocol.serialization import is_private

if TYPE_CHECKING:
    from amqtask.exceptions import Retry
    from amqtask.execution.context import Context
    from amqtask.execution.contract import TaskLike
    from amqtask.execution.request import ErrorInfo, Request
    from amqtask.ground.shapes import KeywordDict, Keywords


logger = bounded_logger("amqtask.execution")

# Wraps the coroutine of a task in another one that awaits it.
Wrapper = Callable[[Coroutine[Any, Any, Any]], Coroutine[Any, Any, Any]]


class TaskPlan:
    """One task, ready to be called. `wants_result` and `track_started` are False without a result store."""

    # Of a task with `batch`: takes a list of calls.
    batch_call: Callable[..., Any]
    __slots__ = ("batch_call", "call", "hooks", "is_async", "task", "track_started", "wants_result")

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


# -- what hooks and receivers of signals are told


def tell_start(plan: TaskPlan, request: Request, context: Context) -> None:
    """Before the run, of which it is a part: an error ends it."""
    if signals.task_prerun:
        signals.task_prerun.send(
            sender=plan.task, task_id=request.id, task=plan.task, args=context.args, kwargs=context.kwargs
        )
    if "before_start" in plan.hooks:
        plan.task.before_start(request.id, context.args, context.kwargs)


def tell(what: Callable[..., None], *arguments: object) -> None:
    """Call one of the functions below. A receiver that wants to end the process (`sys.exit`) does not change how it ended."""
    try:
        what(*arguments)
    except ENDS as error:
        logger.error("a receiver of a signal raised %s; the process goes on", type(error).__name__)


def tell_success(plan: TaskPlan, request: Request, context: Context, value: object, runtime: float) -> None:
    """It has returned."""
    if "on_success" in plan.hooks:
        _hook(plan.task.on_success, value, request.id, context.args, context.kwargs)
    if signals.task_success:
        signals.task_success.send(sender=plan.task, result=value, runtime=runtime)
    if "after_return" in plan.hooks:
        _hook(plan.task.after_return, states.SUCCESS, value, request.id, context.args, context.kwargs, None)
    if signals.task_postrun:
        tell_postrun(plan, request, context, states.SUCCESS, value)


def tell_failure(plan: TaskPlan, request: Request, context: Context, error: BaseException, info: ErrorInfo) -> None:
    """It has failed for good."""
    task, args, kwargs = plan.task, context.args, context.kwargs
    if "on_failure" in plan.hooks:
        _hook(task.on_failure, error, request.id, args, kwargs, info)
    if signals.task_failure:
        signals.task_failure.send(
            sender=task, task_id=request.id, exception=error, args=args, kwargs=kwargs,
            traceback=error.__traceback__, einfo=info,
        )  # fmt: skip
    if "after_return" in plan.hooks:
        _hook(task.after_return, states.FAILURE, error, request.id, args, kwargs, info)


def tell_retry(plan: TaskPlan, request: Request, context: Context, retry: Retry, info: ErrorInfo) -> None:
    """It runs again."""
    if "on_retry" in plan.hooks:
        _hook(plan.task.on_retry, retry.exc or retry, request.id, context.args, context.kwargs, info)
    if signals.task_retry:
        signals.task_retry.send(sender=plan.task, request=context, reason=retry, einfo=info)


def tell_postrun(plan: TaskPlan, request: Request, context: Context, state: str, value: object) -> None:
    """It has ended, whatever came of it."""
    signals.task_postrun.send(
        sender=plan.task, task_id=request.id, task=plan.task, args=context.args, kwargs=context.kwargs,
        retval=value, state=state,
    )  # fmt: skip


def _hook(hook: Callable[..., object], *arguments: object) -> None:
    """Call a hook. An error of it is logged, and does not change how the task ended."""
    try:
        hook(*arguments)
    except (Exception, *ENDS) as error:
        name, context = getattr(hook, "__qualname__", hook), current.get()
        request = context.request if context is not None else None
        if request is not None and is_private(request.content_type):
            logger.error("hook %s failed: %s %s", name, type(error).__name__, HIDDEN)
        else:
            logger.exception("hook %s failed", name)


# -- `pydantic=True`: arguments annotated with models arrive as models, a returned model leaves as plain data


def pydantic_wrapper(
    function: Callable[..., object],
    *,
    strict: bool = False,
    context: KeywordDict | None = None,
    dump_kwargs: KeywordDict | None = None,
) -> Callable[..., Any]:
    """The function with its model parameters validated from plain data (Celery's pydantic task option).

    Raises: ConfigurationError when pydantic is not installed.
    """
    try:
        from pydantic import BaseModel
    except ImportError as error:
        raise ConfigurationError('pydantic=True needs a library: pip install "amqtask[pydantic]"') from error
    parameters = inspect.signature(function)
    hints = {name: hint for name, hint in typing.get_type_hints(function).items() if name != "return"}
    models = {name: model for name, hint in hints.items() if (model := _model_of(hint, BaseModel)) is not None}

    def validated(args: Sequence[object], kwargs: Keywords) -> inspect.BoundArguments:
        bound = parameters.bind(*args, **kwargs)
        for name, model in models.items():
            if bound.arguments.get(name) is not None and not isinstance(bound.arguments[name], model):
                bound.arguments[name] = model.model_validate(bound.arguments[name], strict=strict, context=context)
        return bound

    def dumped(value: object) -> object:
        return value.model_dump(**(dump_kwargs or {"mode": "json"})) if isinstance(value, BaseModel) else value

    def as_data(args: Sequence[object], kwargs: Keywords) -> tuple[Sequence[object], Keywords]:
        return [dumped(value) for value in args], {name: dumped(value) for name, value in kwargs.items()}

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def call_async(*args: object, **kwargs: object) -> Any:
            bound = validated(args, kwargs)
            return dumped(await function(*bound.args, **bound.kwargs))

        call_async.as_data = as_data  # type: ignore[attr-defined]
        return call_async

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> Any:
        bound = validated(args, kwargs)
        return dumped(function(*bound.args, **bound.kwargs))

    # For callers, whose arguments may be models too.
    call.as_data = as_data  # type: ignore[attr-defined]
    return call


def _model_of(hint: object, base: type) -> Any:
    """The model that an annotation names, alone or beside None; None where it names none."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        alternatives = [part for part in typing.get_args(hint) if part is not type(None)]
        hint = alternatives[0] if len(alternatives) == 1 else None
    return hint if isinstance(hint, type) and issubclass(hint, base) else None

"""What a task's hooks and the receivers of signals are told of its run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from amqtask import signals, states
from amqtask.execution.context import current
from amqtask.execution.request import HIDDEN
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.result import ENDS
from amqtask.protocol.serialization import is_private

if TYPE_CHECKING:
    from amqtask.exceptions import Retry
    from amqtask.execution.context import Context
    from amqtask.execution.request import ErrorInfo, Request
    from amqtask.execution.task_plan import TaskPlan

logger = bounded_logger("amqtask.execution")


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

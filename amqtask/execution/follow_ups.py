"""What is to be published after a task: callbacks and the next step of a chain, or errbacks; complete messages."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amqtask.execution.context import Context
    from amqtask.execution.contract import Composer, TaskLike
    from amqtask.message import Message

logger = logging.getLogger("amqtask.execution")


class FollowUps:
    """Composes messages through the app; publishes nothing."""

    def __init__(self, tasks: Mapping[str, TaskLike], composer: Composer) -> None:
        self._tasks = tasks
        self._composer = composer

    def of_success(self, context: Context, value: Any) -> tuple[Message, ...]:
        """Raises what composing raises (a callback with arguments that cannot be encoded)."""
        embed = context.embed
        messages: list[Message] = []
        for callback in embed.get("callbacks") or ():
            messages += self._composer.compose_next(callback, value, context, [])
        chain = embed.get("chain")
        if chain:
            # Reversed: the next step is the last element (celery-protocol: `chain`).
            messages += self._composer.compose_next(chain[-1], value, context, list(chain[:-1]))
        return tuple(messages)

    def of_failure(
        self, context: Context, error: BaseException, trace: str, *, may_run: bool = True
    ) -> tuple[Message, ...]:
        """Errbacks, as Celery calls them: one that takes more than one argument and is registered here is called here
        with (request, exc, traceback), any other is published with the failed task's id.

        `may_run` is False where no user code must run (the worker's I/O loop).
        """
        messages: list[Message] = []
        for errback in context.embed.get("errbacks") or ():
            try:
                task = self._tasks.get(errback["task"])
                if task is None or not _takes_the_error(task):
                    messages += self._composer.compose_next(errback, context.id, context, [])
                elif may_run:
                    _call(task, errback, context, error, trace)
                else:
                    logger.warning("errback %s of lost task %s[%s] was not called", task.name, context.task, context.id)
            except Exception:
                logger.exception("errback %s of task %s[%s] failed", errback, context.task, context.id)
        return tuple(messages)


def _call(task: TaskLike, errback: Mapping[str, Any], context: Context, error: BaseException, trace: str) -> None:
    own = () if errback.get("immutable") else (context, error, trace)
    task(*own, *(errback.get("args") or ()), **(errback.get("kwargs") or {}))


def _takes_the_error(task: TaskLike) -> bool:
    # Bound and async ones go by message, as in Celery: they may retry, or need a loop.
    if task.is_async or inspect.ismethod(task.run):
        return False
    try:
        kinds = [parameter.kind for parameter in inspect.signature(task.run).parameters.values()]
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return inspect.Parameter.VAR_POSITIONAL in kinds or sum(kind in positional for kind in kinds) > 1

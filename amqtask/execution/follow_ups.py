"""The messages after a task: callbacks, the next step of a chain, its part of a chord, or errbacks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING

from amqtask import states
from amqtask.execution.chords import NOTHING, Chords, FollowUps
from amqtask.execution.context import current_context
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.result import ResultMessage

if TYPE_CHECKING:
    from amqtask.execution.context import Context
    from amqtask.execution.contract import ChordStore, Composer, TaskLike
    from amqtask.execution.results import Results
    from amqtask.ground.shapes import SignatureFields
    from amqtask.protocol.message import Message

logger = bounded_logger("amqtask.execution")


class FollowUpComposer:
    """Composes messages through the app; publishes nothing."""

    def __init__(
        self,
        tasks: Mapping[str, TaskLike],
        composer: Composer,
        *,
        results: Results | None = None,
        chord_store: ChordStore | None = None,
        serializer: str = "json",
    ) -> None:
        self._tasks = tasks
        self._composer = composer
        self.chords = Chords(
            composer, results=results, store=chord_store, serializer=serializer, errbacks=self._errbacks
        )

    def of_success(self, context: Context, value: object) -> FollowUps:
        """The callbacks, the next step and the part of a chord. Raises: the errors of composing (a callback whose arguments
        cannot be encoded), BackendUnreachable."""
        embed = context.embed
        messages: list[Message] = []
        for callback in embed.get("callbacks") or ():
            messages += self._composer.compose_next(callback, value, context, [])
        chain = embed.get("chain")
        if chain:
            # Reversed: the next step is the last element (celery-protocol: `chain`).
            messages += self._composer.compose_next(chain[-1], value, context, list(chain[:-1]))
        follow_ups = FollowUps(tuple(messages))
        if embed.get("chord"):
            part = ResultMessage(context.id or "", states.SUCCESS, value)
            follow_ups += self.chords.part(embed["chord"], context.group, context.group_index, part)
        return follow_ups

    def of_failure(
        self,
        context: Context,
        error: BaseException,
        trace: str,
        *,
        state: str = states.FAILURE,
        with_errbacks: bool = True,
    ) -> FollowUps:
        """Errbacks, and the failures of the later steps and of the chord. Raises: BackendUnreachable."""
        follow_ups = (
            FollowUps(self._errbacks(context.embed.get("errbacks"), context, error, trace))
            if with_errbacks
            else NOTHING
        )
        if context.embed.get("chain") or context.embed.get("chord"):
            follow_ups += self.chords.after(context, state, error, trace)
        return follow_ups

    def _errbacks(
        self, errbacks: list[SignatureFields] | None, context: Context, error: BaseException, trace: str
    ) -> tuple[Message, ...]:
        """Errbacks as in Celery: one that takes (request, exc, traceback) before its own arguments and is registered here is
        called with them, any other is published with the failed task's id before its own arguments.

        Where no user code may run (the worker's I/O loop, where no task is running) the call becomes a message, too.
        """
        messages: list[Message] = []
        for errback in errbacks or ():
            try:
                task = self._tasks.get(errback["task"])
                if task is None or not _takes_the_error(task, errback):
                    messages += self._composer.compose_next(errback, context.id, context, [])
                elif current_context() is not None:
                    _call(task, errback, context, error, trace)
                else:
                    messages.append(self._composer.compose_errback(errback, context, error, trace))
            except Exception:
                logger.exception("errback %s of task %s[%s] failed", errback, context.task, context.id)
        return tuple(messages)


def _call(task: TaskLike, errback: SignatureFields, context: Context, error: BaseException, trace: str) -> None:
    first_arguments = () if errback.get("immutable") else (context, error, trace)
    task(*first_arguments, *(errback.get("args") or ()), **(errback.get("kwargs") or {}))


def _takes_the_error(task: TaskLike, errback: SignatureFields) -> bool:
    # Bound and async errbacks are published, as in Celery: they may retry, or need a loop.
    if task.is_async or inspect.ismethod(task.run):
        return False
    try:
        signature = inspect.signature(task.run)
    except (TypeError, ValueError):
        return False
    parameter_kinds = [parameter.kind for parameter in signature.parameters.values()]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if (
        inspect.Parameter.VAR_POSITIONAL not in parameter_kinds
        and sum(parameter_kind in positional for parameter_kind in parameter_kinds) < 2
    ):
        return False
    # Its further parameters may be for its own arguments, after the id.
    return _binds(signature, errback, 3) or not _binds(signature, errback, 1)


def _binds(signature: inspect.Signature, errback: SignatureFields, argument_count: int) -> bool:
    leading_count = 0 if errback.get("immutable") else argument_count
    try:
        signature.bind(*range(leading_count), *(errback.get("args") or ()), **(errback.get("kwargs") or {}))
    except TypeError:
        return False
    return True

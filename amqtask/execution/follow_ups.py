"""What follows a task: callbacks, errbacks, the next step of a chain, the part of a chord, and the chord's body.

The store decides where parts of chords are counted. A store that can count (Redis) gets each part from the slot and tells one
caller that it was the last: the body leaves that slot with its outcome. Without such a store the part itself leaves with the
outcome, as a message to the chord's queue in the broker, and the worker looks there (worker.chord_joiner).

Either way the member that completes a chord is acknowledged after the body is published and confirmed. When its worker dies
before that, the member is delivered again, and publishes the body again. Nothing here waits.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from amqtask import states
from amqtask.exceptions import BackendUnreachable, ChordError, TaskRevokedError
from amqtask.execution.context import Context, current_context
from amqtask.execution.request import CANCELLED
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.chord import ChordPart, part_message, queue_name, size_of, token_of, values_of
from amqtask.protocol.result import ENDS, ResultMessage, exception_as_dict
from amqtask.protocol.task import is_signature

if TYPE_CHECKING:
    from collections.abc import Iterable

    from amqtask.execution.contract import ChordStore, Composer, TaskLike
    from amqtask.execution.results import Results
    from amqtask.ground.shapes import Options, SignatureFields
    from amqtask.protocol.message import Message


logger = bounded_logger("amqtask.execution")


class FollowUps(NamedTuple):
    """The messages to publish after a task, and the chord parts to publish and join."""

    publish: tuple[Message, ...] = ()
    parts: tuple[ChordPart, ...] = ()

    def __add__(self, other: FollowUps) -> FollowUps:  # type: ignore[override] # not a longer tuple
        return FollowUps(self.publish + other.publish, self.parts + other.parts)


NOTHING = FollowUps()
# Signatures that stand for others.
COMPOSITIONS = frozenset({"celery.chain", "celery.group", "celery.chord"})


class FollowUpComposer:
    """Composes messages through the app; publishes nothing. Without a `chord_store` parts of chords are counted in the broker."""

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
        self._results = results
        self._chord_store = chord_store
        self._serializer = serializer

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
            follow_ups += self.part(embed["chord"], context.group, context.group_index, part)
        return follow_ups

    def of_failure(
        self,
        context: Context,
        error: BaseException,
        trace: str,
        *,
        state: str = states.FAILURE,
        with_errbacks: bool = True,
        most: int | None = None,
    ) -> FollowUps:
        """Errbacks, and the failures of the later steps and of the chord; of `most` at most, see `_after`. Raises:
        BackendUnreachable."""
        follow_ups = (
            FollowUps(self._errbacks((context.embed.get("errbacks") or [])[:most], context, error, trace))
            if with_errbacks
            else NOTHING
        )
        if context.embed.get("chain") or context.embed.get("chord"):
            follow_ups += self._after(context, state, error, trace, most)
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
                    messages += self._composer.compose_next(errback, context.id, context, [], is_bound=False)
                elif current_context() is not None:
                    _call(task, errback, context, error, trace)
                else:
                    messages.append(self._composer.compose_errback(errback, context, error, trace))
            except (Exception, *ENDS):
                logger.exception("errback %s of task %s[%s] failed", errback, context.task, context.id)
        return tuple(messages)

    # -- chords: their parts, bodies and failures

    def part(self, body: SignatureFields, group_id: str | None, index: int | None, part: ResultMessage) -> FollowUps:
        """A member of a header has ended. Raises: EncodeError, BackendUnreachable."""
        if not group_id:
            return NOTHING
        if self._chord_store is None:
            size = size_of(body)
            if size is None:
                return NOTHING  # a chord of a Celery program, whose task celery.chord_unlock counts the results
            queue = queue_name(group_id, token_of(body))
            message = part_message(queue, index, part, self._serializer)
            return FollowUps((), (ChordPart(group_id, part.task_id, size, body, message),))
        everything = self._chord_store.add_chord_part(group_id, index, part, body_id(body))
        return NOTHING if everything is None else self.joined(body, group_id, everything, part.task_id)

    def broken(self, part: ChordPart, error: BaseException) -> ChordPart:
        """The part that replaces one which the broker does not take: it says that the member has failed."""
        failure = _ended(part.task_id, states.FAILURE, error, "")
        message = part_message(part.queue, None, failure, self._serializer)
        return part._replace(message=message, is_broken=True)

    def joined(self, body: SignatureFields, group_id: str, parts: Iterable[object], parent_id: str) -> FollowUps:
        """All parts have come, in order: the message of the body, or its failure."""
        try:
            return FollowUps(tuple(self._composer.compose_body(body, values_of(parts), group_id, parent_id)))
        except ChordError as error:
            cause = error.__cause__
            if isinstance(cause, TaskRevokedError) and str(cause) == CANCELLED:
                return self.never([body], states.REVOKED, cause, "")
            return self.failed(body, error)
        except BackendUnreachable:
            raise
        except Exception as error:  # noqa: BLE001 - the body's arguments cannot be encoded, its task has no route …
            cause = ChordError(f"Callback error: {error!r}")
            cause.__cause__ = error
            return self.failed(body, cause)

    def failed(self, body: SignatureFields, error: BaseException) -> FollowUps:
        """A body will not run: its errbacks, and FAILURE for it and for the signatures after it."""
        first = first_task(body)
        options = first.get("options") or {}
        context = Context(
            id=options.get("task_id"), task=first["task"], args=first.get("args"), kwargs=first.get("kwargs"),
            root_id=options.get("root_id"), parent_id=options.get("parent_id"), group=options.get("group_id"),
        )  # fmt: skip
        follow_ups = FollowUps(self._errbacks(options.get("link_error"), context, error, ""))
        return follow_ups + self.never([body], states.FAILURE, error, "")

    def _after(
        self, context: Context, state: str, error: BaseException, trace: str, most: int | None = None
    ) -> FollowUps:
        """A task has failed: the later steps of its chain, and the chord that it is a part of, fail, too. `most`: so many steps
        at most are told that, the last ones of the chain."""
        follow_ups = self.never(list(context.chain or ()), state, error, trace, most)
        if context.chord:
            follow_ups += self.part(
                context.chord, context.group, context.group_index, _ended(context.id, state, error, trace)
            )
        return follow_ups

    def never(
        self, sigs: list[SignatureFields], state: str, error: BaseException, trace: str, most: int | None = None
    ) -> FollowUps:
        """Signatures that will never run, the first one last, get the state of the task that stopped them, and so do all
        signatures that wait for them. `most`: so many of them, the last ones first to be chosen."""
        publish: list[Message] = []
        parts: list[ChordPart] = []
        waiting, told = sigs[:most], 0
        has_more = len(waiting) < len(sigs)
        while waiting:
            sig = waiting.pop()
            if not is_signature(sig):
                continue  # it could never have been published
            if told == most:
                has_more = True
                break
            told += 1
            if sig["task"] not in COMPOSITIONS:
                after = self._never_ran(sig.get("options") or {}, state, error, trace)
                publish += after.publish
                parts += after.parts
            waiting += reversed(_dependents(sig))
        if has_more:
            logger.warning("more than %d signatures wait for a task of state %s; the others are not told", most, state)
        return FollowUps(tuple(publish), tuple(parts))

    def _never_ran(self, options: Options, state: str, error: BaseException, trace: str) -> FollowUps:
        task_id = options.get("task_id")
        if not task_id:
            return NOTHING  # without an id no caller can wait for it
        follow_ups = NOTHING
        if self._results is not None and options.get("ignore_result") is not True:
            message = self._results.never_ran(_ended(task_id, state, error, trace), options)
            follow_ups = FollowUps((message,) if message is not None else ())
        if options.get("chord"):
            part = _ended(task_id, state, error, trace)
            follow_ups += self.part(options["chord"], options.get("group_id"), options.get("group_index"), part)
        return follow_ups


def _dependents(sig: SignatureFields) -> list[Any]:
    """The signatures that wait for this one."""
    kwargs, options = sig.get("kwargs") or {}, sig.get("options") or {}
    later = reversed(options.get("chain") or ())
    match sig["task"]:
        case "celery.chain" | "celery.group":
            return [*(kwargs.get("tasks") or ()), *later]
        case "celery.chord":
            header, body = kwargs.get("header") or (), [kwargs["body"]] if kwargs.get("body") else []
            return [*([header] if is_signature(header) else header), *body, *later]
        case _:
            return [*later]


def _ended(task_id: str | None, state: str, error: BaseException, trace: str) -> ResultMessage:
    return ResultMessage(task_id or "", state, exception_as_dict(error), trace or None)


def body_id(body: SignatureFields) -> str:
    """The id that the body will have. Until the chord is joined only its members know it."""
    return str((first_task(body).get("options") or {}).get("task_id") or "")


def first_task(sig: SignatureFields) -> SignatureFields:
    """The first task of a signature (of a chord: of its body), or the signature when it has none."""
    kwargs = sig.get("kwargs") or {}
    if sig["task"] in ("celery.chain", "celery.group"):
        tasks = list(kwargs.get("tasks") or ())
        return first_task(tasks[0]) if tasks else sig
    if sig["task"] == "celery.chord":
        return first_task(kwargs["body"]) if kwargs.get("body") else sig
    return sig


def _call(task: Any, errback: SignatureFields, context: Context, error: BaseException, trace: str) -> None:
    first_arguments = () if errback.get("immutable") else (context, error, trace)
    call_in_place(task, (*first_arguments, *(errback.get("args") or ())), errback.get("kwargs") or {})


def call_in_place(task: Any, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    """Call a task's function, in its transaction where it has one."""
    if task.inbox:
        task.apply(args, kwargs, throw=True)
    else:
        task(*args, **kwargs)


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

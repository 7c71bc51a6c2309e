"""Chords in a worker: the part of each ended member of a header, and the body once all parts have come.

The store decides where parts are counted. A store that can count (Redis) gets each part from the slot and tells one caller that
it was the last: the body leaves that slot with its outcome. Without such a store the part itself leaves with the outcome, as a
message to the chord's queue in the broker, and the worker looks there (worker.chord_joiner).

Either way the member that completes a chord is acknowledged after the body is published and confirmed. When its worker dies
before that, the member is delivered again, and publishes the body again. Nothing here waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from amqtask import states
from amqtask.exceptions import BackendUnreachable, ChordError
from amqtask.execution.context import Context
from amqtask.protocol.chord import ChordPart, part_message, queue_name, size_of, token_of, values_of
from amqtask.protocol.result import ResultMessage, exception_as_dict
from amqtask.protocol.task import is_signature

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from amqtask.execution.contract import ChordStore, Composer
    from amqtask.execution.results import Results
    from amqtask.ground.shapes import Options, SignatureFields
    from amqtask.protocol.message import Message


class FollowUps(NamedTuple):
    """The messages to publish after a task, and the chord parts to publish and join."""

    publish: tuple[Message, ...] = ()
    parts: tuple[ChordPart, ...] = ()

    def __add__(self, other: FollowUps) -> FollowUps:  # type: ignore[override] # not a longer tuple
        return FollowUps(self.publish + other.publish, self.parts + other.parts)


NOTHING = FollowUps()


class Chords:
    """Makes parts, bodies and failures. `errbacks(errbacks, context, error, trace)` returns the messages of errbacks.

    `store` is None when parts are counted in the broker.
    """

    def __init__(
        self,
        composer: Composer,
        *,
        results: Results | None,
        store: ChordStore | None,
        serializer: str,
        errbacks: Callable[[list[SignatureFields] | None, Context, BaseException, str], tuple[Message, ...]],
    ) -> None:
        self._composer = composer
        self._results = results
        self._store = store
        self._serializer = serializer
        self._errbacks = errbacks

    def part(self, body: SignatureFields, group_id: str | None, index: int | None, part: ResultMessage) -> FollowUps:
        """A member of a header has ended. Raises: EncodeError, BackendUnreachable."""
        if not group_id:
            return NOTHING
        if self._store is None:
            size = size_of(body)
            if size is None:
                return NOTHING  # a chord of a Celery program, whose task celery.chord_unlock counts the results
            queue = queue_name(group_id, token_of(body))
            message = part_message(queue, index, part, self._serializer)
            return FollowUps((), (ChordPart(group_id, part.task_id, size, body, message),))
        everything = self._store.add_chord_part(group_id, index, part, body_id(body))
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
        return follow_ups + self.never(body, states.FAILURE, error, "")

    def after(self, context: Context, state: str, error: BaseException, trace: str) -> FollowUps:
        """A task has failed: the later steps of its chain, and the chord that it is a part of, fail, too."""
        follow_ups = NOTHING
        for step in reversed(context.chain or ()):
            follow_ups += self.never(step, state, error, trace)
        if context.chord:
            follow_ups += self.part(
                context.chord, context.group, context.group_index, _ended(context.id, state, error, trace)
            )
        return follow_ups

    def never(self, sig: SignatureFields, state: str, error: BaseException, trace: str) -> FollowUps:
        """A signature that will never run gets the state of the task that stopped it, and so do all signatures that wait for
        it."""
        if not is_signature(sig):
            return NOTHING  # it could never have been published
        kwargs, options = sig.get("kwargs") or {}, sig.get("options") or {}
        follow_ups, dependents = NOTHING, list(reversed(options.get("chain") or ()))
        match sig["task"]:
            case "celery.chain" | "celery.group":
                dependents = [*(kwargs.get("tasks") or ()), *dependents]
            case "celery.chord":
                header, body = kwargs.get("header") or (), [kwargs["body"]] if kwargs.get("body") else []
                dependents = [*([header] if is_signature(header) else header), *body, *dependents]
            case _:
                follow_ups = self._never_ran(options, state, error, trace)
        for dependent in dependents:
            follow_ups += self.never(dependent, state, error, trace)
        return follow_ups

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

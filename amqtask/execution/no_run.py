"""Outcomes of requests that no slot ran to their end: out of bounds, lost, refused, revoked, expired, or with a result that
cannot be stored.

Bounds of one message: its follow-ups must have the form of signatures, and there must not be too many. Only those that are
published when this message has run count: the next step of a chain, the members of a group. Later ones are checked in their own
messages.

A result store that does not answer (after its own retries) must not lose the end of a task: the message goes
back to the broker's delay levels for `STORE_PAUSE` seconds and the task runs again, until its result is stored.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from amqtask import states
from amqtask.exceptions import (
    BackendUnreachable,
    InvalidTaskError,
    MessageError,
    SoftTimeLimitExceeded,
    TaskRevokedError,
    Terminated,
    TimeLimitExceeded,
    WorkerLostError,
)
from amqtask.execution.context import Context
from amqtask.execution.follow_ups import COMPOSITIONS, NOTHING, FollowUps
from amqtask.execution.request import HIDDEN, Answer, HardLimitReached, Outcome
from amqtask.ground.printable import bounded_logger, described, printable
from amqtask.protocol.chord import size_of
from amqtask.protocol.serialization import is_private
from amqtask.protocol.task import MAPPING, NO_FOLLOW_UPS, decode_body, light_limit, saferepr

if TYPE_CHECKING:
    from amqtask.execution.contract import TaskLike
    from amqtask.execution.follow_ups import FollowUpComposer
    from amqtask.execution.request import Request
    from amqtask.execution.results import Results
    from amqtask.ground.shapes import JsonFields, Keywords, TaskBody


FOLLOW_UPS, NEW_QUEUES = 100_000, 10
# Compositions that may be called as tasks, with the parameters that are given by position.
_CALLED: dict[str, tuple[str, ...]] = {
    "celery.group": ("tasks",),
    "celery.chord": ("header",),
    "celery.chain": (),
    "celery.chunks": ("task", "it", "n"),
}
# So many signatures are told on the I/O loop that they will not run, and so many errbacks are called there: each is a message,
# or a write to the result store.
MOST_TOLD = 2_000
logger = bounded_logger("amqtask.execution")

STORE_PAUSE = 5.0
# Seconds after which a message comes again whose run was interrupted where it had not begun, or had ended.
INTERRUPTED_SECONDS = 1.0
# Characters of a reason: it becomes a header, and headers have to fit into one frame.
LONGEST_REASON = 1000


class Bounds(NamedTuple):
    """`known_queues` count as existing: those of the configuration, and those that were used before."""

    follow_ups: int = FOLLOW_UPS
    new_queues: int = NEW_QUEUES
    known_queues: Container[str] = frozenset()

    def check(self, embed: JsonFields) -> None:
        """Raises: InvalidTaskError for the third element of a body with too many follow-ups, or with one that is no signature."""
        if not any(embed.values()):
            return
        signatures: list[object] = []
        for name in ("callbacks", "errbacks"):
            if embed.get(name):
                signatures += _listed(embed, name)
        if embed.get("chain"):
            signatures += _listed(embed, "chain")[-1:]
        chord = embed.get("chord")
        if chord:
            signatures.append(chord)
            if isinstance(chord, Mapping):
                size_of(chord)
        if signatures:
            self._count(signatures)

    def check_call(self, task: str, args: Sequence[object], kwargs: Keywords) -> None:
        """The same for a composition that is called as a task, of which the calls are arguments. Raises: InvalidTaskError."""
        given = {**dict(zip(_CALLED[task], args, strict=False)), **kwargs}
        if task != "celery.chunks":
            self._count([{"task": task, "kwargs": given}])
            return
        items, size = given.get("it"), given.get("n")
        if isinstance(items, (list, tuple)) and isinstance(size, int) and len(items) > max(1, size) * self.follow_ups:
            raise self._too_many()

    def _too_many(self) -> InvalidTaskError:
        return InvalidTaskError(f"the message asks for more than {self.follow_ups} follow-ups (worker_max_follow_ups)")

    def _count(self, signatures: list[object]) -> None:
        queues = set()
        for count, call in enumerate(_published(signatures), 1):
            if count > self.follow_ups:
                raise self._too_many()
            queue = call.get("queue")
            if isinstance(queue, str) and queue not in self.known_queues:
                queues.add(queue)
                if len(queues) > self.new_queues:
                    raise InvalidTaskError(
                        f"the follow-ups of the message name more than {self.new_queues} queues that this worker does not "
                        "know (worker_max_new_queues); task_queues makes them known"
                    )


DEFAULT = Bounds()


def _listed(embed: JsonFields, name: str) -> list[object]:
    signatures = embed[name]
    if isinstance(signatures, Mapping):
        return [signatures]
    if not isinstance(signatures, (list, tuple)):
        raise InvalidTaskError(f"`{name}` of the message is {described(signatures)}, not a list of signatures")
    return list(signatures)


def _published(signatures: list[object]) -> Iterator[Mapping[str, object]]:
    """The options of each call that is published for these signatures."""
    while signatures:
        sig = signatures.pop()
        if not isinstance(sig, MAPPING) or not isinstance(sig.get("task"), str):
            raise InvalidTaskError(f"a follow-up of the message is not a signature: {saferepr(sig, 100)}")
        kwargs, options = sig.get("kwargs") or {}, sig.get("options") or {}
        if not isinstance(kwargs, MAPPING) or not isinstance(options, MAPPING):
            raise InvalidTaskError(
                f"a follow-up of the message has no mapping as kwargs or options: {saferepr(sig, 100)}"
            )
        if sig["task"] in COMPOSITIONS:
            signatures += _members(sig["task"], kwargs)
        else:
            yield options


def _members(task: str, kwargs: Keywords) -> list[object]:
    tasks = kwargs.get("header" if task == "celery.chord" else "tasks") or []
    if isinstance(tasks, Mapping):  # a header that is a group, or one task
        return [tasks]
    if not isinstance(tasks, (list, tuple)):
        raise InvalidTaskError(f"the tasks of a {task} are {described(tasks)}, not a list")
    return list(tasks[:1] if task == "celery.chain" else tasks)


class Endings:
    """Runs no task and, but for storing results, does no I/O: the worker calls it on its I/O loop.

    On the loop large bodies of requests that did not run are not decoded: the follow-ups of such a request do not get its
    failure. Of very many follow-ups the last ones of the chain get it.
    """

    # The executor makes them.
    tasks: Mapping[str, TaskLike]
    hostname: str
    accept: frozenset[str]
    # Makes the bodies of chords that the worker joins, too.
    follow_ups: FollowUpComposer
    _results: Results | None
    _largest_body: int
    _bounds: Bounds

    def lost(self, request: Request, error: WorkerLostError | TimeLimitExceeded) -> Outcome:
        """Its process died, or was killed at its hard limit."""
        task = self.tasks.get(request.task)
        if task is None:
            is_requeued = True
        elif isinstance(error, TimeLimitExceeded):
            is_requeued = task.acks_late and not task.acks_on_timeout
        else:
            is_requeued = task.acks_late and task.reject_on_worker_lost
        if is_requeued:
            return requeued(request, str(error))._replace(summary=repr(error))
        # It did run, so its body can be decoded, also a large one.
        return self._ended(request, states.FAILURE, error, Answer.ACK, reads_all=True)

    def lost_finally(self, request: Request, error: WorkerLostError) -> Outcome:
        """Its process died as often as the delivery limit allows: dead-lettered. It did run, so its body can be read."""
        return self._ended(request, states.FAILURE, error, Answer.DEAD_LETTER, reads_all=True)

    def refused(self, request: Request, error: Exception, *, in_slot: bool = False) -> Outcome:
        """It cannot or must not be run: dead-lettered with the reason, and FAILURE is stored."""
        return self._ended(request, states.FAILURE, error, Answer.DEAD_LETTER, reads_all=in_slot)

    def revoked(self, request: Request, reason: str, *, in_slot: bool = False) -> Outcome:
        """It was revoked before it ran, or terminated while it ran."""
        return self._ended(request, states.REVOKED, TaskRevokedError(reason), Answer.ACK, reads_all=in_slot)

    def ended_by_pool(self, request: Request, error: Terminated, *, in_slot: bool = False) -> Outcome:
        """Its pool has ended it while it ran: at its hard limit (HardLimitReached), or because the pool was told to."""
        if isinstance(error, HardLimitReached):
            return self.lost(request, TimeLimitExceeded(str(error)))
        return self.revoked(request, str(error) or "terminated", in_slot=in_slot)

    def expired(self, request: Request) -> Outcome:
        """Its `expires` passed before it could run."""
        return self._ended(request, states.REVOKED, TaskRevokedError("expired"), Answer.ACK)

    def _ended(
        self, request: Request, state: str, error: Exception, answer: Answer, *, reads_all: bool = False
    ) -> Outcome:
        summary = saferepr(error, 500)
        after, result = NOTHING, None
        for is_last in (False, False, True):
            try:
                if self._results is not None and request.id and request.headers.get("ignore_result") is not True:
                    result = self._results.ended(request, state, error)
                after = self._after(request, state, error, summary, reads_all=reads_all)
            except (Exception, Terminated) as trouble:  # noqa: BLE001 - the store's; the answer must be given all the same
                if isinstance(trouble, (SoftTimeLimitExceeded, Terminated)) and not is_last:
                    continue  # a soft and a hard limit strike once each; after them the result can be stored
                logger.error("%s of task %s[%s] was not stored: %s", state, request.task, request.id, trouble)
            break
        return Outcome(
            request.number,
            state,
            answer,
            printable(str(error), LONGEST_REASON),
            after.publish,
            result,
            summary=summary,
            parts=after.parts,
        )

    def _after(self, request: Request, state: str, error: Exception, trace: str, *, reads_all: bool) -> FollowUps:
        """Its follow-ups will not run: their failures."""
        light = light_limit(request.content_type, request.headers.get("compression"))
        limit = self._largest_body if reads_all else min(self._largest_body, light)
        try:
            args, kwargs, embed = request.decoded or self._decode(request, limit)
        except MessageError as trouble:
            logger.info("What was to follow task %s[%s] is not known: %s", request.task, request.id, trouble)
            return NOTHING
        context = Context.of(request, args, kwargs, embed, self.hostname)
        return self.follow_ups.of_failure(
            context,
            error,
            trace,
            state=state,
            with_errbacks=state == states.FAILURE,
            most=None if reads_all else MOST_TOLD,
        )

    def _decode(self, request: Request, limit: int) -> TaskBody:
        decoded = decode_body(
            request.body, request.content_type, request.content_encoding, request.headers, self.accept, limit
        )
        if decoded[2] is not NO_FOLLOW_UPS or request.task in _CALLED:
            try:
                self._bounds.check(decoded[2])
                if request.task in _CALLED:
                    self._bounds.check_call(request.task, decoded[0], decoded[1])
            except InvalidTaskError:
                if is_private(request.content_type):
                    raise InvalidTaskError(f"the follow-ups of the message are not valid {HIDDEN}") from None
                raise
        return decoded


def requeued(request: Request, reason: str, runtime: float = 0.0) -> Outcome:
    """The message goes back to its queue."""
    return Outcome(request.number, states.REJECTED, Answer.REQUEUE, reason, runtime=runtime)


def not_stored(request: Request, error: BackendUnreachable, runtime: float) -> Outcome:
    """The message goes back to its queue after a pause, because its result could not be stored."""
    return requeued(request, f"its result could not be stored: {error}", runtime)._replace(pause=STORE_PAUSE)

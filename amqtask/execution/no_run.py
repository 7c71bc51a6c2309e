"""Outcomes of requests that no slot ran to their end: lost, refused, revoked, expired, or with a result that cannot be stored.

A result store that does not answer (after its own retries) must not lose the end of a task: the message goes
back to the broker's delay levels for `STORE_PAUSE` seconds and the task runs again, until its result is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from amqtask import states
from amqtask.exceptions import (
    BackendUnreachable,
    MessageError,
    TaskRevokedError,
    TimeLimitExceeded,
    WorkerLostError,
)
from amqtask.execution.chords import NOTHING, Chords, FollowUps
from amqtask.execution.context import Context
from amqtask.execution.outcome import Answer, Outcome
from amqtask.ground.printable import bounded_logger, printable
from amqtask.protocol.serialization import LARGEST_BODY
from amqtask.protocol.task import NO_FOLLOW_UPS, decode_body, light_limit, saferepr

if TYPE_CHECKING:
    from amqtask.execution.bounds import Bounds
    from amqtask.execution.contract import TaskLike
    from amqtask.execution.follow_ups import FollowUpComposer
    from amqtask.execution.request import Request
    from amqtask.execution.results import Results
    from amqtask.ground.shapes import TaskBody

logger = bounded_logger("amqtask.execution")

STORE_PAUSE = 5.0
# Characters of a reason: it becomes a header, and headers have to fit into one frame.
LONGEST_REASON = 1000


class Endings:
    """Runs no task and, but for storing results, does no I/O: the worker calls it on its I/O loop.

    On the loop large bodies of requests that did not run are not decoded: the follow-ups of such a request do not get its
    failure. `largest_body` is in bytes.
    """

    def __init__(
        self,
        tasks: Mapping[str, TaskLike],
        *,
        accept: frozenset[str],
        follow_up_composer: FollowUpComposer,
        results: Results | None,
        hostname: str,
        bounds: Bounds,
        largest_body: int = LARGEST_BODY,
    ) -> None:
        self._largest_body = largest_body
        self._bounds = bounds
        self.tasks = tasks
        self.hostname = hostname
        self.accept = accept
        self._follow_up_composer = follow_up_composer
        self._results = results

    @property
    def chords(self) -> Chords:
        """Makes the bodies of chords that the worker joins."""
        return self._follow_up_composer.chords

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

    def expired(self, request: Request) -> Outcome:
        """Its `expires` passed before it could run."""
        return self._ended(request, states.REVOKED, TaskRevokedError("expired"), Answer.ACK)

    def _ended(
        self, request: Request, state: str, error: Exception, answer: Answer, *, reads_all: bool = False
    ) -> Outcome:
        summary = saferepr(error, 500)
        after, result = NOTHING, None
        try:
            if self._results is not None and request.id and request.headers.get("ignore_result") is not True:
                result = self._results.ended(request, state, error)
            after = self._after(request, state, error, summary, reads_all=reads_all)
        except Exception as trouble:  # noqa: BLE001 - the store's; the answer must be given all the same
            logger.error("%s of task %s[%s] was not stored: %s", state, request.task, request.id, trouble)
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
        limit = self._largest_body if reads_all else min(self._largest_body, light_limit(request.content_type))
        try:
            args, kwargs, embed = request.decoded or self._decode(request, limit)
        except MessageError as trouble:
            logger.info("What was to follow task %s[%s] is not known: %s", request.task, request.id, trouble)
            return NOTHING
        context = Context.of(request, args, kwargs, embed, self.hostname)
        return self._follow_up_composer.of_failure(
            context, error, trace, state=state, with_errbacks=state == states.FAILURE
        )

    def _decode(self, request: Request, limit: int) -> TaskBody:
        decoded = decode_body(
            request.body, request.content_type, request.content_encoding, request.headers, self.accept, limit
        )
        if decoded[2] is not NO_FOLLOW_UPS:
            self._bounds.check(decoded[2])
        return decoded


def requeued(request: Request, reason: str, runtime: float = 0.0) -> Outcome:
    """The message goes back to its queue."""
    return Outcome(request.number, states.REJECTED, Answer.REQUEUE, reason, runtime=runtime)


def not_stored(request: Request, error: BackendUnreachable, runtime: float) -> Outcome:
    """The message goes back to its queue after a pause, because its result could not be stored."""
    return requeued(request, f"its result could not be stored: {error}", runtime)._replace(pause=STORE_PAUSE)

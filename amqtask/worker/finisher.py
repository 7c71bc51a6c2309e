"""Between an outcome and its answer: all messages of the outcome are published and confirmed first (worker.following).

Every path through this file ends in one call of `answer(request, …)`, or of `requeue(request)` when the worker stops before
all messages are confirmed; a delivery whose publishes cannot be confirmed now stays unanswered until they are.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING

from amqtask import states
from amqtask.exceptions import Unroutable
from amqtask.execution.request import Answer
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.task import saferepr
from amqtask.worker.follow_ups import NEVER, never_fits
from amqtask.worker.republish import back_to_its_queue, bare_dead_letter, dead_letter

if TYPE_CHECKING:
    from amqtask.exceptions import PublishError
    from amqtask.execution.request import Outcome, Request
    from amqtask.protocol.entities import Queue
    from amqtask.protocol.message import Message
    from amqtask.worker.follow_ups import FollowUpPublisher

logger = bounded_logger(__name__)


def _patience(error: PublishError) -> float:
    """Publishes a dead letter until its queue takes it; meanwhile the broker keeps the message in the queue it came from."""
    return 0.0 if never_fits(error) else NEVER


class Finisher:
    """Publishes the messages of outcomes, and calls `answer` once all of them are confirmed.

    `dead_queue(name)` is the dead-letter queue of a work queue, None where there is none; `dead_lettered` is called when
    the copy in it is confirmed. `requeue` is called with a request that cannot be finished before the worker stops.
    """

    def __init__(
        self,
        *,
        following: FollowUpPublisher,
        answer: Callable[[Request, Answer], None],
        requeue: Callable[[Request], None],
        dead_queue: Callable[[str], Queue | None],
        dead_lettered: Callable[[Request], None],
        hostname: str,
    ) -> None:
        self._following = following
        self._answer = answer
        self._requeue = requeue
        self._dead_queue = dead_queue
        self.dead_lettered = dead_lettered
        self._hostname = hostname
        # Requests that wait for confirms, by number: they are answered later, unless their channel is lost.
        self.confirming: dict[int, Request] = {}
        self._seen_confirming: set[int] = set()

    def look_for_long_waits(self) -> int:
        """How many requests have waited for their confirms since the last look."""
        waiting = self._seen_confirming.intersection(self.confirming)
        self._seen_confirming = set(self.confirming)
        return len(waiting)

    def finish(self, request: Request, outcome: Outcome) -> None:
        """Publish the outcome's messages; answer when they are confirmed."""
        if not (outcome.publish or outcome.parts or outcome.result is not None or outcome.answer is Answer.DEAD_LETTER):
            self._answer(request, outcome.answer)
            return
        self.confirming[request.number] = request
        result = outcome.result
        if result is not None and outcome.answer is Answer.ACK and not outcome.publish and not outcome.parts:
            # The hot path of results over AMQP.
            self._following.publisher.publish(result, partial(self._result_published, request, outcome, result))
            return
        end = _End(self, request, outcome)
        self._following.follow(
            outcome.publish, outcome.parts, outcome.result, end.followed,
            request=request, on_failed=end.failed, is_final=outcome.state in states.READY_STATES,
        )  # fmt: skip
        if outcome.answer is Answer.DEAD_LETTER:
            end.dead_letter()

    def _result_published(
        self, request: Request, outcome: Outcome, result: Message, error: PublishError | None
    ) -> None:
        if error is None:
            self.settle(request, Answer.ACK)
        else:
            end = _End(self, request, outcome)
            self._following.result_refused(
                result, error, end.followed, request=request, is_final=outcome.state in states.READY_STATES
            )

    def forward(self, request: Request, message: Message, on_refused: Callable[[PublishError], None]) -> None:
        """Publish `message` to replace the delivery (a delay), wait for the confirm, then ack. `on_refused` is called when it can
        never be published."""
        self.confirming[request.number] = request

        def ended(error: PublishError | None) -> None:
            if self.confirming.pop(request.number, None) is None:
                return
            if error is None:
                self._answer(request, Answer.ACK)
            else:
                on_refused(error)

        self._following.store(message, ended, on_stopped=partial(self.stopped, request))

    def dead_letter(self, request: Request, outcome: Outcome, on_end: Callable[[Answer | None], None]) -> None:
        """Publish a copy to the dead-letter queue. `on_end` gets the answer, or None when the worker stops first."""
        queue = self._dead_queue(request.queue)
        if queue is None:
            logger.error(
                "Task %s[%s] is dropped from %s (%s): the queue has no dead-letter queue",
                request.task, request.id, request.queue, outcome.reason,
                extra=request.log_fields,
            )  # fmt: skip
            on_end(Answer.DROP)
            return
        dead = dead_letter(
            request,
            to=queue.name,
            reason=outcome.reason,
            exception=outcome.summary or outcome.reason,
            hostname=self._hostname,
            died_at=datetime.now(timezone.utc).isoformat(),
        )
        self._following.publisher.publish(dead, partial(self._dead_letter_published, request, dead, queue, on_end))

    def _dead_letter_published(
        self,
        request: Request,
        dead: Message,
        queue: Queue,
        on_end: Callable[[Answer | None], None],
        error: PublishError | None,
    ) -> None:
        """A confirm or an error came: declare the queue if it does not exist, shorten the copy, or publish it again."""
        ended, stopped = partial(self._dead_letter_ended, request, on_end), partial(on_end, None)
        if error is None:
            ended(None)
        elif isinstance(error, Unroutable):
            dead.declare = (queue,)
            self._following.store(dead, ended, on_stopped=stopped, patience=_patience)
        elif never_fits(error):
            # The broker cannot take all of it (its frame_max is smaller than other brokers').
            self._following.store(bare_dead_letter(dead), ended, on_stopped=stopped, patience=_patience)
        else:
            self._following.retry(dead, error, ended, on_stopped=stopped, patience=_patience)

    def _dead_letter_ended(
        self, request: Request, on_end: Callable[[Answer | None], None], error: PublishError | None
    ) -> None:
        if error is None:
            self.dead_lettered(request)
            on_end(Answer.DEAD_LETTER)
            return
        logger.error(
            "The copy of task %s[%s] for the dead-letter queue of %s cannot be published; the queue's own policy decides: %s",
            request.task, request.id, request.queue, error,
            extra=request.log_fields,
        )  # fmt: skip
        on_end(Answer.DROP)

    def settle(self, request: Request, answer: Answer) -> None:
        """All messages are confirmed: answer."""
        if self.confirming.pop(request.number, None) is not None:
            self._answer(request, answer)

    def stopped(self, request: Request) -> None:
        """The worker stops before all messages are confirmed."""
        if self.confirming.pop(request.number, None) is not None:
            self._requeue(request)


class _End:
    """The end of one request: its follow-ups and, for a dead letter, its copy have to be confirmed."""

    __slots__ = (
        "_answer", "_finisher", "_has_followed", "_is_dead_lettering", "_is_unconfirmed", "_outcome", "_request",
    )  # fmt: skip

    def __init__(self, finisher: Finisher, request: Request, outcome: Outcome) -> None:
        self._finisher = finisher
        self._request = request
        self._outcome = outcome
        self._answer = outcome.answer
        self._is_dead_lettering = outcome.answer is Answer.DEAD_LETTER
        self._has_followed = self._is_unconfirmed = False

    def failed(self, message: Message, error: PublishError) -> None:
        """A follow-up can never be published. If it was a retry or a replacement, this task itself is dead-lettered."""
        if message.properties.headers["id"] == self._request.id and not self._is_dead_lettering:
            reason = f"what was to go on in its place cannot be published: {error}"
            self._outcome = self._outcome._replace(reason=reason, summary=saferepr(error, 500))
            self.dead_letter()

    def dead_letter(self) -> None:
        self._is_dead_lettering = True
        self._finisher.dead_letter(self._request, self._outcome, self._dead_lettered)

    def _dead_lettered(self, answer: Answer | None) -> None:
        self._is_dead_lettering = False
        self._is_unconfirmed |= answer is None
        self._answer = answer or self._answer
        self._look()

    def followed(self, is_dealt_with: bool) -> None:
        self._has_followed = True
        self._is_unconfirmed |= not is_dealt_with
        self._look()

    def _look(self) -> None:
        if self._is_dead_lettering or not self._has_followed:
            return
        if self._is_unconfirmed:
            self._finisher.stopped(self._request)
        else:
            self._finisher.settle(self._request, self._answer)


__all__ = ["Finisher", "back_to_its_queue"]

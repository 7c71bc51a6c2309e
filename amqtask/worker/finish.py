"""What comes between an outcome and its answer: everything it says is published and confirmed first.

Every road through this file ends in one call of `answer(request, …)`; a delivery whose publishes cannot be
confirmed now stays unanswered until they are (the publisher keeps them over a reconnect).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING

from amqtask.exceptions import MessageTooLarge, PublishError, Unroutable
from amqtask.execution.outcome import Answer
from amqtask.printable import bounded_logger
from amqtask.worker.copies import back_to_its_queue, bare_dead_letter, dead_letter

if TYPE_CHECKING:
    from amqtask.entities import Queue
    from amqtask.execution.outcome import Outcome
    from amqtask.execution.request import Request
    from amqtask.message import Message
    from amqtask.pool import Loop
    from amqtask.protocol.chord import ChordPart
    from amqtask.transport.contract import LoopPublisher

logger = bounded_logger(__name__)

# How long a message that could not be moved stays with this worker before it goes back to its queue.
KEEP_SECONDS = 5.0


class Finisher:
    """Publishes what outcomes say and reports the answer once all of it is confirmed.

    `dead_queue(name)` is the dead-letter queue of a work queue, None where there is none; `dead_lettered` is told when
    the copy in it is confirmed.
    """

    def __init__(
        self,
        *,
        publisher: LoopPublisher,
        loop: Loop,
        answer: Callable[[Request, Answer], None],
        dead_queue: Callable[[str], Queue | None],
        dead_lettered: Callable[[Request], None],
        join: Callable[[ChordPart, Callable[[], None]], None],
        hostname: str,
    ) -> None:
        self._publisher = publisher
        self._loop = loop
        self._answer = answer
        self._dead_queue = dead_queue
        self.dead_lettered = dead_lettered
        self._join = join
        self._hostname = hostname
        # Requests that wait for confirms, by number: they are answered later, unless their channel dies.
        self.confirming: dict[int, Request] = {}

    def finish(self, request: Request, outcome: Outcome) -> None:
        """Publish what the outcome says; answer when it is confirmed."""
        answer = outcome.answer
        dead = self._dead_copy(request, outcome) if answer is Answer.DEAD_LETTER else None
        if answer is Answer.DEAD_LETTER and dead is None:
            answer = Answer.DROP
        steps = len(outcome.publish) + len(outcome.parts) + (outcome.result is not None) + (dead is not None)
        if not steps:
            self._answer(request, answer)
            return
        self.confirming[request.number] = request
        pending = _Pending(self, request, answer, steps)
        for message in outcome.publish:
            self._publisher.publish(message, pending.follow_up_done)
        for part in outcome.parts:
            self._publisher.publish(part.message, partial(pending.part_done, part))
        if outcome.result is not None:
            self._publisher.publish(outcome.result, pending.result_done)
        if dead is not None:
            self._bury(dead, request, pending)

    def forward(self, request: Request, message: Message) -> None:
        """Publish `message` in place of the delivery (a delay), confirm, then ack."""
        self.confirming[request.number] = request
        self._publisher.publish(message, _Pending(self, request, Answer.ACK, 1).follow_up_done)

    def _dead_copy(self, request: Request, outcome: Outcome) -> Message | None:
        queue = self._dead_queue(request.queue)
        if queue is None:
            logger.error(
                "Task %s[%s] is dropped from %s (%s): the queue has no dead-letter queue",
                request.task, request.id, request.queue, outcome.reason,
                extra={"task_id": request.id, "task_name": request.task, "queue": request.queue},
            )  # fmt: skip
            return None
        died_at = datetime.now(timezone.utc).isoformat()
        return dead_letter(
            request,
            to=queue.name,
            reason=outcome.reason,
            exception=outcome.summary or outcome.reason,
            hostname=self._hostname,
            died_at=died_at,
        )

    def _bury(self, dead: Message, request: Request, pending: _Pending) -> None:
        def declare_and_try_again(error: PublishError | None) -> None:
            queue = self._dead_queue(request.queue)
            if isinstance(error, Unroutable) and queue is not None:
                dead.declare = (queue,)
                self._publisher.publish(dead, pending.dead_letter_done)
            elif type(error) is PublishError or isinstance(error, MessageTooLarge):
                # Something in it that this broker does not take (its frames are smaller than others').
                self._publisher.publish(bare_dead_letter(dead), pending.dead_letter_done)
            else:
                pending.dead_letter_done(error)

        self._publisher.publish(dead, declare_and_try_again)

    def all_done(self, pending: _Pending) -> None:
        """Every publish of the request has been confirmed or refused."""
        request = pending.request
        if not pending.keep:
            if pending.parts:
                # Their chords first: who completes one is not answered before its body is stored.
                part = pending.parts.pop()
                self._join(part, lambda: self.all_done(pending))
                return
            self._settle(request, pending.answer)
            return
        # Given back at once it would come again at once; the pause keeps a full or forbidden queue from being hammered.
        self._loop.call_later(KEEP_SECONDS, lambda: self._settle(request, Answer.REQUEUE))

    def _settle(self, request: Request, answer: Answer) -> None:
        if self.confirming.pop(request.number, None) is not None:
            self._answer(request, answer)

    def give_up(self) -> list[Request]:
        """The worker stops before all is confirmed: these stay unanswered (so the broker keeps them)."""
        requests = list(self.confirming.values())
        self.confirming.clear()
        return requests


class _Pending:
    """The publishes of one request that are not confirmed yet."""

    __slots__ = ("answer", "finisher", "keep", "parts", "remaining", "request")

    def __init__(self, finisher: Finisher, request: Request, answer: Answer, remaining: int) -> None:
        self.finisher = finisher
        self.request = request
        self.answer = answer
        self.remaining = remaining
        self.keep = False
        # Parts of chords that are stored, so that their chords are to be looked at.
        self.parts: list[ChordPart] = []

    def part_done(self, part: ChordPart, error: PublishError | None) -> None:
        """A part of a chord; where nobody takes it the chord is over: this member has run before."""
        if error is None:
            self.parts.append(part)
        elif not isinstance(error, Unroutable):
            self.follow_up_done(error)
            return
        self._one_done()

    def result_done(self, error: PublishError | None) -> None:
        """A result that nobody takes is lost with its reader: an `rpc` caller that has gone away."""
        if error is not None:
            level = logging.DEBUG if isinstance(error, Unroutable) else logging.ERROR
            logger.log(level, "Result of task %s[%s] was not stored: %s", self.request.task, self.request.id, error)
        self._one_done()

    def follow_up_done(self, error: PublishError | None) -> None:
        """A retry, next step or delayed copy; without it the message must stay."""
        if error is not None:
            self.keep = True
            logger.error(
                "Task %s[%s] goes back to %s: what follows from it could not be published: %s",
                self.request.task, self.request.id, self.request.queue, error,
                extra={"task_id": self.request.id, "task_name": self.request.task, "queue": self.request.queue},
            )  # fmt: skip
        self._one_done()

    def dead_letter_done(self, error: PublishError | None) -> None:
        if error is None:
            self.finisher.dead_lettered(self.request)
        else:
            self.keep = True
            logger.error(
                "Task %s[%s] could not be moved to the dead-letter queue of %s and stays there: %s",
                self.request.task, self.request.id, self.request.queue, error,
                extra={"task_id": self.request.id, "task_name": self.request.task, "queue": self.request.queue},
            )  # fmt: skip
        self._one_done()

    def _one_done(self) -> None:
        self.remaining -= 1
        if not self.remaining:
            self.finisher.all_done(self)


__all__ = ["Finisher", "back_to_its_queue"]

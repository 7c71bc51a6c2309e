"""Between an outcome and its answer: all messages of the outcome are published and confirmed first (worker.follow_ups).

Here, too: the copies of a message that go to the dead-letter queue or are delayed, and the pause of tasks whose process died.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING

from amqtask import states
from amqtask.exceptions import Unroutable
from amqtask.execution.request import Answer
from amqtask.ground.loop import exponential_backoff
from amqtask.ground.printable import bounded_logger, printable
from amqtask.protocol.message import Message, Properties, properties_of_copy, strip_transit_headers
from amqtask.protocol.task import saferepr
from amqtask.transport.content import field_size
from amqtask.worker.follow_ups import NEVER, never_fits

if TYPE_CHECKING:
    from amqtask.exceptions import PublishError
    from amqtask.execution.request import Outcome, Request
    from amqtask.ground.shapes import HeaderDict, Headers
    from amqtask.pool import Loop, Timer
    from amqtask.protocol.entities import Queue
    from amqtask.protocol.message import Delivery, PropertiesLike
    from amqtask.worker.follow_ups import FollowUpPublisher
    from amqtask.worker.options import WorkQueues
    from amqtask.worker.report import Report


# -- Copies of a received message that are published again: to the dead-letter queue, or to be delayed.
#
# All headers of a message have to go into one frame (AMQP 0-9-1, section 4.2.6.1), which RabbitMQ bounds at 131,072 bytes
# unless configured otherwise; for a larger one it closes the connection. So the largest of a received message are replaced by
# a short text until the others fit (`fitted`).


# Characters of a dead letter's reason and exception.
_LONGEST_REASON, _LONGEST_EXCEPTION = 1000, 4000


def copied_headers(properties: PropertiesLike) -> HeaderDict:
    """The headers for a copy of a message."""
    return strip_transit_headers(properties.headers or {})


def copied_properties(properties: PropertiesLike, headers: HeaderDict | None = None) -> Properties:
    """The properties for a copy of a message, with these headers or its own."""
    return properties_of_copy(properties, copied_headers(properties) if headers is None else headers)


def back_to_its_queue(request: Request) -> Message:
    """The same message to the same queue, through the default exchange: that works whatever exchange the queue is bound to."""
    delivery = request.delivery
    return Message(delivery.body, copied_properties(delivery.properties), exchange="", routing_key=request.queue)


def dead_letter(request: Request, *, to: str, reason: str, exception: str, hostname: str, died_at: str) -> Message:
    """The copy for the dead-letter queue; its headers say why, where, when and after how many attempts.

    The body is complete. Headers that do not fit, or that cannot be encoded again, are shortened.
    """
    delivery = request.delivery
    headers = fitted(copied_headers(delivery.properties))
    headers |= {
        "x-amqtask-reason": printable(reason, _LONGEST_REASON),
        "x-amqtask-exception": printable(exception, _LONGEST_EXCEPTION),
        "x-amqtask-host": hostname,
        "x-amqtask-attempts": request.attempts + 1,
        "x-amqtask-queue": request.queue,
        "x-amqtask-died-at": died_at,
    }
    return Message(delivery.body, copied_properties(delivery.properties, headers), exchange="", routing_key=to)


def _is_short(value: object) -> bool:
    """Whether it is a text that AMQP takes as a property."""
    return isinstance(value, str) and len(value.encode(errors="replace")) <= 255


def bare_dead_letter(dead: Message) -> Message:
    """The same dead letter with only the reason in its headers, and its name and ids, for a broker that refuses the others."""
    before = dead.properties
    headers = {
        name: value
        for name, value in before.headers.items()
        if name.startswith("x-amqtask-") or (name in ("task", "id") and _is_short(value))
    }
    kept = {
        name: value
        for name in ("content_type", "content_encoding", "correlation_id", "message_id")
        if _is_short(value := getattr(before, name))
    }
    properties = Properties(**kept, headers=headers)
    return Message(dead.body, properties, dead.exchange, dead.routing_key, dead.declare)


# Bytes; leaves room in a frame for the properties, for the headers of a dead letter, and for those that brokers add.
ROOM = 98_304
# The names of headers that were shortened or dropped.
CUT_HEADER = "x-amqtask-cut"
# Characters of the text that replaces a value, and of the list of such headers.
_SHORT, _LISTED = 200, 1000
# These are dropped last.
_FIRST = ("task", "id", "lang", "root_id", "parent_id", "group", "retries", "eta", "expires")


def fitted(headers: Headers) -> HeaderDict:
    """The headers, shortened where they do not fit or cannot be encoded; CUT_HEADER names those that were changed."""
    kept, sizes, cut = dict(headers), {}, []
    for name in sorted(headers, key=lambda name: name not in _FIRST):
        size = field_size(name, headers[name])
        if size is None:
            cut.append(name)
            kept[name] = _shortened(headers[name])
            size = field_size(name, kept[name]) or 0
        sizes[name] = size
    cut += _make_room(kept, sizes)
    if cut:
        names = ", ".join(printable(name, _SHORT) for name in cut[:_SHORT])
        kept[CUT_HEADER] = printable(f"{len(cut)} of {len(headers)}: {names}", _LISTED)
    return kept


def _make_room(kept: HeaderDict, sizes: dict[str, int]) -> list[str]:
    """Shorten the largest headers, then drop the last ones, until the headers fit; the names of those that changed."""
    cut: list[str] = []
    total_size = sum(sizes.values())
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        if total_size <= ROOM:
            return cut
        shortened = _shortened(kept[name])
        size = field_size(name, shortened) or 0
        if size < sizes[name]:
            total_size += size - sizes[name]
            kept[name], sizes[name] = shortened, size
            cut.append(name)
    for name in reversed(list(sizes)):
        if total_size <= ROOM:
            break
        total_size -= sizes[name]
        del kept[name]
        cut.append(name)
    return cut


def _shortened(value: object) -> str:
    return printable(saferepr(value, _SHORT), _SHORT)


# -- Tasks whose process died: how often each may run again, and the pause before its message goes back to its queue.
#
# The reason may pass (other programs used the memory) or not (a bug). So the message is tried again, later each time, and
# after the delivery limit it is dead-lettered with a reason that says how the process ended.
#
# Quorum queues count the deliveries of a message (`x-delivery-count`); for other queues this worker counts itself.

# Seconds before the second run; the pause doubles with each run.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0
# So many messages are counted here, the newest.
REMEMBERED = 10_000


class Lost:
    """Holds lost requests for their pause, then has them requeued."""

    def __init__(self, loop: Loop, work_queues: WorkQueues, answer: Callable[[Request, Answer], None]) -> None:
        self._loop = loop
        self._work_queues = work_queues
        self._answer = answer
        self._counts: OrderedDict[str | int, int] = OrderedDict()
        self._waiting: dict[int, tuple[Request, Timer]] = {}

    def __len__(self) -> int:
        """How many requests wait to be requeued."""
        return len(self._waiting)

    def attempts(self, request: Request) -> int:
        """How often a redelivered message was delivered before: by the broker's count, else how often its process died here."""
        if request.attempts and self._work_queues.is_counting(request.queue):
            return request.attempts
        return self._counts.get(_name(request), 0)

    def is_last(self, request: Request) -> bool:
        """Count a lost request; whether it must not be delivered again."""
        # In another queue it is the sender's.
        if "x-delivery-count" not in request.headers or not self._work_queues.is_counting(request.queue):
            self._add(_name(request))
        return self._work_queues.is_last_run(request)

    def hold(self, request: Request) -> None:
        """Requeue the request after a pause."""
        seconds = exponential_backoff(request.attempts, factor=FIRST_PAUSE, maximum=LONGEST_PAUSE)
        self._waiting[request.number] = request, self._loop.call_later(seconds, lambda: self._requeue_now(request))

    def stop(self) -> None:
        """Requeue all of them now."""
        for request, timer in list(self._waiting.values()):
            timer.cancel()
            self._requeue_now(request)

    def _requeue_now(self, request: Request) -> None:
        if self._waiting.pop(request.number, None) is not None:
            self._answer(request, Answer.REQUEUE)

    def _add(self, name: str | int) -> None:
        self._counts[name] = self._counts.get(name, 0) + 1
        self._counts.move_to_end(name)
        if len(self._counts) > REMEMBERED:
            self._counts.popitem(last=False)


def _name(request: Request) -> str | int:
    """What a message is known by: a sender may have given it no id."""
    return request.id or hash(request.body)


# -- The finisher. Every path through it ends in one call of `answer(request, …)`, or of `requeue(request)` when the worker
# stops before all messages are confirmed; a delivery whose publishes cannot be confirmed now stays unanswered until they are.

logger = bounded_logger(__name__)


def _patience(error: PublishError) -> float:
    """Publishes a dead letter until its queue takes it; meanwhile the broker keeps the message in the queue it came from."""
    return 0.0 if never_fits(error) else NEVER


class Finisher:
    """Publishes the messages of outcomes, and calls `answer` once all of them are confirmed.

    `requeue` is called with a request that cannot be finished before the worker stops. `replace` is the consumer's.
    """

    def __init__(
        self,
        *,
        following: FollowUpPublisher,
        answer: Callable[[Request, Answer], None],
        requeue: Callable[[Request], None],
        work_queues: WorkQueues,
        report: Report,
        hostname: str,
        replace: Callable[[Delivery, Sequence[Message], Callable[[bool], None]], bool],
    ) -> None:
        self._following = following
        self._answer = answer
        self._requeue = requeue
        self._dead_queue = work_queues.dead_letter_queue
        self._report = report
        self._hostname = hostname
        self._replace = replace
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
        if not self._finish_at_once(request, outcome):
            self._finish_by_and_by(request, outcome)

    def _finish_at_once(self, request: Request, outcome: Outcome) -> bool:
        """Publish all of the outcome and acknowledge in one step, where the broker has one. False: it has none for this."""
        if outcome.parts or outcome.result is not None or outcome.answer not in (Answer.ACK, Answer.DEAD_LETTER):
            return False

        def done(is_done: bool) -> None:
            if not is_done:
                self._finish_by_and_by(request, outcome)
                return
            if outcome.answer is Answer.DEAD_LETTER:
                self._report.dead_lettered(request)
            self.settle(request, outcome.answer)

        if outcome.answer is Answer.ACK:
            return self._replace(request.delivery, outcome.publish, done)
        queue = self._dead_queue(request.queue)
        if queue is None:
            return False
        dead = self._dead_letter(request, outcome, queue)
        dead.declare = (queue,)
        # Of what cannot be written there is at least the reason.
        letters = (dead, bare_dead_letter(dead))
        return any(self._replace(request.delivery, [*outcome.publish, letter], done) for letter in letters)

    def _finish_by_and_by(self, request: Request, outcome: Outcome) -> None:
        """Publish all of the outcome, and acknowledge once it is confirmed."""
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

        def replaced(is_done: bool) -> None:
            if is_done:
                self.settle(request, Answer.ACK)
            else:
                store()

        store = partial(self._following.store, message, ended, on_stopped=partial(self.stopped, request))
        if not self._replace(request.delivery, (message,), replaced):
            store()

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
        dead = self._dead_letter(request, outcome, queue)
        self._following.publisher.publish(dead, partial(self._dead_letter_published, request, dead, queue, on_end))

    def _dead_letter(self, request: Request, outcome: Outcome, queue: Queue) -> Message:
        return dead_letter(
            request,
            to=queue.name,
            reason=outcome.reason,
            exception=outcome.summary or outcome.reason,
            hostname=self._hostname,
            died_at=datetime.now(timezone.utc).isoformat(),
        )

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
            self._following.store(dead, ended, on_stopped=stopped, patience=_patience, refused=error)

    def _dead_letter_ended(
        self, request: Request, on_end: Callable[[Answer | None], None], error: PublishError | None
    ) -> None:
        if error is None:
            self._report.dead_lettered(request)
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

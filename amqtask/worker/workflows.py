"""What a worker does for chains and chords by itself: next steps without the broker, and chords that are joined in the broker."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import TYPE_CHECKING

from amqtask.exceptions import AccessRefused, BackendUnreachable, ChordError, MessageError, PublishError, Unroutable
from amqtask.execution.chain_steps import needs_no_broker
from amqtask.execution.no_run import STORE_PAUSE
from amqtask.ground.lazy import lazy
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.chord import gather
from amqtask.protocol.message import Delivery
from amqtask.transport.contract import QueuePresence
from amqtask.worker.follow_ups import ACCESS_REFUSED_SECONDS, Pauses, never_fits
from amqtask.worker.strategy import read_request

if TYPE_CHECKING:
    from amqtask.execution.follow_ups import FollowUpComposer, FollowUps
    from amqtask.execution.request import Request
    from amqtask.protocol.chord import ChordPart
    from amqtask.protocol.message import Message
    from amqtask.transport.contract import Collector
    from amqtask.worker.follow_ups import FollowUpPublisher, OnDone
    from amqtask.worker.lines import Throttle
    from amqtask.worker.options import WorkerSetup
    from amqtask.worker.revoked import Revocations
    from amqtask.worker.strategy import Strategies


# -- Steps: a worker runs the next steps of a chain without the broker for a while, if a redelivery could be resumed
# (execution.resuming).
#
# When a step has ended and its result is stored, the next step would be published to the queue that it came from, and be
# delivered from there. Instead its message joins the line here as if it had been delivered, and the message that the chain
# came with stays unanswered until the last of these steps has ended: its answer is the answer of all of them. So the broker
# still has a message of all work in this worker; when the worker is lost, its finished steps do not run again, because their
# results are stored.
#
# After `seconds` the next step is published, so that other tasks get their turn and a long chain may go to another worker.


def delivered(request: Request) -> Request:
    """The request whose message is unanswered: it stands for all steps of its chain that run here."""
    return request.first or request


class Steps:
    """Makes requests of next steps. `consumed` are the names of the queues that this worker consumes."""

    def __init__(
        self,
        setup: WorkerSetup,
        *,
        strategies: Strategies,
        throttle: Throttle,
        revoked: Revocations,
        consumed: Container[str],
        clock: Callable[[], float],
    ) -> None:
        self._seconds = setup.chain_seconds
        self._strategies = strategies
        self._throttle = throttle
        self._revoked = revoked
        self._consumed = consumed
        self._switch = setup.slot_steps
        self._limits_changed = False
        self._clock = clock

    def request(self, before: Request, message: Message, number: int) -> Request | None:
        """The request of the step after `before`; None: it must be published."""
        now = self._clock()
        until = before.until or now + self._seconds
        if now >= until or before.redelivered:
            return None
        name = message.properties.headers["task"]
        strategy = self._strategies[name]
        if (
            not strategy.is_plain
            or before.queue not in self._consumed
            or self._throttle.limits(name)
            or not needs_no_broker(before, message)
        ):
            return None
        request = read_request(_as_delivered(before, message), number, name, strategy)
        request.first, request.until = delivered(before), until
        return request

    def gone_on(self, before: Request, message: Message, step: Request) -> None:
        """A slot has begun with the next step by itself: complete its request with the values that only this process has."""
        step.delivery = _as_delivered(before, message)
        step.first = delivered(before)

    def look(self, *, is_quiet: bool = False, limits_changed: bool = False) -> None:
        """Let slots run next steps by themselves, or not: they do not know revoked tasks and changed limits."""
        if self._switch is None:
            return
        self._limits_changed |= limits_changed
        if self._seconds and not (is_quiet or self._limits_changed or self._throttle or self._revoked.must_be_asked):
            self._switch.turn_on()
        else:
            self._switch.turn_off()


def _as_delivered(before: Request, message: Message) -> Delivery:
    origin = delivered(before).delivery
    queue = before.queue
    return Delivery(message.body, message.properties, "", queue, False, queue, origin.tag, origin.epoch)


# -- Chords that are joined in the broker: the worker that published the last part publishes the body, once, then deletes the
# queue.
#
# A part is confirmed before its worker looks at the queue. The member whose look finds the chord complete stays unanswered
# until the body is confirmed: when that worker dies before, the member is delivered again, and its new part causes a new
# look.
#
# A queue that is gone belongs to a chord that is over. A queue whose node is down comes back: its members stay unanswered,
# and their parts are published and looked at again until it does, or until it has been away for AWAY_SECONDS. Then the body
# fails, so that the caller gets an error.

logger = bounded_logger(__name__)

AWAY_SECONDS = 60.0
# A part that comes back as unroutable is published once more after so many seconds, before its chord is believed to be over:
# a node that has lost the others knows nothing of queues that were made since (RabbitMQ 4 with Khepri), and is left
# meanwhile.
AGAIN_SECONDS = 8.0


def _patience(error: PublishError) -> float:
    """For how many seconds a part is published again. 0 when its queue is missing: the next look tells whether it is gone or
    away."""
    if isinstance(error, AccessRefused):
        return ACCESS_REFUSED_SECONDS
    return 0.0 if isinstance(error, Unroutable) or never_fits(error) else AWAY_SECONDS


class ChordJoiner:
    """Joins chords for one worker. `make_collector` is called for the first one; `accept` are the content types of results."""

    def __init__(
        self, make_collector: Callable[[], Collector], chords: FollowUpComposer, accept: frozenset[str]
    ) -> None:
        self._make_collector = make_collector
        self.chords = chords
        self.accept = accept
        self._away = 0

    @lazy
    def collector(self) -> Collector:
        """Looks at the queues of parts."""
        return self._make_collector()

    def waits(self, change: int, group_id: str) -> None:
        """So many more members, or fewer, wait for a queue that is away. One log line, however many there are."""
        if not self._away:
            logger.warning("the parts of chord %s cannot be reached now; tried again, as others' if need be", group_id)
        self._away += change

    def add(self, part: ChordPart, following: FollowUpPublisher, on_done: OnDone) -> None:
        """Publish a part, and the chord's body if it was the last part. `on_done` is called when that is confirmed, or when
        another worker has to publish the body."""
        _Member(self, part, following, on_done).store()

    def stop(self) -> None:
        """Close the connection, if there was a chord."""
        if "collector" in vars(self):
            self.collector.stop()


class _Member:
    """One part: it is published, then the chord's queue is looked at."""

    def __init__(self, joiner: ChordJoiner, part: ChordPart, following: FollowUpPublisher, on_done: OnDone) -> None:
        self._joiner = joiner
        self._part = part
        self._following = following
        self._on_done = on_done
        self._pauses = Pauses()
        self._is_stored = False
        self._is_away = False
        self._was_gone = False

    def store(self) -> None:
        self._following.store(
            self._part.message, self._stored, on_stopped=partial(self._on_done, False), patience=_patience
        )

    def _stored(self, error: PublishError | None) -> None:
        if error is None:
            self._is_stored = True
            self._look()
        elif isinstance(error, Unroutable):
            self._look()
        elif never_fits(error) and not self._part.is_broken:
            logger.error("the part of task %s cannot be published, so its chord fails: %s", self._part.task_id, error)
            self._part = self._joiner.chords.broken(self._part, error)
            self.store()
        else:
            self._give_up(f"a part cannot be published: {error}")

    def _look(self) -> None:
        part = self._part
        self._joiner.collector.collect(part.queue, part.size, take=self._take, on_done=self._looked)

    def _looked(self, presence: QueuePresence) -> None:
        if presence is QueuePresence.GONE and not (self._is_stored or self._was_gone or self._following.is_stopping()):
            self._was_gone = True
            self._following.later(AGAIN_SECONDS, self.store)
            return
        is_dealt_with = presence is QueuePresence.GONE or (presence is QueuePresence.THERE and self._is_stored)
        if not (is_dealt_with or self._following.is_stopping() or self._pauses.waited >= AWAY_SECONDS):
            self._set_away(True)
            self._following.later(self._pauses.next(), self._look if self._is_stored else self.store)
            return
        self._set_away(False)
        if is_dealt_with or self._following.is_stopping():
            self._on_done(is_dealt_with)
        else:
            self._give_up("its parts are in a queue that cannot be reached")

    def _set_away(self, is_away: bool) -> None:
        if is_away != self._is_away:
            self._is_away = is_away
            self._joiner.waits(1 if is_away else -1, self._part.group_id)

    # -- the body

    def _take(self, deliveries: Sequence[Delivery], finished: OnDone) -> bool:
        """Publish the body if all parts have come."""
        part, chords = self._part, self._joiner.chords
        try:
            gathered = gather((delivery.content for delivery in deliveries), self._joiner.accept)
            if not gathered.is_complete(part.size):
                return False
            parts = gathered.in_order()
        except MessageError as error:  # reading it again cannot help
            unreadable = ChordError(f"a part of chord {part.group_id} is unreadable: {error}")
            self._end(lambda: chords.failed(part.body, unreadable), finished)
        else:
            self._end(lambda: chords.joined(part.body, part.group_id, parts, part.task_id), finished)
        return True

    def _give_up(self, reason: str) -> None:
        error = ChordError(f"chord {self._part.group_id} fails: {reason}")
        logger.error("%s", error)
        self._end(lambda: self._joiner.chords.failed(self._part.body, error), self._on_done)

    def _end(self, make: Callable[[], FollowUps], on_done: OnDone) -> None:
        try:
            after = make()
        except BackendUnreachable as error:
            logger.warning("the body of chord %s waits for the result store: %s", self._part.group_id, error)
            if self._following.is_stopping():
                on_done(False)
            else:
                self._following.later(STORE_PAUSE, lambda: self._end(make, on_done))
            return
        self._following.follow(after.publish, after.parts, None, on_done, error_from=_callback_error)


def _callback_error(error: PublishError) -> ChordError:
    return ChordError(f"Callback error: {error!r}")

"""Leadership: of all beats of one application, one schedules; who that is, and where it stands, is held by the broker.

One durable queue holds one message, the state: where each entry stands. It is a quorum queue with a *single active consumer*
(https://www.rabbitmq.com/docs/consumers#single-active-consumer): all beats consume it, one gets what is in it, and keeps it
unanswered. That one leads. When its connection ends, for whatever reason, the broker gives the state to the next beat.

    leader:  publish what is due ─confirm─► publish the new state ─confirm, and it comes back─► acknowledge the old one

* The queue is never without a state: the new one is stored before the old one goes. A leader that dies in between leaves
  both; its successor gets both and merges them.
* What is due is published over the very connection that holds the state. A leader that is cut off has lost both: what
  it writes then reaches nobody, and is not sent again on its next connection.
* A state that a leader has stored comes back to itself, because it is the consumer that gets them. If it does not, another beat
  leads: the broker gave it the state while the leader's node was cut off from the others. Then the former leader makes another
  connection, like one that lost it.
* A beat that dies after publishing and before storing the state has its last due times published once more by its
  successor, under the same task ids.
* Every beat adds a state of its own when it comes (a *seed*: what it knows, usually nothing), so that there is one on the
  first start of all, and after somebody deleted the queue. Merging makes it harmless, and tells a new leader of the
  queue's second life what the old one knew.
* A held message must not grow old: RabbitMQ ends consumers that keep one for long (consumer_timeout, 30 minutes), and counts
  deliveries. Every state is a new message, and there is a new one each minute at the least.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from amqtask.exceptions import PublishTimeout
from amqtask.ground.loop import OneTimer
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.entities import Queue, arguments
from amqtask.protocol.message import Message, Properties
from amqtask.topology.declarations import DISCONNECTED

if TYPE_CHECKING:
    from amqtask.exceptions import PublishError
    from amqtask.pool import Loop
    from amqtask.protocol.message import Delivery
    from amqtask.transport.contract import Consumer, ConsumerListener, LoopPublisher

logger = bounded_logger("amqtask.beat")

# Two states, seeds of beats that come at once, and room.
PREFETCH = 100
# States that were left together come together; so long (seconds) the first waits for the others.
SETTLE_SECONDS = 0.05
RETRY_SECONDS = 0.3
# A leader's stored state comes back to it at once, or in so many seconds at the latest.
BACK_SECONDS = 5.0
# RabbitMQ 4 gives every quorum queue a delivery limit of 20; each change of leaders is a delivery. (-1 is refused by 3.x.)
NO_LIMIT = 1_000_000


class LeaderListener(Protocol):
    """What Leadership calls, on the I/O loop: the beat that schedules while it leads."""

    def on_leading(self, states: Sequence[bytes]) -> None:
        """This beat leads from now on, and goes on from these states."""

    def on_states(self, states: Sequence[bytes]) -> None:
        """While leading: others have added these. Save, so that they are taken out."""

    def on_following(self, reason: str) -> None:
        """This beat leads no more; what it was publishing may or may not be stored."""

    def on_failed(self, error: Exception) -> None:
        """This beat cannot take part (login refused, queue locked)."""


def leader_queue(name: str, *, queue_type: str) -> Queue:
    """The queue that holds the state of the beats called `name`."""
    queue_arguments: dict[str, object] = {"x-queue-type": queue_type, "x-single-active-consumer": True}
    if queue_type == "quorum":
        queue_arguments["x-delivery-limit"] = NO_LIMIT
        queue_arguments.update(DISCONNECTED)
    return Queue(name, arguments=arguments(queue_arguments))


class Leadership:
    """Takes part in holding the state. `seed()` is what this beat knows; consumer and publisher share one connection."""

    def __init__(
        self,
        queue: Queue,
        *,
        loop: Loop,
        make_consumer: Callable[[ConsumerListener], Consumer],
        publisher: LoopPublisher,
        listener: LeaderListener,
        seed: Callable[[], bytes],
    ) -> None:
        self._queue = queue
        self._loop = loop
        self._publisher = publisher
        self._listener = listener
        self._seed = seed
        self._consumer = make_consumer(self)
        self._consumer.add_queue(queue, prefetch=PREFETCH)
        self._epoch = -1
        self._last_tag = self._acked_tag = 0
        self._published_ids: set[str] = set()
        # The id of a stored state that has not come back yet, and what follows when it does; until when it may.
        self._awaited: tuple[str, Callable[[], None]] | None = None
        self._awaiting = OneTimer(loop)
        self._waiting: list[bytes] = []
        self._settling = OneTimer(loop)
        self._is_leading = False
        self._is_stopped = False

    @property
    def is_leading(self) -> bool:
        """Whether this beat holds the state."""
        return self._is_leading

    def start(self) -> None:
        """Begin to consume the queue of the state."""
        self._consumer.start()
        self._publisher.start()

    def stop(self, on_stopped: Callable[[], None] | None = None) -> None:
        """Stop consuming: the next beat gets the state as soon as the connection is closed."""
        self._is_stopped = True
        self._forget()
        self._publisher.stop()
        self._consumer.stop(on_stopped=on_stopped)

    def save(self, state: bytes, on_saved: Callable[[], None]) -> None:
        """Replace all states that are held by a new one; `on_saved` follows unless leadership is lost before."""
        epoch, upto, message_id = self._epoch, self._last_tag, str(uuid.uuid4())

        def is_back() -> None:
            # A tag that is not outstanding would close the channel.
            if upto > self._acked_tag:
                self._acked_tag = upto
                self._consumer.ack(upto, multiple=True)
            on_saved()

        def confirmed(error: PublishError | None) -> None:
            if epoch != self._epoch or not self._is_leading:
                return
            if error is not None:
                logger.warning("beat: the state could not be stored, trying again: %s", error)
                self._loop.call_later(RETRY_SECONDS, lambda: self._save_again(epoch, state, on_saved))
                return
            if message_id in self._published_ids:
                self._awaited = message_id, is_back
                self._awaiting.set(BACK_SECONDS, self._is_not_back)
            else:
                is_back()

        self._publish(state, confirmed, message_id)

    def _is_not_back(self) -> None:
        self._awaited = None
        self._consumer.leave("the state went to another beat")

    def _save_again(self, epoch: int, state: bytes, on_saved: Callable[[], None]) -> None:
        if epoch == self._epoch and self._is_leading:
            self.save(state, on_saved)

    def _publish(
        self, state: bytes, on_done: Callable[[PublishError | None], None], message_id: str | None = None
    ) -> None:
        message_id = message_id or str(uuid.uuid4())
        self._published_ids.add(message_id)
        properties = Properties(content_type="application/json", message_id=message_id)
        self._publisher.publish(Message(state, properties, "", self._queue.name, (self._queue,)), on_done)

    def _plant(self) -> None:
        def confirmed(error: PublishError | None) -> None:
            # A queue that is just being deleted refuses. (After a lost connection the next one brings another seed.)
            if error is not None and not isinstance(error, PublishTimeout) and not self._is_stopped:
                logger.debug("beat: a seed was not stored, trying again: %s", error)
                self._loop.call_later(RETRY_SECONDS, self._plant)

        self._publish(self._seed(), confirmed)

    # -- what the consumer tells

    def on_delivery(self, delivery: Delivery) -> None:
        """A state: the first one makes this beat the leader."""
        if delivery.epoch != self._consumer.epoch:
            return
        self._epoch, self._last_tag = delivery.epoch, delivery.tag
        message_id = delivery.properties.message_id
        if self._is_leading and message_id in self._published_ids:
            self._published_ids.discard(message_id)
            if self._awaited is not None and self._awaited[0] == message_id:
                _, is_back = self._awaited
                self._await_nothing()
                is_back()
            return
        self._waiting.append(delivery.body)
        if not self._settling.is_set:
            self._settling.set(SETTLE_SECONDS, self._settled)

    def _settled(self) -> None:
        states, self._waiting = self._waiting, []
        if self._is_leading:
            self._listener.on_states(states)
        else:
            self._is_leading = True
            self._listener.on_leading(states)

    def on_consuming(self, epoch: int) -> None:
        """The queue is consumed (again): publish a seed."""
        self._plant()

    def on_connection_lost(self, error: Exception) -> None:
        """The broker has the state again, and what was written since it noticed reaches nobody."""
        self._published_ids.clear()
        self._follow(f"the connection was lost: {error}")

    def on_cancelled(self, queue: str, reason: str) -> None:
        """The queue was deleted or moved, or (RabbitMQ 4.3) the state was held for too long: begin again."""
        if self._last_tag and self._is_leading:
            self._consumer.nack(self._last_tag)
        self._follow(reason)
        if not self._is_stopped:
            self._plant()

    def on_fatal(self, error: Exception) -> None:
        """The consumer makes no further attempt: tell the listener."""
        self._follow(str(error))
        self.stop()
        self._listener.on_failed(error)

    def unanswered(self, queue: str) -> int:
        """All that may be: the state is held, unanswered, for as long as this beat leads."""
        return PREFETCH

    def on_warning(self, text: str) -> None:
        """Log a warning of the consumer's."""
        logger.warning("beat: %s", text)

    def _follow(self, reason: str) -> None:
        was_leading = self._is_leading
        self._forget()
        if was_leading:
            self._listener.on_following(reason)

    def _forget(self) -> None:
        self._is_leading = False
        self._epoch, self._last_tag, self._acked_tag = -1, 0, 0
        self._waiting.clear()
        self._await_nothing()
        self._settling.cancel()

    def _await_nothing(self) -> None:
        self._awaited = None
        self._awaiting.cancel()

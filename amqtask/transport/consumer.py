"""Consumer: queues over one connection and channel, manual acks, per-consumer prefetch, for ever; see transport.contract.

Every channel has an epoch. A delivery is answered on the channel it came on or not at all: after a reconnect the broker has
requeued it, and the same tag means another message. The epoch changes at the moment the channel is gone, before the listener
is called.

A prefetch window is changed with another consumer: `basic.qos` with global=false applies to consumers started after it, not to
running ones (https://www.rabbitmq.com/docs/consumer-prefetch), and RabbitMQ 4.3 denies global=true. To grow the window, a further
consumer gets the difference; to shrink it, one with the new window is started, and the others are cancelled when it is confirmed.
All of them are on one channel, which stands still while a node of RabbitMQ 4.3 that has lost the others starts or cancels one of
them (`rabbit_fifo_client:checkout`, for a minute). Who cannot wait for that has a second consumer, on a channel of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from pika.exceptions import ChannelClosedByBroker, ChannelWrongStateError, NoFreeChannels

from amqtask.exceptions import AccessRefused, OperationalError, PublishRefused
from amqtask.ground.loop import OneTimer
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.entities import Declaration, Queue
from amqtask.protocol.message import Delivery
from amqtask.topology.declarations import consumption, is_quorum
from amqtask.transport.connection import Backoff, ConnectionListener, LoopConnection
from amqtask.transport.contract import ConsumerListener
from amqtask.transport.declare import RESOURCE_LOCKED, Declarer, QueueLocked
from amqtask.transport.errors import ACCESS_REFUSED, lacks
from amqtask.transport.lookout import Lookout, Watch, Watched, can_be_watched
from amqtask.transport.wire import close_with_consumers, take_until_cancelled

if TYPE_CHECKING:
    from collections.abc import Iterable

    from amqtask.protocol.message import Message, PropertiesLike
    from amqtask.transport.wire import PikaChannel, PikaFrame, PikaMethod, Wire


# basic.qos has 16 bits; 0 is none.
GLOBAL_PREFETCH, NO_PREFETCH = 65535, 0
logger = bounded_logger("amqtask.transport")
_tuple = tuple.__new__

# RabbitMQ waits for a queue's leader for half a minute and more, even when the leader stands still or has just been replaced, and
# the channel does nothing else meanwhile. When no consumer is confirmed for so long (seconds), a new connection is made.
START_SECONDS, LONGEST_START_SECONDS = 3.0, 6.0
# From 4.3 on a consumer of a quorum queue says itself for how long (milliseconds) it may hold a delivery; else the broker takes a
# delivery back after half an hour (https://www.rabbitmq.com/docs/consumers#acknowledgement-timeout). A worker that is gone loses
# its connection, and one that is stuck is told of by its watchdog: two weeks.
HELD_FOR = {"x-consumer-timeout": 14 * 24 * 3600 * 1000}
OWN_TIMEOUTS_SINCE = (4, 3)
# Of a queue that somebody else has made of another type: "PRECONDITION_FAILED - invalid arg 'x-consumer-timeout' for queue …".
_MAY_NOT_HOLD = "invalid arg 'x-consumer-timeout'"


def keeps_consumers_of_deleted(connection: Wire) -> bool:
    """Whether the broker is a RabbitMQ before 4."""
    return () < connection.server_version < (4,)


class RecreationGuard:
    """The global prefetch of one channel: for queues that are deleted and made anew within milliseconds.

    RabbitMQ 3 keeps their consumers, and drops what it delivers to them. The channel of a deleted quorum queue consumes the
    queue of that name again by itself, because the name may have moved to another node (rabbit_channel.erl,
    `handle_consuming_queue_down_or_eol`; RabbitMQ 4 cancels the consumers). The client is told nothing, and the channel goes on
    counting from the deliveries of the old queue: as many of the new one do not come, and stay unanswered until the channel is
    closed.

    The channel may not consume a quorum queue while it has a global prefetch (error 540; a running consumer heeds no such
    prefetch). So it gets one once all its consumers have started. Then that attempt fails, and the client is told that the
    consumer is cancelled, as for other deleted queues. Classic queues are told anyway, and would ask for leave before each
    delivery: a channel that has one gets no global prefetch.
    """

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._is_set = False

    def lift(self) -> None:
        """A consumer is about to be started."""
        if self._is_set:
            self._is_set = False
            self._channel.basic_qos(prefetch_count=NO_PREFETCH, global_qos=True)

    def set(self, queues: Iterable[Queue]) -> None:
        """All consumers of the channel have started, and these are the queues."""
        if not self._is_set and all(map(is_quorum, queues)):
            self._is_set = True
            self._channel.basic_qos(prefetch_count=GLOBAL_PREFETCH, global_qos=True)


@dataclass(slots=True, eq=False)
class _Consumed:
    """One queue that is consumed, or is to be consumed."""

    queue: Queue
    declare: tuple[Declaration, ...]
    prefetch: int
    # Tags of its consumers on the present channel; the last one has the present window.
    tags: list[str] = field(default_factory=list)
    is_declaring: bool = False
    was_consumed: bool = False
    # Whether the broker takes HELD_FOR for it, which it does for quorum queues alone.
    may_hold: bool = True
    watch: Watch = field(default_factory=Watch)


class PikaConsumer(ConnectionListener):
    """A Consumer on pika's SelectConnection. `no_ack` is for mailboxes whose messages need no answer; others may use the
    connection, too. `is_second`: see transport.contract.SharedEnds."""

    def __init__(
        self, connection: LoopConnection, listener: ConsumerListener, *, no_ack: bool = False, is_second: bool = False
    ) -> None:
        loop = connection.loop
        self._listener = listener
        self._no_ack = no_ack
        self._is_second = is_second
        self._connection, self._use = connection, connection.join(self)
        self._declarer = Declarer(loop, listener.on_warning)
        self._lookout = Lookout(
            loop,
            watched=self._watched,
            on_stalled=self._stalled,
            on_better=lambda steps, why: self._connection.leave(why, steps=steps),
            elsewhere=self._connection.elsewhere,
            hosts=self._connection.hosts,
        )
        self._pika: Wire | None = None
        # The present channel, once it is open; and the one that is being opened.
        self._channel: Any = None
        self._opening: PikaChannel | None = None
        self._guard: RecreationGuard | None = None
        self._has_own_timeouts = False
        self._epoch = 0
        self._queues: dict[str, _Consumed] = {}
        # Consumers that the broker has not confirmed yet, in the order in which it will confirm them.
        self._starting: dict[str, _Consumed] = {}
        self._window: int | None = None
        self._is_paused = False
        self._is_consuming = False
        self._was_consuming = False
        self._complaints: set[str] = set()
        # Warnings given since the connection was lost: each once.
        self._unreachable: set[str] = set()
        self._backoff = Backoff()
        self._timer, self._start_timer = OneTimer(loop), OneTimer(loop)
        self._start_seconds = START_SECONDS
        self._consumer_number = 0

    # -- the contract

    @property
    def host(self) -> str:
        """The URL, without password, of the host that it is connected to; empty while it is not."""
        return self._connection.host

    @property
    def epoch(self) -> int:
        """The number of the present channel."""
        return self._epoch

    @property
    def is_consuming(self) -> bool:
        """Whether all queues are being consumed on an open channel."""
        return self._is_consuming and not self._is_paused

    def start(self) -> None:
        """Connect; the listener is told the result."""
        self._use.start()

    def add_queue(
        self,
        queue: Queue,
        *,
        prefetch: int,
        dead_letter: Queue | None = None,
        declare: tuple[Declaration, ...] | None = None,
    ) -> None:
        """Consume one more queue; `declare` (default: the queue, its dead-letter queue and its bindings) is declared first."""
        if queue.name in self._queues:
            self.set_prefetch(queue.name, prefetch)
            return
        plan = consumption(queue, dead_letter) if declare is None else declare
        self._queues[queue.name] = _Consumed(queue, plan, prefetch)
        self._set_up()

    def cancel_queue(self, name: str) -> None:
        """Stop deliveries of one queue."""
        consumed = self._queues.pop(name, None)
        if consumed is not None:
            self._cancel(consumed, list(consumed.tags))
            self._look_complete()

    def set_prefetch(self, queue: str, prefetch: int) -> None:
        """Change the prefetch window of one queue."""
        consumed = self._queues.get(queue)
        if consumed is None or consumed.prefetch == prefetch:
            return
        before, consumed.prefetch = consumed.prefetch, prefetch
        if not consumed.tags or not self._is_open:
            return  # it gets its window when it is consumed
        if prefetch > before:
            self._consume(consumed, prefetch - before)
            return
        old = list(consumed.tags)
        self._consume(consumed, prefetch, on_started=lambda: self._cancel(consumed, old))

    def ack(self, tag: int, *, multiple: bool = False) -> None:
        """basic.ack on the present channel; does nothing when the channel is gone."""
        if self._is_open:
            self._channel.basic_ack(tag, multiple)

    def reject(self, tag: int, *, requeue: bool) -> None:
        """basic.reject."""
        if self._is_open:
            self._channel.basic_reject(tag, requeue)

    def replace(self, delivery: Delivery, messages: Sequence[Message], on_done: Callable[[bool], None]) -> bool:
        """AMQP has no such step."""
        return False

    def nack(self, tag: int, *, requeue: bool = True) -> None:
        """basic.nack."""
        if self._is_open:
            self._channel.basic_nack(tag, False, requeue)

    def pause(self) -> None:
        """No more deliveries; the channel stays for answers."""
        self._is_paused = True
        for consumed in self._queues.values():
            self._cancel(consumed, list(consumed.tags))

    def resume(self) -> None:
        """Deliveries again."""
        self._is_paused = False
        self._set_up()

    def leave(self, reason: str) -> None:
        """Treat the connection as lost, and go on with the next host."""
        self._connection.leave(reason)

    def go_to(self, host: str, reason: str) -> None:
        """Leave for the host with this URL, if it is one of several and not the present one."""
        self._connection.go_to(host, reason)

    def stop(self, *, on_stopped: Callable[[], None] | None = None) -> None:
        """Close; answers that were written go out first."""
        self._timer.cancel()
        self._pika, channel = None, self._channel or self._opening
        self._drop_channel()
        if self._is_second and channel is not None:
            close_with_consumers(channel)
        self._declarer.lost()
        self._lookout.end()
        self._use.stop(on_stopped)

    # -- the connection's events

    def on_open(self, connection: Wire) -> None:
        """There is a connection: open the channel."""
        self._timer.cancel()
        self._unreachable.clear()
        self._pika = connection
        self._has_own_timeouts = connection.server_version >= OWN_TIMEOUTS_SINCE
        self._declarer.connected(connection)
        if not (self._no_ack or self._is_second):
            self._lookout.begin(connection)
        try:
            self._open_channel()
        except NoFreeChannels:
            if not self._is_second:
                raise
            # It gets nothing, and the first one goes on.

    def on_lost(self, error: Exception) -> None:
        """The broker has requeued all unanswered deliveries."""
        self._timer.cancel()
        self._pika = None
        self._declarer.lost()
        self._lookout.end()
        for consumed in self._queues.values():
            consumed.is_declaring = False
        self._drop_channel()
        self._listener.on_connection_lost(error)

    def on_unreachable(self, error: Exception) -> None:
        """A whole round of hosts failed: warn, once for each reason; another round follows."""
        if str(error) not in self._unreachable:
            self._unreachable.add(str(error))
            self._listener.on_warning(f"{error} Trying again until it does.")

    def on_refused(self, error: Exception) -> None:
        """No further attempt makes sense."""
        self.stop()
        self._listener.on_fatal(error)

    # -- the channel

    @property
    def _is_open(self) -> bool:
        return self._channel is not None and self._channel.is_open

    def _open_channel(self) -> None:
        if self._pika is not None and self._pika.is_open and self._opening is None and self._channel is None:
            self._opening = self._pika.channel(on_open_callback=self._on_channel)
            self._opening.add_on_close_callback(self._on_channel_closed)
            self._opening.add_on_cancel_callback(self._on_cancelled)
            # Meanwhile, on a channel of its own.
            self._set_up()

    def _on_channel(self, channel: PikaChannel) -> None:
        if channel is not self._opening:
            return
        self._opening, self._channel = None, channel
        self._guard = None
        if self._pika is not None and not self._no_ack and keeps_consumers_of_deleted(self._pika):
            self._guard = RecreationGuard(channel)
        self._window = None
        self._epoch += 1
        self._set_up()

    def _on_channel_closed(self, channel: PikaChannel, error: Exception) -> None:
        if channel not in (self._channel, self._opening):
            return
        refused = next(iter(self._starting.values()), None)
        self._drop_channel()
        if self._pika is None or not self._pika.is_open:
            return  # the connection's own end follows
        if refused is not None and _MAY_NOT_HOLD in str(error):
            refused.may_hold = False
        fatal = _refusal(error, refused)
        if fatal is not None and not self._was_consuming:
            self._listener.on_fatal(fatal)
            return
        if fatal is not None and refused is not None and not refused.was_consumed:
            self._give_up(refused, fatal)
        self._listener.on_connection_lost(error)
        self._retry_later()

    def _drop_channel(self) -> None:
        if self._channel is not None:
            self._epoch += 1
        self._channel = self._opening = None
        self._is_consuming = False
        self._starting.clear()
        self._watch_start()
        for consumed in self._queues.values():
            consumed.tags.clear()

    # -- from a queue's name to its consumer

    def _set_up(self) -> None:
        """Declare what has no consumer yet, then consume it."""
        if self._is_paused or self._pika is None or not self._pika.is_open:
            return
        shared: set[Declaration] = set()
        for consumed in list(self._queues.values()):
            if not consumed.tags and not consumed.is_declaring:
                consumed.is_declaring = True
                entities = [entity for entity in consumed.declare if entity not in shared]
                shared.update(entities)
                self._declarer.declare(entities, partial(self._declared, consumed))
        self._look_complete()

    def _declared(self, consumed: _Consumed, error: OperationalError | None) -> None:
        consumed.is_declaring = False
        if self._queues.get(consumed.queue.name) is not consumed:
            return
        # The broker did not answer in time: a queue that was consumed before probably still exists.
        is_known = consumed.was_consumed and isinstance(error, PublishRefused) and self._is_open
        if error is not None and not is_known:
            self._not_declared(consumed, error)
        elif self._is_open and not self._is_paused:
            self._consume(consumed, consumed.prefetch)

    def _not_declared(self, consumed: _Consumed, error: OperationalError) -> None:
        is_final = isinstance(error, (AccessRefused, QueueLocked))
        if is_final and not self._was_consuming:
            self._listener.on_fatal(error)
        elif is_final and not consumed.was_consumed:
            self._give_up(consumed, error)
        else:
            subject = f"queue {consumed.queue.name!r}"
            if isinstance(error, PublishRefused):
                subject = "some of the queues"  # one line for all that wait
            self._complain(f"{subject} cannot be consumed, trying again: {error}")
            self._retry_later()

    def _give_up(self, consumed: _Consumed, error: Exception) -> None:
        """Stop trying to consume a queue that was added later and that we may not consume; the others go on."""
        del self._queues[consumed.queue.name]
        self._complain(f"queue {consumed.queue.name!r} is not consumed: {error}")
        self._look_complete()

    def _complain(self, text: str) -> None:
        if text not in self._complaints:
            self._complaints.add(text)
            self._listener.on_warning(text)

    def _consume(self, consumed: _Consumed, prefetch: int, *, on_started: Callable[[], None] | None = None) -> None:
        self._consumer_number += 1
        tag = f"amqtask-{self._consumer_number}"
        consumed.tags.append(tag)
        consumed.watch.has_moved = True
        self._starting[tag] = consumed
        if self._guard is not None:
            self._guard.lift()
        if not self._no_ack and prefetch != self._window:
            self._window = prefetch
            self._channel.basic_qos(prefetch_count=prefetch)
        if self._declarer.is_of_other_type(consumed.queue):
            consumed.may_hold = False
        own = not self._no_ack and self._has_own_timeouts and consumed.may_hold and is_quorum(consumed.queue)
        self._channel.basic_consume(
            consumed.queue.name,
            _deliver_to(self._listener.on_delivery, consumed, self._epoch),
            auto_ack=self._no_ack,
            consumer_tag=tag,
            arguments=HELD_FOR if own else None,
            callback=lambda _: self._started(tag, on_started),
        )
        if not self._start_timer.is_set:
            self._watch_start()

    def _watch_start(self) -> None:
        """Start the timer for the next consumer's confirm. Only until all queues are consumed: a new connection would then cost
        the deliveries of this one."""
        self._start_timer.cancel()
        if self._starting and not self._is_consuming and not self._is_second:
            self._start_timer.set(self._start_seconds, self._starts_late)

    def _starts_late(self) -> None:
        seconds = self._start_seconds
        self._start_seconds = min(seconds * 2, LONGEST_START_SECONDS)
        self._connection.leave(f"the broker has confirmed no consumer for {seconds:g} s")

    def _started(self, tag: str, on_started: Callable[[], None] | None) -> None:
        consumed = self._starting.pop(tag, None)
        if consumed is not None:
            consumed.was_consumed = True
            self._start_seconds = START_SECONDS
            self._watch_start()
            if self._guard is not None and not self._starting:
                self._guard.set(consumed.queue for consumed in self._queues.values())
        if on_started is not None:
            on_started()
        self._look_complete()

    def _look_complete(self) -> None:
        """Call `on_consuming`, once per channel, when all queues are consumed."""
        if self._is_consuming or self._starting or self._is_paused or not self._is_open:
            return
        if all(consumed.tags for consumed in self._queues.values()):
            self._is_consuming = self._was_consuming = True
            self._backoff.succeeded()
            self._listener.on_consuming(self._epoch)

    # -- ending consumers

    def _cancel(self, consumed: _Consumed, tags: Sequence[str]) -> None:
        for tag in tags:
            if tag not in consumed.tags or not self._is_open:
                continue
            consumed.tags.remove(tag)
            try:
                self._channel.basic_cancel(tag, callback=lambda _: None)
            except ChannelWrongStateError:
                return  # the channel is closing: its consumers go with it
            take_until_cancelled(self._channel, tag)

    def _on_cancelled(self, frame: PikaFrame) -> None:
        """The broker ended a consumer: its queue was deleted or moved, or (4.3) a delivery was held for too long."""
        tag = frame.method.consumer_tag
        for name, consumed in list(self._queues.items()):
            if tag in consumed.tags:
                consumed.tags.remove(tag)
                self._starting.pop(tag, None)
                # The queue's other consumers have parts of its window: they are replaced by one with the whole window.
                self._cancel(consumed, list(consumed.tags))
                self._listener.on_cancelled(name, "cancelled by the broker")
                self._retry_later()

    # -- consumers that get nothing

    def _watched(self) -> list[Watched]:
        return [
            Watched(consumed.queue, consumed.watch, consumed.prefetch - self._listener.unanswered(consumed.queue.name))
            for consumed in self._queues.values()
            if can_be_watched(consumed.queue) and any(tag not in self._starting for tag in consumed.tags)
        ]

    def _stalled(self, queue: str, why: str) -> None:
        """Consume it anew."""
        consumed = self._queues.get(queue)
        if consumed is not None and consumed.tags and self._is_open:
            self._listener.on_warning(f"{why}; it is consumed anew")
            old = list(consumed.tags)
            self._consume(consumed, consumed.prefetch, on_started=lambda: self._cancel(consumed, old))

    # -- another attempt

    def _retry_later(self) -> None:
        if not self._timer.is_set:
            self._timer.set(self._backoff.next(), self._retry)

    def _retry(self) -> None:
        self._open_channel()
        self._set_up()


def _deliver_to(on_delivery: Callable[[Delivery], None], consumed: _Consumed, epoch: int) -> Callable[..., None]:
    """pika's callback for one consumer: the hot path."""
    queue, watch = consumed.queue.name, consumed.watch

    def on_message(channel: object, method: PikaMethod, properties: PropertiesLike, body: bytes) -> None:
        # As Delivery(…), in a third of the time.
        delivery = _tuple(
            Delivery,
            (
                body, properties, method.exchange, method.routing_key, method.redelivered, queue, method.delivery_tag, epoch
            ),
        )  # fmt: skip
        watch.has_moved = True
        try:
            on_delivery(delivery)
        except Exception:
            # pika would treat it as a broken connection, and all other messages under way would be lost with it.
            logger.exception("a message on %s could not be handled", queue)

    return on_message


def _refusal(error: Exception, consumed: _Consumed | None) -> OperationalError | None:
    """Why the broker does not let us consume a queue, if that is why it closed the channel."""
    if consumed is None or not isinstance(error, ChannelClosedByBroker):
        return None
    if error.reply_code == ACCESS_REFUSED:
        return AccessRefused(f"may not consume queue {consumed.queue.name!r}: {lacks('read', error.reply_text)}")
    if error.reply_code == RESOURCE_LOCKED:
        return QueueLocked(f"queue {consumed.queue.name!r} belongs to another connection: {error.reply_text}")
    return None

"""Consumer: queues over one connection and channel, manual acks, per-consumer prefetch, for ever; see transport.contract.

Every channel has an epoch. A delivery is answered on the channel it came on or not at all: after a reconnect the broker has
requeued it, and the same tag means another message.

A prefetch window is changed by another consumer: `basic.qos` with global=false applies to consumers started after it, not to
running ones (https://www.rabbitmq.com/docs/consumer-prefetch), and RabbitMQ 4.3 denies global=true.
To grow, a further consumer gets the difference; to shrink, one with the new window is started, and the others are
cancelled when it is confirmed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pika.exceptions import ChannelClosedByBroker, ChannelWrongStateError

from amqtask.entities import Declaration, Queue
from amqtask.exceptions import AccessRefused, OperationalError
from amqtask.message import Delivery
from amqtask.topology.plan import consumption
from amqtask.transport.connection import LoopConnection
from amqtask.transport.contract import ConsumerListener
from amqtask.transport.declare import Declaring
from amqtask.transport.link import ACCESS_REFUSED, entity_name
from amqtask.transport.loop import LoopTimer, PikaLoop
from amqtask.transport.url import BrokerAddress

RESOURCE_LOCKED = 405
# Pauses before a cancelled consumer or a closed channel is set up again (seconds).
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0


@dataclass(slots=True)
class _Consumed:
    """One queue that is consumed, or is to be."""

    queue: Queue
    declare: tuple[Declaration, ...]
    prefetch: int
    # Tags of its consumers on the present channel; the last one has the present window.
    tags: list[str] = field(default_factory=list)


class PikaConsumer:
    """A Consumer on pika's SelectConnection. `no_ack` is for mailboxes whose messages need no answer."""

    def __init__(
        self,
        addresses: Sequence[BrokerAddress],
        loop: PikaLoop,
        listener: ConsumerListener,
        *,
        heartbeat: int | None = 60,
        connect_timeout: float = 4.0,
        client_name: str = "",
        no_ack: bool = False,
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._no_ack = no_ack
        self._connection = LoopConnection(
            addresses, loop, self, heartbeat=heartbeat, connect_timeout=connect_timeout, name=client_name
        )
        self._pika: Any = None
        self._channel: Any = None
        self._epoch = 0
        self._queues: dict[str, _Consumed] = {}
        self._found: set[Declaration] = set()
        self._declaring: Declaring | None = None
        self._is_paused = False
        self._is_consuming = False
        self._pause = FIRST_PAUSE
        self._timer: LoopTimer | None = None
        self._consumer_number = 0
        self._on_stopped: Callable[[], None] | None = None

    # -- the contract

    @property
    def epoch(self) -> int:
        """The number of the present channel."""
        return self._epoch

    @property
    def is_consuming(self) -> bool:
        """Whether all queues are being consumed on an open channel."""
        return self._is_consuming and not self._is_paused

    def start(self) -> None:
        """Connect; what comes of it is told to the listener."""
        self._connection.start()

    def add_queue(
        self,
        queue: Queue,
        *,
        prefetch: int,
        dead_letter: Queue | None = None,
        declare: tuple[Declaration, ...] | None = None,
    ) -> None:
        """Consume a queue too; `declare` is what it needs, else the queue, its dead-letter queue and its bindings."""
        plan = consumption(queue, dead_letter) if declare is None else declare
        self._queues[queue.name] = _Consumed(queue, plan, prefetch)
        if self._is_ready:
            self._set_up()

    def cancel_queue(self, name: str) -> None:
        """Stop deliveries of one queue."""
        consumed = self._queues.pop(name, None)
        if consumed is not None and self._is_ready:
            self._cancel(consumed)

    def set_prefetch(self, queue: str, prefetch: int) -> None:
        """Another window for one queue's consumer."""
        consumed = self._queues.get(queue)
        if consumed is None or consumed.prefetch == prefetch:
            return
        before, consumed.prefetch = consumed.prefetch, prefetch
        if not consumed.tags or not self._is_ready or self._is_paused:
            return
        if prefetch > before:
            self._consume(consumed, prefetch - before, on_started=lambda: None)
            return
        old = list(consumed.tags)
        self._consume(consumed, prefetch, on_started=lambda: self._cancel_tags(consumed, old))

    def ack(self, tag: int, *, multiple: bool = False) -> None:
        """basic.ack on the present channel; nothing when it is gone."""
        if self._is_ready:
            self._channel.basic_ack(tag, multiple)

    def reject(self, tag: int, *, requeue: bool) -> None:
        """basic.reject."""
        if self._is_ready:
            self._channel.basic_reject(tag, requeue)

    def nack(self, tag: int, *, requeue: bool = True) -> None:
        """basic.nack."""
        if self._is_ready:
            self._channel.basic_nack(tag, False, requeue)

    def pause(self) -> None:
        """No more deliveries; the channel stays for answers."""
        self._is_paused = True
        if self._is_ready:
            for consumed in self._queues.values():
                self._cancel(consumed)

    def resume(self) -> None:
        """Deliveries again."""
        self._is_paused = False
        if self._is_ready:
            self._set_up()

    def stop(self, *, on_stopped: Callable[[], None] | None = None) -> None:
        """Close; answers that were written go out first."""
        self._is_consuming = False
        if self._timer is not None:
            self._timer.cancel()
        self._channel = None
        self._connection.stop(on_stopped)

    # -- the connection's events

    def on_open(self, connection: Any) -> None:
        """A connection: open the channel."""
        self._pika = connection
        self._open_channel()

    def on_lost(self, error: Exception) -> None:
        """The broker has requeued all that was unanswered."""
        self._drop_channel()
        self._pika = None
        self._listener.on_connection_lost(error)

    def on_unreachable(self, error: Exception) -> None:
        """A whole round of hosts failed; said, and tried again."""
        self._listener.on_warning(f"{error} Trying again.")

    def on_refused(self, error: Exception) -> None:
        """No further attempt makes sense."""
        self._listener.on_fatal(error)

    def on_blocked(self, reason: str | None) -> None:
        """A consumer's connection publishes nothing: nothing to do."""

    # -- the channel

    @property
    def _is_ready(self) -> bool:
        return self._channel is not None and self._channel.is_open and self._declaring is None

    def _open_channel(self) -> None:
        self._timer = None
        if self._pika is not None and self._pika.is_open:
            self._pika.channel(on_open_callback=self._on_channel)

    def _on_channel(self, channel: Any) -> None:
        self._channel = channel
        self._epoch += 1
        channel.add_on_close_callback(self._on_channel_closed)
        channel.add_on_cancel_callback(self._on_cancelled)
        for consumed in self._queues.values():
            consumed.tags.clear()
        if self._declaring is not None:  # refused on the channel before: go on where it was
            self._declaring.resume(channel)
        else:
            self._set_up()

    def _set_up(self) -> None:
        """Declare what has no consumer yet, then consume it."""
        if self._declaring is not None:
            return
        missing = [] if self._is_paused else [queue for queue in self._queues.values() if not queue.tags]
        entities = dict.fromkeys(entity for consumed in missing for entity in consumed.declare)
        self._declaring = Declaring(
            list(entities),
            found=self._found,
            on_done=lambda: self._consume_all(missing),
            on_warning=self._listener.on_warning,
        )
        self._declaring.resume(self._channel)

    def _consume_all(self, missing: list[_Consumed]) -> None:
        self._declaring = None
        waiting = [consumed for consumed in missing if not consumed.tags and consumed.queue.name in self._queues]
        left = len(waiting)

        def started() -> None:
            nonlocal left
            left -= 1
            if not left:
                self._all_started()

        for consumed in waiting:
            self._consume(consumed, consumed.prefetch, on_started=started)
        if not waiting:
            self._all_started()

    def _all_started(self) -> None:
        if any(not consumed.tags for consumed in self._queues.values()) and not self._is_paused:
            self._set_up()  # a queue was added meanwhile
            return
        self._pause = FIRST_PAUSE
        if not self._is_consuming:
            self._is_consuming = True
            self._listener.on_consuming(self._epoch)

    def _consume(self, consumed: _Consumed, prefetch: int, *, on_started: Callable[[], None]) -> None:
        self._consumer_number += 1
        name, epoch = consumed.queue.name, self._epoch
        on_delivery = self._listener.on_delivery

        def on_message(channel: Any, method: Any, properties: Any, body: bytes) -> None:
            on_delivery(
                Delivery(
                    body,
                    properties,
                    method.exchange,
                    method.routing_key,
                    method.redelivered,
                    name,
                    method.delivery_tag,
                    epoch,
                )
            )

        tag = f"amqtask-{self._consumer_number}"
        consumed.tags.append(tag)
        if not self._no_ack:
            self._channel.basic_qos(prefetch_count=prefetch)
        self._channel.basic_consume(
            name,
            on_message,
            auto_ack=self._no_ack,
            consumer_tag=tag,
            callback=lambda _: on_started(),
        )

    def _cancel(self, consumed: _Consumed) -> None:
        self._cancel_tags(consumed, list(consumed.tags))

    def _cancel_tags(self, consumed: _Consumed, tags: list[str]) -> None:
        for tag in tags:
            if tag in consumed.tags:
                consumed.tags.remove(tag)
                try:
                    self._channel.basic_cancel(tag, callback=lambda _: None)
                except ChannelWrongStateError:
                    return  # the channel is closing: its consumers go with it
                # pika would reject what is on its way to a cancelled consumer, and each reject counts towards the
                # delivery limit of a quorum queue; ours takes it until the broker confirms the cancelling.
                self._channel._cancelled.discard(tag)

    def _on_cancelled(self, frame: Any) -> None:
        """The broker ended a consumer: its queue was deleted or moved, or (4.3) a delivery was held for too long."""
        tag = frame.method.consumer_tag
        for name, consumed in self._queues.items():
            if tag in consumed.tags:
                consumed.tags.remove(tag)
                self._listener.on_cancelled(name, "cancelled by the broker")
        self._again(self._set_up_again)

    def _set_up_again(self) -> None:
        self._timer = None
        if self._is_ready:
            self._set_up()

    def _on_channel_closed(self, channel: Any, error: Exception) -> None:
        if channel is not self._channel:
            return
        declaring = self._declaring
        self._drop_channel(keep_declaring=True)
        if self._pika is None or not self._pika.is_open:
            self._declaring = None
            return  # the connection's own end follows
        if declaring is not None and declaring.explains(error):
            self._open_channel()
            return
        self._declaring = None
        fatal = _fatal(error, declaring)
        if fatal is not None:
            self._listener.on_fatal(fatal)
            return
        self._listener.on_connection_lost(error)
        self._again(self._open_channel)

    def _drop_channel(self, *, keep_declaring: bool = False) -> None:
        self._channel = None
        self._is_consuming = False
        self._epoch += 1
        if not keep_declaring:
            self._declaring = None
        for consumed in self._queues.values():
            consumed.tags.clear()

    def _again(self, callback: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(self._pause, callback)
        self._pause = min(self._pause * 2, LONGEST_PAUSE)


def _fatal(error: Exception, declaring: Declaring | None) -> Exception | None:
    if not isinstance(error, ChannelClosedByBroker) or declaring is None or declaring.current is None:
        return None
    what = entity_name(declaring.current)
    if error.reply_code == ACCESS_REFUSED:
        return AccessRefused(
            f"the broker's user may not declare {what}: {error.reply_text} (rabbitmqctl set_permissions)"
        )
    if error.reply_code == RESOURCE_LOCKED:
        return OperationalError(f"{what} belongs to another connection: {error.reply_text}")
    return None

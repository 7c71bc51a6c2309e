"""LoopPublisher: confirmed publishes from a worker's loop; never blocks, sends unconfirmed messages again after a reconnect.

Messages wait in order, are written at the end of a loop turn, and are outstanding until the broker's ack or nack. When the
channel is lost, what was outstanding goes to the front of the line again: it may then be stored twice, never not at all.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pika
from pika.exceptions import ChannelClosedByBroker

from amqtask.entities import Declaration
from amqtask.exceptions import OperationalError, PublishError, PublishTimeout
from amqtask.message import Message
from amqtask.transport.confirms import Confirms, Returns
from amqtask.transport.connection import Backoff, LoopConnection
from amqtask.transport.content import UNWRITABLE, basic_properties, unwritable
from amqtask.transport.declare import Declarer
from amqtask.transport.errors import channel_error, culprits, refused, unroutable
from amqtask.transport.link import MOST_DECLARED
from amqtask.transport.loop import LoopTimer, PikaLoop
from amqtask.transport.shared import ConnectionUse, SharedConnection
from amqtask.transport.url import BrokerAddress

OnDone = Callable[["PublishError | None"], None]
# Unconfirmed messages at most; more wait here, where they cost no broker anything.
WINDOW = 2000


class _Pending:
    """A message that is not confirmed yet."""

    __slots__ = ("is_second_try", "message", "on_done")

    def __init__(self, message: Message, on_done: OnDone) -> None:
        self.message = message
        self.on_done = on_done
        self.is_second_try = False


class PikaLoopPublisher:
    """See amqtask.transport.contract.LoopPublisher; connects at `start` or at the first publish.

    With `shared` it uses that connection, and what is unconfirmed when that is lost is not sent again: it fails with
    PublishTimeout (it may or may not be stored), and whoever holds the next connection decides.
    """

    def __init__(
        self,
        addresses: Sequence[BrokerAddress],
        loop: PikaLoop,
        *,
        heartbeat: int | None = 60,
        connect_timeout: float = 4.0,
        client_name: str = "",
        on_warning: Callable[[str], None] = lambda text: None,
        shared: SharedConnection | None = None,
    ) -> None:
        self._loop = loop
        self._warn = on_warning
        # What was said with a connection that one holds something by must not be said again without it.
        self._resends = shared is None
        self._connection: LoopConnection | ConnectionUse = (
            shared.join(self)
            if shared is not None
            else LoopConnection(
                addresses, loop, self, heartbeat=heartbeat, connect_timeout=connect_timeout, name=client_name
            )
        )
        self._declarer = Declarer(on_warning)
        self._pika: Any = None
        # The present channel, once it confirms; and one that is being opened.
        self._channel: Any = None
        self._opening: Any = None
        self._confirms: Confirms[_Pending] = Confirms()
        self._returns = Returns()
        self._waiting: deque[_Pending] = deque()
        self._declared: set[Declaration] = set()
        self._declared_tuples: dict[int, tuple[Declaration, ...]] = {}
        self._is_declaring = False
        self._number = 0
        # How many messages to publish one at a time, because one of them makes the broker close the channel.
        self._suspects = 0
        self._is_due = False
        self._is_stopped = False
        self._backoff = Backoff()
        self._timer: LoopTimer | None = None

    # -- the contract

    @property
    def outstanding(self) -> int:
        """How many messages are not confirmed yet."""
        return len(self._waiting) + len(self._confirms)

    @property
    def is_connected(self) -> bool:
        """Whether its connection is open."""
        return self._connection.is_open

    def start(self) -> None:
        """Connect now."""
        self._is_stopped = False
        self._connection.start()

    def publish(self, message: Message, on_done: OnDone) -> None:
        """Publish at the end of this turn, in order; `on_done` follows the confirm."""
        if message.mandatory and not message.properties.message_id:
            self._number += 1
            message.properties.message_id = f"{os.getpid()}-{id(self):x}-{self._number}"
        self._waiting.append(_Pending(message, on_done))
        if not self._is_due:
            self._is_due = True
            self._loop.call_last(self._flush)

    def stop(self) -> None:
        """Write what waits, then close; nobody hears of these confirms any more, so the owner that cares waits for
        `outstanding` to be 0 first."""
        self._flush()
        self._is_stopped = True
        self._forget_timer()
        self._connection.stop()

    # -- publishing

    def _flush(self) -> None:
        self._is_due = False
        if self._is_stopped:
            return
        if not self._connection.is_running:
            self._connection.start()
        channel = self._channel
        if channel is None or not channel.is_open or self._is_declaring:
            return
        waiting, confirms = self._waiting, self._confirms
        window = 1 if self._suspects else WINDOW
        while waiting and len(confirms) < window:
            pending = waiting[0]
            declare = pending.message.declare
            if declare and self._declared_tuples.get(id(declare)) is not declare and not self._is_declared(declare):
                self._declare(declare)
                return
            waiting.popleft()
            self._send(channel, pending)

    def _send(self, channel: Any, pending: _Pending) -> None:
        message = pending.message
        try:
            channel.basic_publish(
                message.exchange,
                message.routing_key,
                message.body,
                basic_properties(message.properties),
                message.mandatory,
            )
        except UNWRITABLE as error:  # pika encodes all before it writes anything
            self._settled(pending, unwritable(message, error))
        else:
            self._confirms.published(pending)

    def _on_return(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        self._returns.returned(properties.message_id, method.exchange, method.routing_key)

    def _on_confirm(self, frame: Any) -> None:
        method = frame.method
        acked = isinstance(method, pika.spec.Basic.Ack)
        returns = self._returns
        for pending in self._confirms.settle(method.delivery_tag, method.multiple):
            message = pending.message
            if len(returns) and returns.claim(message.properties.message_id, message.exchange, message.routing_key):
                self._returned(pending)
            else:
                self._settled(pending, None if acked else refused(message))
        if self._waiting and not self._is_due:
            self._flush()

    def _returned(self, pending: _Pending) -> None:
        """No queue takes it. What was declared for it may have been deleted since: once more, with everything."""
        declare = pending.message.declare
        if not declare or pending.is_second_try:
            self._settled(pending, unroutable(pending.message))
            return
        pending.is_second_try = True
        self._declared.difference_update(declare)
        self._declared_tuples.clear()
        self._waiting.appendleft(pending)

    def _settled(self, pending: _Pending, error: PublishError | None) -> None:
        if self._suspects:
            self._suspects -= 1
        pending.on_done(error)

    # -- declaring

    def _is_declared(self, declare: tuple[Declaration, ...]) -> bool:
        if not self._declared.issuperset(declare):
            return False
        if len(self._declared_tuples) > MOST_DECLARED:
            self._declared_tuples.clear()
        # Routes give the same tuple again and again: its identity is cheaper to look up than its members.
        self._declared_tuples[id(declare)] = declare
        return True

    def _declare(self, declare: tuple[Declaration, ...]) -> None:
        missing = [entity for entity in declare if entity not in self._declared]
        self._is_declaring = True
        self._declarer.declare(missing, lambda error: self._on_declared(missing, error))

    def _on_declared(self, entities: Sequence[Declaration], error: OperationalError | None) -> None:
        self._is_declaring = False
        if error is None:
            if len(self._declared) > MOST_DECLARED:
                self._declared.clear()
                self._declared_tuples.clear()
            self._declared.update(entities)
        elif self._waiting:
            self._settled(
                self._waiting.popleft(), error if isinstance(error, PublishError) else PublishError(str(error))
            )
        self._flush()

    # -- the connection's events

    def on_open(self, connection: Any) -> None:
        """A connection: open a channel in confirm mode."""
        self._forget_timer()
        self._pika = connection
        self._declarer.connected(connection)
        self._open_channel()

    def on_lost(self, error: Exception) -> None:
        """Unconfirmed messages go again on the next connection."""
        self._forget_timer()
        self._pika = None
        self._declarer.lost()
        self._is_declaring = False
        self._declared.clear()
        self._declared_tuples.clear()
        self._drop_channel()
        if not self._resends:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        waiting, self._waiting = self._waiting, deque()
        for pending in waiting:
            pending.on_done(PublishTimeout(f"the connection was lost before the broker's confirm: {error}"))

    def on_unreachable(self, error: Exception) -> None:
        """The consumer on the same broker says so already."""

    def on_refused(self, error: Exception) -> None:
        """Said once; the messages stay outstanding, so nothing is acknowledged."""
        self._warn(str(error))

    def on_blocked(self, reason: str | None) -> None:
        """An alarm: the broker stops reading; messages wait, nothing is lost."""
        if reason is not None:
            self._warn(f"the broker blocks publishing ({reason}); results and retries wait until it goes on")

    # -- the channel

    def _open_channel(self) -> None:
        self._timer = None
        if self._pika is not None and self._pika.is_open and self._opening is None and self._channel is None:
            self._opening = self._pika.channel(on_open_callback=self._on_channel)
            self._opening.add_on_close_callback(self._on_channel_closed)

    def _on_channel(self, channel: Any) -> None:
        channel.add_on_return_callback(self._on_return)
        channel.confirm_delivery(self._on_confirm, callback=lambda _: self._ready(channel))

    def _ready(self, channel: Any) -> None:
        if channel is not self._opening:
            return
        self._opening, self._channel = None, channel
        self._backoff.well()
        self._flush()

    def _drop_channel(self) -> None:
        self._channel = self._opening = None
        self._waiting.extendleft(reversed(list(self._confirms.outstanding())))
        self._confirms = Confirms()
        self._returns = Returns()

    def _on_channel_closed(self, channel: Any, error: Exception) -> None:
        if channel not in (self._channel, self._opening):
            return
        unconfirmed = list(self._confirms.outstanding())
        self._drop_channel()
        if self._pika is None or not self._pika.is_open or self._is_stopped:
            return  # the connection's own end follows
        if isinstance(error, ChannelClosedByBroker) and self._blame(error, unconfirmed):
            self._open_channel()
        elif self._timer is None:
            self._timer = self._loop.call_later(self._backoff.next(), self._open_channel)

    def _blame(self, error: ChannelClosedByBroker, unconfirmed: list[_Pending]) -> bool:
        """The broker closed the channel because of one message: that one fails, the others go again. When its words do
        not tell which, they go one at a time. False when it was none of them."""
        if not unconfirmed:
            self._warn(str(OperationalError(f"the broker closed the publishing channel: {error}")))
            return False
        messages = [pending.message for pending in unconfirmed]
        guilty = culprits(error, messages, list(range(len(messages))))
        if not guilty:
            self._suspects = len(unconfirmed)
        for index in guilty:
            pending = unconfirmed[index]
            self._waiting.remove(pending)
            self._settled(pending, channel_error(error, pending.message))
        return True

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

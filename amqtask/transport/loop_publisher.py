"""LoopPublisher: confirmed publishes from a worker's loop; never blocks, sends unconfirmed messages again after a reconnect."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pika
from pika.exceptions import ChannelClosedByBroker

from amqtask.entities import Declaration
from amqtask.exceptions import OperationalError, PublishError
from amqtask.message import Message
from amqtask.transport.confirms import Confirms
from amqtask.transport.connection import LoopConnection
from amqtask.transport.declare import Declaring
from amqtask.transport.loop import LoopTimer, PikaLoop
from amqtask.transport.publisher import basic_properties, channel_error, culprit, refused, unroutable
from amqtask.transport.url import BrokerAddress

OnDone = Callable[["PublishError | None"], None]
WINDOW = 2000


class _Pending:
    """A message that is not confirmed yet."""

    __slots__ = ("message", "on_done")

    def __init__(self, message: Message, on_done: OnDone) -> None:
        self.message = message
        self.on_done = on_done


class PikaLoopPublisher:
    """See amqtask.transport.contract.LoopPublisher; connects at `start` or at the first publish."""

    def __init__(
        self,
        addresses: Sequence[BrokerAddress],
        loop: PikaLoop,
        *,
        heartbeat: int | None = 60,
        connect_timeout: float = 4.0,
        client_name: str = "",
        on_warning: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._loop = loop
        self._warn = on_warning
        self._connection = LoopConnection(
            addresses, loop, self, heartbeat=heartbeat, connect_timeout=connect_timeout, name=client_name
        )
        self._pika: Any = None
        self._channel: Any = None
        self._confirms: Confirms[_Pending] = Confirms()
        self._returned: set[str] = set()
        self._waiting: deque[_Pending] = deque()
        self._declared: set[Declaration] = set()
        self._declared_tuples: dict[int, tuple[Declaration, ...]] = {}
        self._found: set[Declaration] = set()
        self._declaring: Declaring | None = None
        self._number = 0
        self._is_due = False
        self._timer: LoopTimer | None = None

    # -- the contract

    @property
    def outstanding(self) -> int:
        """How many messages are not confirmed yet."""
        return len(self._waiting) + len(self._confirms)

    def start(self) -> None:
        """Connect now."""
        self._connection.start()

    def publish(self, message: Message, on_done: OnDone) -> None:
        """Publish at the end of this turn, in order; `on_done` follows the confirm."""
        if message.mandatory and not message.properties.message_id:
            self._number += 1
            message.properties.message_id = f"{os.getpid()}-{id(self):x}-{self._number}"
        self._waiting.append(_Pending(message, on_done))
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._flush)

    def stop(self) -> None:
        """Close; the owner waits for `outstanding` to be 0 first if it cares."""
        if self._timer is not None:
            self._timer.cancel()
        self._connection.stop()

    # -- publishing

    def _flush(self) -> None:
        self._is_due = False
        if not self._connection.is_running:
            self._connection.start()
        channel = self._channel
        if channel is None or not channel.is_open or self._declaring is not None:
            return
        waiting, confirms = self._waiting, self._confirms
        while waiting and len(confirms) < WINDOW:
            pending = waiting[0]
            declare = pending.message.declare
            if declare and self._declared_tuples.get(id(declare)) is not declare and not self._is_declared(declare):
                self._declare(declare)
                return
            waiting.popleft()
            confirms.published(pending)
            message = pending.message
            channel.basic_publish(
                message.exchange,
                message.routing_key,
                message.body,
                basic_properties(message.properties),
                message.mandatory,
            )

    def _is_declared(self, declare: tuple[Declaration, ...]) -> bool:
        if not self._declared.issuperset(declare):
            return False
        if len(self._declared_tuples) > 10_000:
            self._declared_tuples.clear()
        # Routes give the same tuple again and again: its identity is cheaper to look up than its members.
        self._declared_tuples[id(declare)] = declare
        return True

    def _declare(self, declare: tuple[Declaration, ...]) -> None:
        missing = [entity for entity in declare if entity not in self._declared]

        def done() -> None:
            self._declaring = None
            self._declared.update(missing)
            self._flush()

        self._declaring = Declaring(missing, found=self._found, on_done=done, on_warning=self._warn)
        self._declaring.resume(self._channel)

    def _on_return(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        if properties.message_id:
            self._returned.add(properties.message_id)

    def _on_confirm(self, frame: Any) -> None:
        method = frame.method
        acked = isinstance(method, pika.spec.Basic.Ack)
        returned = self._returned
        for pending in self._confirms.settle(method.delivery_tag, method.multiple):
            error: PublishError | None = None if acked else refused(pending.message)
            if returned and pending.message.properties.message_id in returned:
                returned.discard(pending.message.properties.message_id)
                error = unroutable(pending.message)
            pending.on_done(error)
        if self._waiting and not self._is_due:
            self._flush()

    # -- the connection's events

    def on_open(self, connection: Any) -> None:
        """A connection: open a channel in confirm mode."""
        self._pika = connection
        self._open_channel()

    def on_lost(self, error: Exception) -> None:
        """Unconfirmed messages go again on the next connection."""
        self._drop_channel()
        self._declaring = None
        self._pika = None

    def on_unreachable(self, error: Exception) -> None:
        """The consumer on the same broker says so already."""

    def on_refused(self, error: Exception) -> None:
        """Said once; the messages stay outstanding, so nothing is acknowledged."""
        self._warn(str(error))

    def on_blocked(self, reason: str | None) -> None:
        """An alarm: the broker stops reading; messages wait, nothing is lost."""
        if reason is not None:
            self._warn(f"the broker blocks publishing ({reason}); results and retries wait until it goes on")

    def _open_channel(self) -> None:
        self._timer = None
        if self._pika is not None and self._pika.is_open:
            self._pika.channel(on_open_callback=self._on_channel)

    def _on_channel(self, channel: Any) -> None:
        channel.add_on_close_callback(self._on_channel_closed)
        channel.add_on_return_callback(self._on_return)
        channel.confirm_delivery(self._on_confirm, callback=lambda _: self._ready(channel))

    def _ready(self, channel: Any) -> None:
        self._channel = channel
        if self._declaring is not None:
            self._declaring.resume(channel)
        else:
            self._flush()

    def _drop_channel(self) -> None:
        self._channel = None
        self._returned.clear()
        self._declared.clear()
        self._declared_tuples.clear()
        self._waiting.extendleft(reversed(list(self._confirms.outstanding())))
        self._confirms = Confirms()

    def _on_channel_closed(self, channel: Any, error: Exception) -> None:
        if channel is not self._channel:
            return
        unconfirmed = list(self._confirms.outstanding())
        self._drop_channel()
        if self._pika is None or not self._pika.is_open:
            return  # the connection's own end follows
        if self._declaring is not None:
            if not self._declaring.explains(error):
                self._declaring = None
                self._fail_first(error)
        else:
            self._blame(error, unconfirmed)
        self._timer = self._loop.call_later(0.05, self._open_channel)

    def _fail_first(self, error: Exception) -> None:
        """What the first message needs cannot be declared."""
        pending = self._waiting.popleft()
        pending.on_done(PublishError(f"what the message needs cannot be declared: {error}"))

    def _blame(self, error: Exception, unconfirmed: list[_Pending]) -> None:
        """The broker closed the channel because of one message: that one fails, the others go again."""
        if not isinstance(error, ChannelClosedByBroker):
            return
        messages = [pending.message for pending in unconfirmed]
        index = culprit(error, messages, list(range(len(messages))))
        if index is not None:
            pending = unconfirmed[index]
            self._waiting.remove(pending)
            pending.on_done(channel_error(error, pending.message))
        else:
            self._warn(str(OperationalError(f"the broker closed the publishing channel: {error}")))

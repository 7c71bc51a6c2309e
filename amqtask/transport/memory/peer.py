"""Peer: the broker's end of one connection, and its channels. AMQP 0-9-1 frames come in as bytes, and frames go out as bytes.

So what a client does over a connection to RabbitMQ it does here, too, with the same code: handshake, channels, confirms, acks. A
method that the broker refuses closes the channel (AMQP 0-9-1, channel.close), and its unanswered deliveries go back.
"""

from __future__ import annotations

import itertools
import struct
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pika import frame, spec

from amqtask.protocol.entities import Binding, Exchange, Queue, arguments
from amqtask.protocol.message import REJECTED
from amqtask.transport.content import FRAME_MAX, FRAMING, install
from amqtask.transport.errors import NOT_FOUND
from amqtask.transport.memory.broker import MemoryBroker
from amqtask.transport.memory.queues import (
    MemoryQueue,
    Refused,
    Stored,
    StreamQueue,
    Subscriber,
    Verdict,
    consumed_exclusively,
    in_use,
    not_implemented,
    received,
    subscribe,
    unknown_tag,
)
from amqtask.transport.stream import GREETING, Frames, Unreadable, decode_method

if TYPE_CHECKING:
    from amqtask.ground.loop import TurnLoop


_BODY = FRAME_MAX - FRAMING
_content_head = struct.Struct(">BHLHHQ").pack
_CONTENT_HEAD_SIZE = struct.calcsize(">HHQ")
_START = spec.Connection.Start(
    version_major=0,
    version_minor=9,
    server_properties={
        "product": "amqtask in-memory broker",
        "version": "4.3",
        "capabilities": {
            "publisher_confirms": True,
            "basic.nack": True,
            "consumer_cancel_notify": True,
            "connection.blocked": True,
            "exchange_exchange_bindings": True,
            "authentication_failure_close": True,
            "per_consumer_qos": True,
        },
    },
    mechanisms="PLAIN EXTERNAL",
    locales="en_US",
)
_MOST_CHANNELS = 2047


class _Unanswered(NamedTuple):
    queue: MemoryQueue
    # None: of basic.get.
    subscriber: Subscriber | None
    stored: Stored


class PeerChannel:
    """All calls are made under the broker's lock; `write` takes the frames for the client, `owner` is the connection."""

    def __init__(self, broker: MemoryBroker, number: int, owner: object, write: Callable[[bytes], None]) -> None:
        self._broker = broker
        self._number = number
        self._owner = owner
        self._write = write
        self._tags = itertools.count(1)
        self._unanswered: dict[int, _Unanswered] = {}
        self._consumed: dict[str, tuple[MemoryQueue, Subscriber]] = {}
        self._prefetch = 0
        # How many messages were published in confirm mode; None: it was not asked for.
        self._published: int | None = None
        # basic.publish, its encoded properties, how much of its body is missing, and the body so far.
        self._publishing: list[Any] = []
        self._is_open = True

    def hear(self, method: Any) -> None:
        """A method of the client's."""
        if not self._is_open:
            return  # it was sent before the client heard that the channel is closed
        try:
            handler = self._HANDLERS.get(type(method))
            if handler is None:
                raise not_implemented(method.NAME)
            answer: object | None = handler(self, method)
        except Refused as error:
            self._refuse(error, method)
            return
        if answer is not None and not vars(method).get("nowait"):
            self._send(answer)
        self._broker.expire()

    def add_header(self, payload: bytes) -> None:
        """The content header of a publish."""
        if self._publishing:
            size = int.from_bytes(payload[4:_CONTENT_HEAD_SIZE], "big")
            self._publishing += [payload[_CONTENT_HEAD_SIZE:], size, b""]
            self._publish_if_complete()

    def add_body(self, payload: bytes) -> None:
        """A part of the body of a publish."""
        if self._publishing:
            self._publishing[2] -= len(payload)
            self._publishing[3] += payload
            self._publish_if_complete()

    def close(self) -> None:
        """The channel ends; unanswered deliveries go back to their queues."""
        if not self._is_open:
            return
        self._is_open = False
        self._publishing = []
        for tag in list(self._consumed):
            self._end_consumer(tag)
        unanswered, self._unanswered = list(self._unanswered.values()), {}
        for queue, _, stored in unanswered:
            self._broker.returned(queue, stored, counts=True)
        self._broker.expire()

    # -- to the client

    def _send(self, method: Any) -> None:
        self._write(frame.Method(self._number, method).marshal())

    def _send_content(self, method: Any, stored: Stored) -> None:
        encoded, body = stored.encoded(), stored.body
        size = _CONTENT_HEAD_SIZE + len(encoded)
        head = _content_head(spec.FRAME_HEADER, self._number, size, spec.Basic.INDEX, 0, len(body))
        pieces = [frame.Method(self._number, method).marshal(), head, encoded, bytes([spec.FRAME_END])]
        pieces += [frame.Body(self._number, body[at : at + _BODY]).marshal() for at in range(0, len(body), _BODY)]
        self._write(b"".join(pieces))

    def _refuse(self, error: Refused, method: Any) -> None:
        class_id, method_id = divmod(method.INDEX, 1 << 16)
        self.close()
        self._send(spec.Channel.Close(error.reply_code, error.reply_text, class_id, method_id))

    # -- publishing

    def _begin_publish(self, method: Any) -> None:
        self._publishing = [method]

    def _publish_if_complete(self) -> None:
        method, encoded, missing, body = self._publishing
        if missing > 0:
            return
        self._publishing = []
        try:
            stored = received(body, encoded, method.exchange, method.routing_key)
            verdict = self._broker.publish(stored, mandatory=method.mandatory)
        except Refused as error:
            self._refuse(error, method)
            return
        if verdict is Verdict.RETURNED:
            returned = spec.Basic.Return(312, "NO_ROUTE", method.exchange, method.routing_key)
            self._send_content(returned, stored)
        if self._published is not None:
            self._published += 1
            answer = spec.Basic.Nack if verdict is Verdict.REFUSED else spec.Basic.Ack
            self._send(answer(self._published))

    def _confirm(self, method: object) -> object:
        self._published = self._published or 0
        return spec.Confirm.SelectOk()

    # -- entities

    def _declare_exchange(self, method: Any) -> object:
        exchange = Exchange(
            method.exchange, method.type, method.durable, method.auto_delete, arguments(method.arguments)
        )
        self._broker.declare(exchange, passive=method.passive)
        return spec.Exchange.DeclareOk()

    def _delete_exchange(self, method: Any) -> object:
        self._broker.delete_exchange(method.exchange)
        return spec.Exchange.DeleteOk()

    def _declare_queue(self, method: Any) -> object:
        name = method.queue or f"amq.gen-{id(self):x}-{next(self._tags)}"
        queue = Queue(
            name,
            durable=method.durable,
            exclusive=method.exclusive,
            auto_delete=method.auto_delete,
            arguments=arguments(method.arguments),
        )
        self._broker.declare(queue, self._owner, passive=method.passive)
        self._broker.expire()
        declared = self._broker.queue(name, self._owner)
        return spec.Queue.DeclareOk(name, len(declared), len(declared.subscribers))

    def _purge(self, method: Any) -> object:
        self._broker.queue(method.queue, self._owner)
        return spec.Queue.PurgeOk(self._broker.purge(method.queue))

    def _delete_queue(self, method: Any) -> object:
        try:
            queue = self._broker.queue(method.queue, self._owner)
        except Refused as error:
            if error.reply_code != NOT_FOUND:
                raise
            return spec.Queue.DeleteOk(0)
        if (method.if_unused and queue.subscribers) or (method.if_empty and len(queue)):
            raise in_use(method.queue)
        count = len(queue)
        self._broker.delete_queue(method.queue)
        return spec.Queue.DeleteOk(count)

    def _bind(self, method: Any) -> object:
        self._broker.declare(_binding(method))
        return spec.Exchange.BindOk() if isinstance(method, spec.Exchange.Bind) else spec.Queue.BindOk()

    def _unbind(self, method: Any) -> object:
        self._broker.unbind(_binding(method))
        return spec.Exchange.UnbindOk() if isinstance(method, spec.Exchange.Unbind) else spec.Queue.UnbindOk()

    # -- consuming

    def _set_prefetch(self, method: Any) -> object:
        self._prefetch = method.prefetch_count
        return spec.Basic.QosOk()

    def _consume(self, method: Any) -> object:
        queue = self._broker.queue(method.queue, self._owner)
        if any(subscriber.exclusive for subscriber in queue.subscribers) or (method.exclusive and queue.subscribers):
            raise consumed_exclusively(method.queue)
        tag = method.consumer_tag or f"amq.ctag-{id(self):x}-{next(self._tags)}"
        subscriber = Subscriber(
            tag,
            lambda subscriber, stored: self._deliver(queue, subscriber, stored),
            self._cancelled,
            self._prefetch,
            method.no_ack,
            method.exclusive,
        )
        subscribe(queue, subscriber, method.arguments)
        self._consumed[tag] = (queue, subscriber)
        queue.subscribers.append(subscriber)
        return spec.Basic.ConsumeOk(tag)

    def _cancel(self, method: Any) -> object:
        self._end_consumer(method.consumer_tag)
        return spec.Basic.CancelOk(method.consumer_tag)

    def _end_consumer(self, tag: str) -> None:
        consumed = self._consumed.pop(tag, None)
        if consumed is not None:
            queue, subscriber = consumed
            queue.subscribers.remove(subscriber)
            self._broker.unsubscribed(queue)

    def _cancelled(self, subscriber: Subscriber) -> None:
        self._consumed.pop(subscriber.tag, None)
        self._send(spec.Basic.Cancel(subscriber.tag, True))

    def _deliver(self, queue: MemoryQueue, subscriber: Subscriber, stored: Stored) -> None:
        redelivered = stored.deliveries > 0
        tag = self._tagged(queue, subscriber, stored, is_answered=subscriber.no_ack)
        method = spec.Basic.Deliver(subscriber.tag, tag, redelivered, stored.exchange, stored.routing_key)
        self._send_content(method, stored)

    def _get(self, method: Any) -> object | None:
        queue = self._broker.queue(method.queue, self._owner)
        if isinstance(queue, StreamQueue):
            raise not_implemented("basic.get for streams")
        self._broker.expire()
        if not len(queue):
            empty: object = spec.Basic.GetEmpty()
            return empty
        stored = queue.pop()
        redelivered = stored.deliveries > 0
        tag = self._tagged(queue, None, stored, is_answered=method.no_ack)
        self._send_content(spec.Basic.GetOk(tag, redelivered, stored.exchange, stored.routing_key, len(queue)), stored)
        return None

    def _tagged(self, queue: MemoryQueue, subscriber: Subscriber | None, stored: Stored, *, is_answered: bool) -> int:
        """The tag of one more delivery; unless it `is_answered` by being sent, its answer is awaited."""
        stored.deliveries += 1
        tag = next(self._tags)
        if not is_answered:
            self._unanswered[tag] = _Unanswered(queue, subscriber, stored)
            if subscriber is not None:
                subscriber.unacked += 1
        return tag

    # -- answers

    def _ack(self, method: Any) -> None:
        for _ in self._settled(method.delivery_tag, multiple=method.multiple):
            pass

    def _nack(self, method: Any) -> None:
        settled = self._settled(method.delivery_tag, multiple=method.multiple)
        self._give_back(settled, requeue=method.requeue, counts=self._broker.nack_counts)

    def _reject(self, method: Any) -> None:
        settled = self._settled(method.delivery_tag, multiple=False)
        self._give_back(settled, requeue=method.requeue, counts=True)

    def _give_back(self, settled: Iterator[_Unanswered], *, requeue: bool, counts: bool) -> None:
        for queue, _, stored in settled:
            if requeue:
                self._broker.returned(queue, stored, counts=counts)
            else:
                self._broker.dead_letter(queue, stored, REJECTED)

    def _settled(self, tag: int, *, multiple: bool) -> Iterator[_Unanswered]:
        if tag not in self._unanswered and not (multiple and tag == 0):
            raise unknown_tag(tag)
        tags = [open_tag for open_tag in self._unanswered if open_tag <= tag or not tag] if multiple else [tag]
        for settled_tag in tags:
            unanswered = self._unanswered.pop(settled_tag)
            if unanswered.subscriber is not None:
                unanswered.subscriber.unacked -= 1
            yield unanswered

    # The methods of a channel; each returns the client's answer, if there is one.
    _HANDLERS: ClassVar[dict[type, Callable[[PeerChannel, Any], object | None]]] = {
        spec.Channel.Flow: lambda channel, method: spec.Channel.FlowOk(method.active),
        spec.Confirm.Select: _confirm,
        spec.Exchange.Declare: _declare_exchange,
        spec.Exchange.Delete: _delete_exchange,
        spec.Queue.Declare: _declare_queue,
        spec.Queue.Purge: _purge,
        spec.Queue.Delete: _delete_queue,
        **dict.fromkeys((spec.Queue.Bind, spec.Exchange.Bind), _bind),
        **dict.fromkeys((spec.Queue.Unbind, spec.Exchange.Unbind), _unbind),
        spec.Basic.Publish: _begin_publish,
        spec.Basic.Qos: _set_prefetch,
        spec.Basic.Consume: _consume,
        spec.Basic.Cancel: _cancel,
        spec.Basic.Get: _get,
        spec.Basic.Ack: _ack,
        spec.Basic.Nack: _nack,
        spec.Basic.Reject: _reject,
    }


def _binding(method: Any) -> Binding:
    to_exchange = isinstance(method, (spec.Exchange.Bind, spec.Exchange.Unbind))
    source, destination = (method.source, method.destination) if to_exchange else (method.exchange, method.queue)
    return Binding(Exchange(source), destination, method.routing_key, arguments(method.arguments), to_exchange)


class Peer:
    """`wake` is called, in any thread, when there is something to `take`. `loop` is the client's, which lets messages expire.

    Raises: ConnectionRefusedError when the broker is stopped.
    """

    def __init__(self, broker: MemoryBroker, wake: Callable[[], None], loop: TurnLoop | None = None) -> None:
        install()
        self.loop = loop
        self.is_open = True
        self._broker = broker
        self._wake = wake
        self._frames = Frames()
        self._is_greeted = False
        # Frames that wait for the end of an alarm.
        self._waiting: deque[tuple[int, int, bytes]] = deque()
        self._is_blocked = False
        self._outgoing = bytearray()
        self._channels: dict[int, PeerChannel] = {}
        broker.connected(self)

    # -- the client's calls

    def receive(self, data: bytes) -> None:
        """The client has sent these bytes; they are lost when the connection has ended."""
        with self._broker.lock:
            if not self.is_open:
                return
            if not self._is_greeted:
                self._is_greeted = True
                data = data[len(GREETING) :]
                self._send(_START)
            try:
                self._waiting += self._frames.feed(data)
            except Unreadable as error:
                self._close(501, f"FRAME_ERROR - {error}")
            self.go_on()

    def take(self) -> bytes:
        """The bytes for the client; none: there are none now, or (`is_open` is False) the connection has ended."""
        with self._broker.lock:
            data, self._outgoing = bytes(self._outgoing), bytearray()
            return data

    def hang_up(self) -> None:
        """The client closes its end of the stream."""
        with self._broker.lock:
            self.cut()
            self._outgoing.clear()

    # -- the broker's calls, under its lock

    def go_on(self) -> None:
        """Handle the frames that have come, as far as no alarm keeps publishes back."""
        if self._is_blocked and self._broker.blocked_reason is None:
            self._is_blocked = False
            self._send(spec.Connection.Unblocked())
        while self._waiting and self.is_open:
            frame_type, number, payload = self._waiting[0]
            method = decode_method(payload) if frame_type == spec.FRAME_METHOD else None
            if isinstance(method, spec.Basic.Publish) and self._broker.blocked_reason is not None:
                if not self._is_blocked:
                    self._is_blocked = True
                    self._send(spec.Connection.Blocked(self._broker.blocked_reason))
                return
            self._waiting.popleft()
            if method is not None:
                self._hear(number, method)
            elif number in self._channels and frame_type == spec.FRAME_HEADER:
                self._channels[number].add_header(payload)
            elif number in self._channels and frame_type == spec.FRAME_BODY:
                self._channels[number].add_body(payload)
            elif frame_type == spec.FRAME_HEARTBEAT:
                self._write(frame.Heartbeat().marshal())

    def cut(self) -> None:
        """The connection ends; unanswered deliveries go back to their queues."""
        if self.is_open:
            self.is_open = False
            for channel in self._channels.values():
                channel.close()
            self._channels.clear()
            self._broker.disconnected(self)
            self._wake()

    # -- methods

    def _hear(self, number: int, method: Any) -> None:
        if number == 0:
            self._hear_about_connection(method)
        elif isinstance(method, spec.Channel.Open):
            self._channels[number] = PeerChannel(self._broker, number, self, self._write)
            self._send(spec.Channel.OpenOk(), number)
        elif number not in self._channels:
            self._close(504, "CHANNEL_ERROR - expected 'channel.open'")
        elif isinstance(method, spec.Channel.Close):
            self._channels.pop(number).close()
            self._send(spec.Channel.CloseOk(), number)
        elif isinstance(method, spec.Channel.CloseOk):
            del self._channels[number]
        else:
            self._channels[number].hear(method)

    def _hear_about_connection(self, method: Any) -> None:
        if isinstance(method, spec.Connection.StartOk):
            self._send(spec.Connection.Tune(_MOST_CHANNELS, FRAME_MAX, 0))
        elif isinstance(method, spec.Connection.Open):
            self._send(spec.Connection.OpenOk())
        elif isinstance(method, spec.Connection.Close):
            self._send(spec.Connection.CloseOk())
            self.cut()

    def _close(self, code: int, text: str) -> None:
        self._send(spec.Connection.Close(code, text, 0, 0))
        self.cut()

    def _send(self, method: Any, number: int = 0) -> None:
        self._write(frame.Method(number, method).marshal())

    def _write(self, data: bytes) -> None:
        self._outgoing += data
        self._wake()

"""PeerChannel: one channel at the broker's end: delivery tags, unanswered messages, consumers, confirms.

A method that the broker refuses closes the channel (AMQP 0-9-1, channel.close), and its unanswered deliveries go back.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from pika import frame, spec

from amqtask.protocol.entities import Binding, Exchange, Queue, arguments
from amqtask.transport.content import FRAME_MAX, FRAMING
from amqtask.transport.deaths import REJECTED
from amqtask.transport.errors import NOT_FOUND
from amqtask.transport.memory.broker import MemoryBroker
from amqtask.transport.memory.queues import MemoryQueue, Subscriber
from amqtask.transport.memory.refusals import Refused, consumed_exclusively, in_use, not_implemented, unknown_tag
from amqtask.transport.memory.stored import Stored, Verdict, received

_BODY = FRAME_MAX - FRAMING
_content_head = struct.Struct(">BHLHHQ").pack
_CONTENT_HEAD_SIZE = struct.calcsize(">HHQ")


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
            handler = _HANDLERS.get(type(method))
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
                self._broker.rejected(queue, stored, REJECTED)

    def _settled(self, tag: int, *, multiple: bool) -> Iterator[_Unanswered]:
        if tag not in self._unanswered and not (multiple and tag == 0):
            raise unknown_tag(tag)
        tags = [open_tag for open_tag in self._unanswered if open_tag <= tag or not tag] if multiple else [tag]
        for settled_tag in tags:
            unanswered = self._unanswered.pop(settled_tag)
            if unanswered.subscriber is not None:
                unanswered.subscriber.unacked -= 1
            yield unanswered


def _binding(method: Any) -> Binding:
    to_exchange = isinstance(method, (spec.Exchange.Bind, spec.Exchange.Unbind))
    source, destination = (method.source, method.destination) if to_exchange else (method.exchange, method.queue)
    return Binding(Exchange(source), destination, method.routing_key, arguments(method.arguments), to_exchange)


# The methods of a channel; each returns the client's answer, if there is one.
_HANDLERS: dict[type, Callable[[PeerChannel, Any], object | None]] = {
    spec.Channel.Flow: lambda channel, method: spec.Channel.FlowOk(method.active),
    spec.Confirm.Select: PeerChannel._confirm,
    spec.Exchange.Declare: PeerChannel._declare_exchange,
    spec.Exchange.Delete: PeerChannel._delete_exchange,
    spec.Queue.Declare: PeerChannel._declare_queue,
    spec.Queue.Purge: PeerChannel._purge,
    spec.Queue.Delete: PeerChannel._delete_queue,
    **dict.fromkeys((spec.Queue.Bind, spec.Exchange.Bind), PeerChannel._bind),
    **dict.fromkeys((spec.Queue.Unbind, spec.Exchange.Unbind), PeerChannel._unbind),
    spec.Basic.Publish: PeerChannel._begin_publish,
    spec.Basic.Qos: PeerChannel._set_prefetch,
    spec.Basic.Consume: PeerChannel._consume,
    spec.Basic.Cancel: PeerChannel._cancel,
    spec.Basic.Get: PeerChannel._get,
    spec.Basic.Ack: PeerChannel._ack,
    spec.Basic.Nack: PeerChannel._nack,
    spec.Basic.Reject: PeerChannel._reject,
}

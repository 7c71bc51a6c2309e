"""Session: one connection with one channel, as the broker sees it: delivery tags, unanswered messages, subscribers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple, Protocol

from amqtask.transport.memory.queues import MemoryQueue, Subscriber
from amqtask.transport.memory.refusals import unknown_tag
from amqtask.transport.memory.stored import REJECTED, Stored

if TYPE_CHECKING:
    from amqtask.protocol.message import PropertiesLike


class Delivered(NamedTuple):
    """One delivery, as it goes to the client."""

    tag: int
    queue: str
    stored: Stored
    properties: PropertiesLike
    redelivered: bool


class _Unanswered(NamedTuple):
    queue: MemoryQueue
    subscriber: Subscriber
    stored: Stored


class Server(Protocol):
    """The broker's members that a connection needs."""

    nack_counts: bool

    @property
    def lock(self) -> AbstractContextManager[object]:
        """Held by every operation."""

    def queue(self, name: str, session: object = None) -> MemoryQueue:
        """A queue by name. Raises: Refused."""

    def expire(self) -> None:
        """Let messages expire, and deliver what can be."""

    def unsubscribed(self, queue: MemoryQueue) -> None:
        """A consumer of this queue has ended."""

    def returned(self, queue: MemoryQueue, stored: Stored, *, counts: bool) -> None:
        """Requeue a message: it was unanswered, or nacked with requeue."""

    def rejected(self, queue: MemoryQueue, stored: Stored, reason: str) -> None:
        """A message was rejected without requeue."""

    def disconnected(self, session: Session) -> None:
        """A session has ended."""


class Session:
    """One connection with its channel. All calls take the broker's lock; callbacks run under it and must only take note."""

    def __init__(self, broker: Server, on_lost: Callable[[Exception], None]) -> None:
        self._broker = broker
        self._on_lost = on_lost
        self._tags = itertools.count(1)
        self._unanswered: dict[int, _Unanswered] = {}
        self._queues: dict[str, tuple[MemoryQueue, Subscriber]] = {}
        self.is_open = True

    def consume(
        self,
        queue_name: str,
        tag: str,
        on_delivery: Callable[[Delivered], None],
        on_cancelled: Callable[[str], None],
        *,
        prefetch: int,
        no_ack: bool = False,
    ) -> None:
        """Subscribe. Raises: Refused."""
        with self._broker.lock:
            queue = self._broker.queue(queue_name, self)

            def deliver(subscriber: Subscriber, stored: Stored) -> None:
                on_delivery(self._delivered(queue, subscriber, stored))

            def cancelled(subscriber: Subscriber) -> None:
                self._queues.pop(subscriber.tag, None)
                on_cancelled(subscriber.tag)

            subscriber = Subscriber(tag, deliver, cancelled, prefetch, no_ack)
            self._queues[tag] = (queue, subscriber)
            queue.subscribers.append(subscriber)
            self._broker.expire()

    def cancel(self, tag: str) -> None:
        """End a subscription; its unanswered deliveries can still be answered."""
        with self._broker.lock:
            subscription = self._queues.pop(tag, None)
            if subscription is not None:
                queue, subscriber = subscription
                queue.subscribers.remove(subscriber)
                self._broker.unsubscribed(queue)

    def _delivered(self, queue: MemoryQueue, subscriber: Subscriber, stored: Stored) -> Delivered:
        redelivered = stored.deliveries > 0
        stored.deliveries += 1
        tag = next(self._tags)
        if not subscriber.no_ack:
            subscriber.unacked += 1
            self._unanswered[tag] = _Unanswered(queue, subscriber, stored)
        return Delivered(tag, queue.declared.name, stored, stored.decoded(), redelivered)

    # -- answers

    def ack(self, tag: int, *, multiple: bool = False) -> None:
        """basic.ack. Raises: Refused for an unknown tag."""
        with self._broker.lock:
            for _ in self._settled(tag, multiple=multiple):
                pass
            self._broker.expire()

    def reject(self, tag: int, *, requeue: bool) -> None:
        """basic.reject. Raises: Refused for an unknown tag."""
        self._give_back(tag, multiple=False, requeue=requeue, counts=True)

    def nack(self, tag: int, *, multiple: bool = False, requeue: bool = True) -> None:
        """basic.nack. Raises: Refused for an unknown tag."""
        self._give_back(tag, multiple=multiple, requeue=requeue, counts=self._broker.nack_counts)

    def _give_back(self, tag: int, *, multiple: bool, requeue: bool, counts: bool) -> None:
        with self._broker.lock:
            for queue, _, stored in self._settled(tag, multiple=multiple):
                if requeue:
                    self._broker.returned(queue, stored, counts=counts)
                else:
                    self._broker.rejected(queue, stored, REJECTED)
            self._broker.expire()

    def _settled(self, tag: int, *, multiple: bool) -> list[_Unanswered]:
        if tag not in self._unanswered and not (multiple and tag == 0):
            raise unknown_tag(tag)
        tags = [open_tag for open_tag in self._unanswered if open_tag <= tag or not tag] if multiple else [tag]
        settled = [self._unanswered.pop(settled_tag) for settled_tag in tags]
        for unanswered in settled:
            unanswered.subscriber.unacked -= 1
        return settled

    # -- the end

    def close(self) -> None:
        """The client closes the connection; unanswered deliveries go back to their queues."""
        with self._broker.lock:
            if not self.is_open:
                return
            self.is_open = False
            for tag in list(self._queues):
                self.cancel(tag)
            unanswered, self._unanswered = list(self._unanswered.values()), {}
            for queue, _, stored in unanswered:
                self._broker.returned(queue, stored, counts=True)
            self._broker.disconnected(self)
            self._broker.expire()

    def lose(self, error: Exception) -> None:
        """The broker ends the connection."""
        with self._broker.lock:
            if self.is_open:
                self.close()
                self._on_lost(error)

"""Blocking odd jobs on queues for the command line: count, purge, look at, move."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pika
from pika.exceptions import AMQPError, ChannelClosedByBroker

from amqtask.exceptions import (
    AccessRefused,
    BrokerUnreachable,
    ConnectionBlocked,
    MessageTooLarge,
    OperationalError,
    PublishError,
    PublishTimeout,
    QueueNotFound,
    Unroutable,
)
from amqtask.protocol.message import Delivery, Message
from amqtask.transport.contract import QueueState
from amqtask.transport.errors import ACCESS_REFUSED, NOT_FOUND, connection_error, lacks
from amqtask.transport.fields import install
from amqtask.transport.pika_log import keep_quiet
from amqtask.transport.url import BrokerAddress

if TYPE_CHECKING:
    from amqtask.ground.shapes import FieldTable
    from amqtask.protocol.message import PropertiesLike
    from amqtask.transport.contract import Publisher
    from amqtask.transport.pika_types import BlockingChannel, PikaMethod

# How many messages are under way at once when messages move: so many may be stored twice after a kill.
# RabbitMQ's client of a quorum queue keeps acknowledgements to itself while 32 are not yet applied (rabbit_fifo_client's
# soft limit), and forgets those of basic.get when the channel closes (3.10: 67 of 100 came back). Each basic.get waits for
# all that came before it, so fewer than that at once are safe.
BATCH = 25
# What one consumer may hold (basic.qos has 16 bits), and seconds without a delivery after which no more are waited for.
MOST_PREFETCHED = 65535
DELIVERY_SECONDS = 10.0
# What is ready no more, and does not come within so many seconds, went to others.
QUIET_SECONDS = 1.0
# Errors that fail every message; other errors concern one message only (a nack may be either).
_NO_BROKER = (BrokerUnreachable, ConnectionBlocked, PublishTimeout)
_ITS_OWN = (Unroutable, MessageTooLarge)


@dataclass(slots=True)
class Moved:
    """The result of moving messages.

    `repeated` of the moved messages had been delivered before: an earlier move that was killed may have published them.
    `kept` did not fit the filter. `failed` could not be published, the first of them because of `failure`; they are still
    in the queue. `is_over`: the error was not caused by these messages, so other messages would fail, too.
    """

    moved: int = 0
    repeated: int = 0
    kept: int = 0
    failed: int = 0
    failure: PublishError | None = None
    is_over: bool = False


class QueueAdmin:
    """One short-lived connection; use it as a context manager.

    Raises: BrokerUnreachable when no address answers, AccessRefused for a refused login, QueueNotFound for a queue
    that is not there, OperationalError when the connection breaks.
    """

    def __init__(self, addresses: Sequence[BrokerAddress]) -> None:
        self._addresses = addresses
        self._connection: Any = None

    def __enter__(self) -> QueueAdmin:
        install()
        keep_quiet()
        parameters = [address.parameters(name="amqtask command line") for address in self._addresses]
        try:
            self._connection = pika.BlockingConnection(parameters)
        except (AMQPError, OSError) as error:
            raise connection_error(error, self._addresses) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._connection.is_open:
            self._connection.close()

    @property
    def server(self) -> str:
        """The broker's product and version, from its server properties."""
        properties: FieldTable = self._connection._impl.server_properties or {}
        return f"{properties.get('product', '?')} {properties.get('version', '?')}"

    def state(self, queue: str) -> QueueState:
        """How many messages are ready in the queue, and how many consumers it has."""
        with self.channel(queue) as channel:
            method = channel.queue_declare(queue, passive=True).method
            return QueueState(int(method.message_count), int(method.consumer_count))

    def has_exchange(self, name: str) -> bool:
        """Whether there is such an exchange."""
        try:
            with self.channel(name) as channel:
                channel.exchange_declare(name, passive=True)
        except QueueNotFound:
            return False
        return True

    def count(self, queue: str) -> int:
        """How many messages are ready in the queue."""
        return self.state(queue).ready

    def purge(self, queue: str) -> int:
        """Delete the ready messages; how many there were."""
        with self.channel(queue) as channel:
            return int(channel.queue_purge(queue).method.message_count)

    def delete(self, queue: str) -> None:
        """Delete the queue with its messages; no error when it does not exist."""
        with self.channel(queue) as channel:
            channel.queue_delete(queue)

    def take(self, queue: str) -> Delivery | None:
        """The first message, which is gone then."""
        with self.channel(queue) as channel:
            return _get(channel, queue, auto_ack=True)

    def browse(self, queue: str, limit: int) -> Iterator[Delivery]:
        """The first messages, which stay in the queue (and are marked as redelivered from now on)."""
        with self.channel(queue) as channel:
            for _ in range(limit):
                delivery = _get(channel, queue)
                if delivery is None:
                    return
                yield delivery

    def move(
        self,
        queue: str,
        publisher: Publisher,
        convert: Callable[[Delivery], Message | None],
        *,
        limit: int | None = None,
        acknowledge: bool = True,
        is_stopped: Callable[[], bool] = lambda: False,
        on_progress: Callable[[Moved], None] = lambda _: None,
    ) -> Moved:
        """Publish `convert(delivery)` of each message that is ready now, at most `limit`; acknowledge the confirmed ones.

        `convert` returns None for a message that is to stay. A message is acknowledged after its confirm, never before:
        whatever interrupts a move, each message is stored at least once. `acknowledge=False` copies. A message that cannot be
        published stays in the queue and does not hold up others; when the broker takes no message at all, the move ends.
        `is_stopped` is called between batches.
        """
        done = Moved()
        with self.channel(queue) as channel:
            remaining = int(channel.queue_declare(queue, passive=True).method.message_count)
            while remaining > 0 and not is_stopped() and not done.is_over and (limit is None or done.moved < limit):
                batch_size = min(BATCH, remaining, BATCH if limit is None else limit - done.moved)
                taken = [delivery for _ in range(batch_size) if (delivery := _get(channel, queue)) is not None]
                remaining -= batch_size if taken else remaining
                pairs = [(delivery, message) for delivery in taken if (message := convert(delivery)) is not None]
                done.kept += len(taken) - len(pairs)
                _publish(channel, publisher, pairs, done, acknowledge=acknowledge)
                on_progress(done)
        return done

    def sift(self, queue: str, is_meant: Callable[[Delivery], bool], *, delete: bool) -> int:
        """How many of the messages that are ready now are meant; with `delete` they are deleted.

        All are read before the first one is deleted, and the others are requeued when the channel closes: in their order,
        because they were delivered to one consumer. They then count as redelivered.
        """
        with self.channel(queue) as channel:
            tags = self._look_at_all(channel, queue, is_meant)
            if delete:
                for first in range(0, len(tags), BATCH):
                    for tag in tags[first : first + BATCH]:
                        channel.basic_ack(tag)
                    channel.basic_get(queue)  # see BATCH; what has come meanwhile goes back, too
            return len(tags)

    def _look_at_all(self, channel: BlockingChannel, queue: str, is_meant: Callable[[Delivery], bool]) -> list[int]:
        """The delivery tags of the messages that are meant."""
        expected = _ready(channel, queue)
        read_count, tags = 0, list[int]()

        def look(_: object, method: PikaMethod, properties: PropertiesLike, body: bytes) -> None:
            nonlocal read_count
            read_count += 1
            delivery = Delivery(
                body, properties, method.exchange, method.routing_key, method.redelivered, queue, method.delivery_tag, 0
            )
            if is_meant(delivery):
                tags.append(method.delivery_tag)

        channel.basic_qos(prefetch_count=MOST_PREFETCHED)
        last_delivery, room = time.monotonic(), 0
        while read_count < expected and time.monotonic() < last_delivery + DELIVERY_SECONDS:
            if read_count == room:
                # Broker and tags keep the consumers' order.
                channel.basic_consume(queue, look, consumer_tag=f"amqtask-sift-{room:09}")
                room += MOST_PREFETCHED
            count_before = read_count
            self._connection.process_data_events(time_limit=0.1)
            if read_count > count_before:
                last_delivery = time.monotonic()
            elif time.monotonic() > last_delivery + QUIET_SECONDS and not _ready(channel, queue):
                break  # other consumers have taken the others
        return tags

    def wait(self, seconds: float) -> None:
        """Do nothing for so long, but keep the connection alive. Raises: OperationalError when it breaks."""
        try:
            self._connection.sleep(seconds)
        except AMQPError as error:
            raise _broken(error) from error

    @contextmanager
    def channel(self, queue: str) -> Iterator[BlockingChannel]:
        """A pika channel for a job on the queue; its refusals become our errors."""
        try:
            channel = self._connection.channel()
            try:
                yield channel
            finally:
                if channel.is_open:
                    channel.close()
        except ChannelClosedByBroker as error:
            if error.reply_code == NOT_FOUND:
                raise QueueNotFound(f"there is no queue {queue!r} on this broker.") from error
            if error.reply_code == ACCESS_REFUSED:
                raise AccessRefused(f"may not do this: {lacks('read', error.reply_text)}") from error
            raise OperationalError(f"queue {queue!r}: {error.reply_text}") from error
        except AMQPError as error:
            raise _broken(error) from error


def _broken(error: AMQPError) -> OperationalError:
    return OperationalError(f"the connection to the broker broke: {error!r}")


def _ready(channel: BlockingChannel, queue: str) -> int:
    return int(channel.queue_declare(queue, passive=True).method.message_count)


def _get(channel: BlockingChannel, queue: str, *, auto_ack: bool = False) -> Delivery | None:
    method, properties, body = channel.basic_get(queue, auto_ack=auto_ack)
    if method is None:
        return None
    return Delivery(
        body, properties, method.exchange, method.routing_key, method.redelivered, queue, method.delivery_tag, 0
    )


def _publish(
    channel: BlockingChannel,
    publisher: Publisher,
    pairs: Sequence[tuple[Delivery, Message]],
    done: Moved,
    *,
    acknowledge: bool,
) -> None:
    if not pairs:
        return
    try:
        errors: Sequence[PublishError | None] = publisher.publish_many([message for _, message in pairs])
    except PublishError as error:
        errors = [error] * len(pairs)
    stored = [delivery for (delivery, _), error in zip(pairs, errors, strict=True) if error is None]
    failures = [error for error in errors if error is not None]
    done.failed += len(failures)
    done.failure = done.failure or next(iter(failures), None)
    done.is_over = any(isinstance(error, _NO_BROKER) for error in failures) or (
        not stored and not all(isinstance(error, _ITS_OWN) or type(error) is PublishError for error in failures)
    )
    done.moved += len(stored)
    done.repeated += sum(delivery.redelivered for delivery in stored)
    if not acknowledge or not stored:
        return
    if not done.failed and not done.kept:
        channel.basic_ack(stored[-1].tag, multiple=True)
    else:
        for delivery in stored:
            channel.basic_ack(delivery.tag)

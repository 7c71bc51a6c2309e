"""Blocking odd jobs on queues for the command line: count, purge, look at, move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pika
from pika.exceptions import AMQPConnectionError, ChannelClosedByBroker, NackError, UnroutableError

from amqtask.exceptions import BrokerUnreachable, OperationalError, PublishRefused, QueueNotFound, Unroutable
from amqtask.message import Delivery, Message
from amqtask.transport.fields import install
from amqtask.transport.url import BrokerAddress


class QueueAdmin:
    """One short-lived connection; use it as a context manager.

    Raises: BrokerUnreachable when no address answers, QueueNotFound for a queue that is not there.
    """

    def __init__(self, addresses: Sequence[BrokerAddress]) -> None:
        self._addresses = addresses
        self._connection: Any = None

    def __enter__(self) -> QueueAdmin:
        install()
        try:
            self._connection = pika.BlockingConnection([address.parameters() for address in self._addresses])
        except AMQPConnectionError as error:
            where = ", ".join(address.safe_url for address in self._addresses)
            raise BrokerUnreachable(f"no broker at {where}: {error!r}. Is it running, and is the URL right?") from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._connection.is_open:
            self._connection.close()

    def count(self, queue: str) -> int:
        """How many messages are ready in the queue."""
        with self._channel(queue) as channel:
            return int(channel.queue_declare(queue, passive=True).method.message_count)

    def purge(self, queue: str) -> int:
        """Delete what is ready; how many that were."""
        with self._channel(queue) as channel:
            return int(channel.queue_purge(queue).method.message_count)

    def browse(self, queue: str, limit: int) -> list[Delivery]:
        """The first messages, which stay where they are (and are marked as redelivered from now on)."""
        with self._channel(queue) as channel:
            return list(self._get(channel, queue, limit))

    def move(self, queue: str, limit: int, convert: Any) -> int:
        """Publish `convert(delivery)` for each of the first messages, and acknowledge it after the confirm.

        `convert` returns a Message, or None to leave the message where it is. Returns how many moved.
        """
        moved = 0
        with self._channel(queue) as channel:
            channel.confirm_delivery()
            for delivery in self._get(channel, queue, limit):
                message = convert(delivery)
                if message is not None:
                    self._publish(channel, message)
                    channel.basic_ack(delivery.tag)
                    moved += 1
        return moved

    def _get(self, channel: Any, queue: str, limit: int) -> Iterator[Delivery]:
        for _ in range(limit):
            method, properties, body = channel.basic_get(queue)
            if method is None:
                return
            yield Delivery(
                body, properties, method.exchange, method.routing_key, method.redelivered, queue, method.delivery_tag, 0
            )

    def _publish(self, channel: Any, message: Message) -> None:
        wanted = message.properties
        fields = {name: getattr(wanted, name) for name in pika.BasicProperties().__dict__ if hasattr(wanted, name)}
        try:
            channel.basic_publish(
                message.exchange, message.routing_key, message.body, pika.BasicProperties(**fields), mandatory=True
            )
        except UnroutableError as error:
            raise Unroutable(f"nothing takes routing key {message.routing_key!r} now; the message stays.") from error
        except NackError as error:
            raise PublishRefused(
                f"queue {message.routing_key!r} refused it (is it full?); the message stays."
            ) from error

    @contextmanager
    def _channel(self, queue: str) -> Iterator[Any]:
        channel = self._connection.channel()
        try:
            yield channel
        except ChannelClosedByBroker as error:
            if error.reply_code == 404:
                raise QueueNotFound(f"there is no queue {queue!r} on this broker.") from error
            raise OperationalError(f"queue {queue!r}: {error.reply_text}") from error
        finally:
            if channel.is_open:
                channel.close()

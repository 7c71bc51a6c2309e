"""Consumers and publishers on an I/O loop that the test turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from amqtask.exceptions import PublishError
from amqtask.protocol.entities import Queue
from amqtask.protocol.message import Message, Properties
from amqtask.testing.suites.transport import Listener
from amqtask.transport.confirms import PATIENCE_SECONDS
from amqtask.transport.connection import LoopConnection
from amqtask.transport.consumer import PikaConsumer
from amqtask.transport.loop import PikaLoop
from amqtask.transport.loop_publisher import PikaLoopPublisher
from amqtask.transport.url import parse_broker_urls
from integration.waiting import LONG, eventually


class Looped:
    """One loop, what was made on it, and the end of all that."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.loop = PikaLoop()
        self.warnings: list[str] = []
        self._consumers: list[PikaConsumer] = []
        self._publishers: list[PikaLoopPublisher] = []

    def until(
        self,
        condition: Callable[[], object],
        timeout: float = LONG,
        *,
        what: str = "it did not happen",
        turn: float = 0.002,
    ) -> None:
        """Turn the loop until the condition holds, which is looked at every `turn` seconds (0: after each turn)."""
        eventually(condition, timeout, what=what, every=turn, sleep=self.loop.run_once)

    def consumer(
        self, *queues: Queue, url: str | list[str] = "", prefetch: int = 100, **options: Any
    ) -> tuple[Listener, PikaConsumer]:
        """Started. `options` are the connection's."""
        listener = Listener()
        consumer = PikaConsumer(self._connection(url, options), listener)
        listener.consumer = consumer
        self._consumers.append(consumer)
        for queue in queues:
            consumer.add_queue(queue, prefetch=prefetch)
        consumer.start()
        return listener, consumer

    def consuming(self, *queues: Queue, **options: Any) -> tuple[Listener, PikaConsumer]:
        """Started, and it has said that it consumes."""
        listener, consumer = self.consumer(*queues, **options)
        self.until(lambda: listener.consuming, what=f"not consuming: {listener}")
        return listener, consumer

    def publisher(
        self, url: str | list[str] = "", *, nack_patience: float = PATIENCE_SECONDS, **options: Any
    ) -> PikaLoopPublisher:
        """Not started. `options` are the connection's."""
        connection = self._connection(url, options)
        made = PikaLoopPublisher(connection, on_warning=self.warnings.append, nack_patience=nack_patience)
        self._publishers.append(made)
        return made

    def _connection(self, url: str | list[str], options: dict[str, Any]) -> LoopConnection:
        return LoopConnection(parse_broker_urls(url or self.url), self.loop, **options)

    def stop(self, user: PikaConsumer | PikaLoopPublisher) -> None:
        """And wait until it has."""
        stopped: list[bool] = []
        user.stop(on_stopped=lambda: stopped.append(True))
        self.until(lambda: stopped)

    def close(self) -> None:
        """Stop everything."""
        users: list[PikaConsumer | PikaLoopPublisher] = [*self._publishers, *self._consumers]
        for user in users:
            self.stop(user)
        self.loop.run_once(0.1)  # for attempts to connect that end now
        self.loop.close()


class Sent:
    """Publishes and writes down what became of each message, in the order in which that was known."""

    def __init__(self, publisher: PikaLoopPublisher) -> None:
        self._publisher = publisher
        self.done: list[bytes] = []
        self.errors: dict[bytes, PublishError] = {}

    def publish(self, body: bytes, queue: str, *, exchange: str = "", declare: Any = (), **properties: Any) -> None:
        """One message."""

        def on_done(error: PublishError | None) -> None:
            self.done.append(body)
            if error is not None:
                self.errors[body] = error

        self._publisher.publish(Message(body, Properties(**properties), exchange, queue, declare), on_done)

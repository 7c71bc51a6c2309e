"""The parts that an implementation gives to the conformance suite for transports, and what the suite's tests do with them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import pytest

from amqtask.protocol.entities import Queue, arguments
from amqtask.protocol.message import Delivery, Message, Properties
from amqtask.transport.contract import Consumer, ConsumerListener, LoopPublisher, Publisher

if TYPE_CHECKING:
    from amqtask.ground.shapes import FieldTable

PATIENCE = 60.0
CLASSIC = arguments({"x-queue-type": "classic"})


def _nested(depth: int) -> dict[str, object]:
    table: FieldTable = {}
    for _ in range(depth):
        table = {"inner": table}
    return table


# What a broker would close the connection for, or what cannot be written at all.
UNWRITABLE_HEADERS: dict[str, FieldTable] = {
    "an object": {"what": object()},
    "larger than a frame": {"large": "x" * 200_000},
    "no number": {"limit": float("nan")},
    "infinite": {"limits": [1.5, float("-inf")]},
    "a decimal that is not a number": {"limit": Decimal("sNaN")},
    "a large integer": {"count": 2**70},
    "half a character": {"text": "\ud800"},
    "an early date": {"when": datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=5)))},
    "nested without end": _nested(5000),
}


class TurningLoop(Protocol):
    """A loop that a test can turn; also amqtask.pool.Loop."""

    def run_once(self, timeout: float = 0.0) -> None: ...

    def close(self) -> None: ...


@dataclass
class Listener:
    """Records the calls of a consumer; with `acks` it acknowledges each delivery at once."""

    acks: bool = False
    deliveries: list[Delivery] = field(default_factory=list)
    consuming: list[int] = field(default_factory=list)
    lost: list[Exception] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    fatal: list[Exception] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    consumer: Consumer | None = None

    def on_delivery(self, delivery: Delivery) -> None:
        self.deliveries.append(delivery)
        if self.acks and self.consumer is not None:
            self.consumer.ack(delivery.tag)

    def on_consuming(self, epoch: int) -> None:
        self.consuming.append(epoch)

    def on_connection_lost(self, error: Exception) -> None:
        self.lost.append(error)

    def on_cancelled(self, queue: str, reason: str) -> None:
        self.cancelled.append(queue)

    def on_fatal(self, error: Exception) -> None:
        self.fatal.append(error)

    def unanswered(self, queue: str) -> int:
        return 0 if self.acks else sum(delivery.queue == queue for delivery in self.deliveries)

    def on_warning(self, text: str) -> None:
        self.warnings.append(text)

    @property
    def bodies(self) -> list[bytes]:
        """The bodies of all deliveries, in order."""
        return [delivery.body for delivery in self.deliveries]


# What a broker may lack.
HEADERS_EXCHANGES = "headers exchanges"
EXCHANGE_BINDINGS = "bindings of exchanges to exchanges"
STORED_FANOUTS = "fanout exchanges that store for queues that nobody consumes"
RISING_PRIORITIES = "priorities of which the highest goes first"
TIME_TO_LIVE = "messages that expire in their queue"
EXCLUSIVE_QUEUES = "queues that others may not consume"
# Without that, what is held stays held over a lost connection.
DELIVERIES_OF_ONE_CONNECTION = "deliveries that end with their connection"


class TransportParts:
    """Makes an implementation's parts for each test, and ends them."""

    lacks: ClassVar[frozenset[str]] = frozenset()

    # -- for the implementation

    def make_publisher(self, on_warning: Callable[[str], None]) -> Publisher:
        """A publisher, which the suite closes."""
        raise NotImplementedError

    def make_loop(self) -> TurningLoop:
        """A loop, which the suite turns and closes."""
        raise NotImplementedError

    def make_consumer(self, loop: Any, listener: ConsumerListener) -> Consumer:
        """On that loop; not started."""
        raise NotImplementedError

    def make_loop_publisher(self, loop: Any, on_warning: Callable[[str], None]) -> LoopPublisher:
        """On that loop; not started."""
        raise NotImplementedError

    def cut(self) -> None:
        """End all connections from outside; new ones work."""
        raise NotImplementedError

    def delete_queue(self, name: str) -> None:
        """Delete a queue, as an operator does; no error when it is not there."""
        raise NotImplementedError

    def delete_exchange(self, name: str) -> None:
        """Delete an exchange; no error when it is not there."""

    # -- what the tests use

    @pytest.fixture(autouse=True)
    def parts(self) -> Iterator[None]:
        """Override it to have fixtures of your own, and `yield from self.with_parts()` in it."""
        yield from self.with_parts()

    def with_parts(self) -> Iterator[None]:
        """Make the suite's parts for one test."""
        self.warnings: list[str] = []
        self._names: list[str] = []
        self._consumers: list[Consumer] = []
        self._loop_publishers: list[LoopPublisher] = []
        self.publisher = self.make_publisher(self.warnings.append)
        self.loop: Any = self.make_loop()
        yield
        for publisher in self._loop_publishers:
            publisher.stop()
        if self._loop_publishers:
            self.settle()  # turns in which they can say goodbye
        for consumer in self._consumers:
            stopped: list[bool] = []
            consumer.stop(on_stopped=lambda stopped=stopped: stopped.append(True))  # type: ignore[misc]
            self.until(lambda stopped=stopped: stopped)  # type: ignore[misc]
        for name in self._names:
            self.delete_queue(name)
            self.delete_exchange(name)
        self.publisher.close()
        self.loop.close()

    def need(self, feature: str) -> None:
        """Skip the test when the broker lacks that."""
        if feature in self.lacks:
            pytest.skip(f"this broker has no {feature}")

    def name(self, prefix: str = "q") -> str:
        """A name of this test's own, for a queue or an exchange."""
        self._names.append(f"{prefix}-{uuid.uuid4().hex[:10]}")
        return self._names[-1]

    def until(self, predicate: Callable[[], object], timeout: float = PATIENCE) -> None:
        """Turn the loop until the condition holds."""
        deadline = time.monotonic() + timeout
        while not predicate():
            assert time.monotonic() < deadline, "it did not happen in time"
            self.loop.run_once(0.002)

    def settle(self) -> None:
        """Turn the loop until what is on its way has arrived: a message to a queue of its own has gone round."""
        queue = Queue(self.name("settle"), arguments=CLASSIC)
        listener, _ = self.consume(queue)
        self.publish(queue, b"round")
        self.until(lambda: listener.deliveries)

    def publish(self, queue: Queue, *bodies: bytes, **properties: Any) -> None:
        """Publish bodies to a queue through the default exchange."""
        for body in bodies:
            self.publisher.publish(Message(body, Properties(**properties), "", queue.name, declare=(queue,)))

    def consume(
        self, *queues: Queue, prefetch: int = 100, acks: bool = False, dead_letter: Queue | None = None
    ) -> tuple[Listener, Consumer]:
        """A started consumer that has told its listener so."""
        listener, consumer = self.consumer(*queues, prefetch=prefetch, acks=acks, dead_letter=dead_letter)
        self.until(lambda: listener.consuming)
        return listener, consumer

    def consumer(
        self, *queues: Queue, prefetch: int = 100, acks: bool = False, dead_letter: Queue | None = None
    ) -> tuple[Listener, Consumer]:
        """A started consumer."""
        listener = Listener(acks)
        consumer = listener.consumer = self.make_consumer(self.loop, listener)
        self._consumers.append(consumer)
        for queue in queues:
            consumer.add_queue(queue, prefetch=prefetch, dead_letter=dead_letter)
        consumer.start()
        return listener, consumer

    def loop_publisher(self) -> LoopPublisher:
        """A started publisher on the loop."""
        publisher = self.make_loop_publisher(self.loop, self.warnings.append)
        self._loop_publishers.append(publisher)
        publisher.start()
        return publisher

    def stop(self, consumer: Consumer) -> None:
        """Stop a consumer, and wait until it has stopped."""
        stopped: list[bool] = []
        consumer.stop(on_stopped=lambda: stopped.append(True))
        self._consumers.remove(consumer)
        self.until(lambda: stopped)

    def stored(self, queue: Queue) -> int:
        """How many messages a queue holds; they are taken out."""
        listener, consumer = self.consume(queue, acks=True)
        self.publish(queue, b"the last")
        self.until(lambda: b"the last" in listener.bodies)
        self.stop(consumer)
        return len(listener.deliveries) - 1

    def work_queue(self, **queue_arguments: object) -> tuple[Queue, Queue]:
        """A quorum queue and the queue of its dead letters."""
        name = self.name("work")
        dead = Queue(self.name("dead"), arguments=CLASSIC)
        all_arguments = {
            "x-queue-type": "quorum",
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": dead.name,
            **queue_arguments,
        }
        self.publisher.declare([dead])
        return Queue(name, arguments=arguments(all_arguments)), dead

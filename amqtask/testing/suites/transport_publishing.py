"""The promises of every transport about publishing: what is routed where, which error is whose, from a thread and from a loop."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import pytest

from amqtask.exceptions import MessageTooLarge, PublishError, PublishRefused, Unroutable
from amqtask.protocol.entities import Arguments, Binding, Declaration, Exchange, Queue, arguments
from amqtask.protocol.message import Delivery, Message, Properties
from amqtask.transport.contract import Consumer, ConsumerListener, LoopPublisher, Publisher

if TYPE_CHECKING:
    from amqtask.ground.shapes import FieldTable

# -- The parts that an implementation gives to the conformance suite for transports, and what the suite's tests do with them.

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


class PublishingSuite(TransportParts):
    """A part of TransportSuite."""

    # -- errors

    def test_an_unroutable_message_is_an_error_of_its_own_publish(self) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        good = Message(b"good", Properties(), "", queue.name, (queue,))
        bad = Message(b"bad", Properties(), "", self.name("nobody"))

        with pytest.raises(Unroutable, match="nobody"):
            self.publisher.publish(bad)
        errors = self.publisher.publish_many([good, bad, replace(bad, mandatory=False), good])

        assert [type(error) for error in errors] == [type(None), Unroutable, type(None), type(None)]

    def test_an_exchange_that_does_not_exist_is_an_error_of_its_own_publish(self) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        good = Message(b"good", Properties(), "", queue.name, (queue,))
        bad = Message(b"bad", Properties(), self.name("no-exchange"), "key")

        errors = self.publisher.publish_many([good, bad, good])

        assert [type(error) for error in errors] == [type(None), Unroutable, type(None)]
        assert "no-exchange" in str(errors[1])

    def test_a_message_that_cannot_be_taken_makes_no_copy_of_others(self) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        bad = Message(b"bad", Properties(), self.name("no-exchange"), "key")
        batch = [Message(b"%d" % number, Properties(), "", queue.name, (queue,)) for number in range(20)]
        batch.insert(10, bad)

        errors = self.publisher.publish_many(batch)

        assert [type(error) for error in errors if error is not None] == [Unroutable]
        assert self.stored(queue) == 20

    def test_a_full_queue_refuses(self) -> None:
        queue = Queue(self.name(), arguments=(*CLASSIC, ("x-max-length", 2), ("x-overflow", "reject-publish")))
        self.publish(queue, b"1", b"2")

        with pytest.raises(PublishRefused, match="full"):
            self.publish(queue, b"3")

    @pytest.mark.parametrize("headers", UNWRITABLE_HEADERS.values(), ids=UNWRITABLE_HEADERS)
    def test_headers_that_amqp_cannot_write_are_refused_and_do_no_harm(self, headers: FieldTable) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        good = Message(b"good", Properties(), "", queue.name, (queue,))
        bad = Message(b"bad", Properties(headers=headers), "", queue.name)

        errors = self.publisher.publish_many([good, bad, good])

        assert errors[0] is errors[2] is None
        assert isinstance(errors[1], PublishError)
        assert len(str(errors[1])) < 1000
        assert self.stored(queue) == 2

    def test_the_error_of_headers_larger_than_a_frame_names_the_limit(self) -> None:
        message = Message(b"", Properties(headers={"large": "x" * 200_000}), "", self.name())

        with pytest.raises(MessageTooLarge, match=r"200,\d\d\d bytes.*frame_max"):
            self.publisher.publish(message)

    # -- routing

    @pytest.mark.parametrize(
        ("exchange_type", "binding_key", "binding_arguments", "hits", "misses"),
        [
            ("direct", "a", (), [("a", {})], [("b", {}), ("", {})]),
            ("fanout", "a", (), [("a", {}), ("b", {})], []),
            ("topic", "a.*.c", (), [("a.b.c", {})], [("a.c", {}), ("a.b.b.c", {})]),
            ("topic", "a.#", (), [("a", {}), ("a.b.c", {})], [("b.a", {})]),
            ("topic", "#.z", (), [("z", {}), ("x.y.z", {})], [("z.x", {})]),
            ("headers", "", (("a", "1"), ("b", 2)), [("k", {"a": "1", "b": 2})], [("k", {"a": "1"}), ("k", {})]),
            (
                "headers",
                "",
                (("a", "1"), ("b", 2), ("x-match", "any")),
                [("k", {"a": "1"}), ("k", {"b": 2})],
                [("k", {"a": "2"}), ("k", {})],
            ),
        ],
    )
    def test_an_exchange_routes_as_its_type_says(
        self, exchange_type: str, binding_key: str, binding_arguments: Arguments, hits: list[Any], misses: list[Any]
    ) -> None:
        for needed_by, feature in (("headers", HEADERS_EXCHANGES), ("fanout", STORED_FANOUTS)):
            if exchange_type == needed_by:
                self.need(feature)
        exchange, queue = Exchange(self.name("x"), exchange_type), Queue(self.name(), arguments=CLASSIC)
        declare = (exchange, queue, Binding(exchange, queue.name, binding_key, binding_arguments))
        messages = [
            Message(b"", Properties(headers=dict(headers)), exchange.name, key, declare)
            for key, headers in [*hits, *misses]
        ]

        errors = self.publisher.publish_many(messages)

        assert [error is None for error in errors] == [True] * len(hits) + [False] * len(misses)

    def test_an_exchange_bound_to_an_exchange_passes_messages_on_once(self) -> None:
        self.need(EXCHANGE_BINDINGS)
        first, second = Exchange(self.name("x"), "fanout"), Exchange(self.name("x"), "direct")
        queue = Queue(self.name(), arguments=CLASSIC)
        declare: tuple[Declaration, ...] = (
            first,
            second,
            queue,
            Binding(first, second.name, to_exchange=True),
            Binding(first, queue.name),
            Binding(second, queue.name, "key"),
        )
        self.publisher.publish(Message(b"1", Properties(), first.name, "key", declare))

        listener, _ = self.consume(queue)
        self.until(lambda: listener.deliveries)
        self.settle()

        assert listener.bodies == [b"1"]

    # -- from the loop

    def test_a_loop_publisher_confirms_each_message_or_names_what_failed(self) -> None:
        queue = Queue(self.name(), arguments=(*CLASSIC, ("x-max-length", 1), ("x-overflow", "reject-publish")))
        publisher = self.loop_publisher()
        answers: list[tuple[str, str]] = []

        def publish(name: str, message: Message) -> None:
            publisher.publish(message, lambda error: answers.append((name, type(error).__name__)))

        publish("stored", Message(b"1", Properties(), "", queue.name, (queue,)))
        publish("refused", Message(b"2", Properties(), "", queue.name, (queue,)))
        publish("returned", Message(b"3", Properties(), "", self.name("nobody")))
        publish("not mandatory", Message(b"4", Properties(), "", self.name("nobody"), mandatory=False))
        assert publisher.outstanding == 4
        assert answers == []
        self.until(lambda: publisher.outstanding == 0)

        assert len(answers) == 4
        assert dict(answers) == {
            "stored": "NoneType",
            "refused": "PublishRefused",
            "returned": "Unroutable",
            "not mandatory": "NoneType",
        }

    def test_a_message_that_a_loop_publisher_cannot_publish_makes_no_copy_of_others(self) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        publisher = self.loop_publisher()
        missing = self.name("no-exchange")
        answers: list[tuple[bytes, str]] = []

        for number in range(60):
            body, is_bad = b"%d" % number, number % 20 == 10
            message = Message(body, Properties(), missing if is_bad else "", queue.name, () if is_bad else (queue,))
            publisher.publish(message, lambda error, body=body: answers.append((body, type(error).__name__)))  # type: ignore[misc]
            if not number % 7:
                self.loop.run_once(0.0)
        self.until(lambda: len(answers) == 60)

        assert {body for body, error in answers if error == "Unroutable"} == {b"10", b"30", b"50"}
        assert self.stored(queue) == 57

    def test_a_loop_publisher_stores_all_over_a_lost_connection(self) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        publisher = self.loop_publisher()
        listener, _ = self.consume(queue, acks=True)
        confirmed: list[object] = []

        for number in range(200):
            publisher.publish(Message(b"%d" % number, Properties(), "", queue.name, (queue,)), confirmed.append)
            if number == 100:
                self.loop.run_once(0.0)
                self.cut()
        self.until(lambda: len(confirmed) == 200 and len(set(listener.bodies)) == 200)

        assert confirmed == [None] * 200

    def test_a_loop_publisher_refuses_headers_that_amqp_cannot_write_and_sends_the_others_once(self) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        publisher = self.loop_publisher()
        answers: list[PublishError | None] = []
        for headers in UNWRITABLE_HEADERS.values():
            publisher.publish(Message(b"good", Properties(), "", queue.name, (queue,)), answers.append)
            publisher.publish(Message(b"bad", Properties(headers=headers), "", queue.name), answers.append)

        self.until(lambda: len(answers) == 2 * len(UNWRITABLE_HEADERS))

        assert sum(isinstance(error, PublishError) for error in answers) == len(UNWRITABLE_HEADERS)
        assert self.stored(queue) == len(UNWRITABLE_HEADERS)

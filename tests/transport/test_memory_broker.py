"""What the in-process broker does beyond the transport's contract: a clock that tests turn, alarms, stops, fine points."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from amqtask.exceptions import (
    BrokerUnreachable,
    ConnectionBlocked,
    MessageTooLarge,
    PublishError,
    PublishRefused,
    Unroutable,
)
from amqtask.protocol.entities import Binding, Exchange, Queue, arguments
from amqtask.protocol.message import Message, Properties
from amqtask.testing.loop import PlainLoop
from amqtask.testing.suites.transport import Listener
from amqtask.topology.declarations import QueueDefaults, dead_letter_queue, work_queue
from amqtask.topology.delays import DelayPlan
from amqtask.transport.admin import QueueTail, StreamNote
from amqtask.transport.connection import LoopConnection
from amqtask.transport.consumer import PikaConsumer
from amqtask.transport.contract import OFFSET, PREFETCH
from amqtask.transport.loop_publisher import PikaLoopPublisher
from amqtask.transport.memory.broker import ManualClock, MemoryBroker
from amqtask.transport.memory.local import MemoryAddress, MemoryAsyncPublisher
from amqtask.transport.memory.queues import matches_headers, matches_topic
from amqtask.transport.publisher import PikaPublisher


class Bench:
    """A broker and a loop on one clock, and shorthand for what tests do with them."""

    def __init__(self, **options: Any) -> None:
        self.clock = ManualClock()
        self.broker = MemoryBroker(clock=self.clock, **options)
        self.loop = PlainLoop(self.clock)
        self.warnings: list[str] = []
        self.addresses = [MemoryAddress(broker=self.broker)]
        self.publisher = PikaPublisher(self.addresses, timeout=1.5, on_warning=self.warnings.append)

    def queue(self, name: str, kind: str = "classic", **asked: Any) -> Queue:
        given = {key.replace("_", "-"): value for key, value in asked.items()}
        queue = Queue(name, arguments=arguments({"x-queue-type": kind, **given}))
        self.publisher.declare([queue])
        return queue

    def publish(self, queue: str, body: bytes = b"", **properties: Any) -> None:
        self.publisher.publish(Message(body, Properties(**properties), "", queue))

    def consume(self, queue: Queue, *, prefetch: int = 10, acks: bool = False) -> tuple[Listener, PikaConsumer]:
        listener = Listener(acks)
        consumer = listener.consumer = PikaConsumer(LoopConnection(self.addresses, self.loop), listener)
        consumer.add_queue(queue, prefetch=prefetch)
        consumer.start()
        self.turn()
        return listener, consumer

    def turn(self) -> None:
        for _ in range(60):
            self.loop.run_once()

    def bodies(self, queue: str) -> list[bytes]:
        return [body for _, body in self.broker.messages(queue)]

    def deaths(self, queue: str) -> list[dict[str, Any]]:
        properties, _ = self.broker.messages(queue)[0]
        found: list[dict[str, Any]] = properties.headers["x-death"]
        return found


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """With `indirect` parameters: the broker's options."""
    made = Bench(**getattr(request, "param", {}))
    yield made
    made.loop.close()


# -- time


def test_a_message_expires_when_the_clock_says_so(bench: Bench) -> None:
    bench.queue("dead")
    bench.queue("q", x_message_ttl=10_000, x_dead_letter_exchange="", x_dead_letter_routing_key="dead")
    bench.publish("q", b"1")
    bench.publish("q", b"2", expiration="3000")

    bench.clock.advance(9.9)
    # Only the head of a queue expires, so the second waits for the first.
    assert bench.bodies("q") == [b"1", b"2"]
    bench.clock.advance(0.1)

    assert bench.bodies("q") == []
    assert bench.bodies("dead") == [b"1", b"2"]


def test_a_message_without_time_to_live_reaches_only_who_takes_it_at_once(bench: Bench) -> None:
    queue = bench.queue("q", x_message_ttl=0)
    bench.publish("q", b"nobody is there")
    listener, _ = bench.consume(queue)

    bench.publish("q", b"at once")
    bench.turn()

    assert listener.bodies == [b"at once"]


def test_days_of_delay_pass_in_a_moment(bench: Bench) -> None:
    plan = DelayPlan()
    target = bench.queue("target")
    listener, _ = bench.consume(target, acks=True)
    day = 86_400.0

    bench.publisher.publish(plan.delayed(Message(b"later", Properties(), "", "target"), 3 * day + 0.3))
    bench.clock.advance(3 * day)
    bench.turn()
    assert listener.bodies == []
    for _ in range(105):
        bench.clock.advance(0.1)
        bench.turn()

    assert listener.bodies == [b"later"]


def test_a_loop_lets_messages_expire_without_anybody_asking(bench: Bench) -> None:
    dead = bench.queue("dead")
    bench.queue("q", x_message_ttl=1_000, x_dead_letter_exchange="", x_dead_letter_routing_key="dead")
    listener, _ = bench.consume(dead, acks=True)
    bench.publish("q", b"1")
    bench.turn()

    bench.clock.advance(1.0)
    bench.turn()

    assert listener.bodies == [b"1"]


# -- dead letters


def test_each_death_is_counted_by_queue_and_reason(bench: Bench) -> None:
    queue = bench.queue("q", x_dead_letter_exchange="", x_dead_letter_routing_key="wait")
    bench.queue("wait", x_message_ttl=1_000, x_dead_letter_exchange="", x_dead_letter_routing_key="q")
    listener, consumer = bench.consume(queue)
    bench.publish("q", b"again", expiration=None)
    for _ in range(3):
        bench.turn()
        consumer.reject(listener.deliveries[-1].tag, requeue=False)
        bench.turn()
        bench.clock.advance(1.0)
    bench.turn()

    headers = listener.deliveries[-1].properties.headers
    assert [(entry["queue"], entry["reason"], entry["count"]) for entry in headers["x-death"]] == [
        ("wait", "expired", 3),
        ("q", "rejected", 3),
    ]
    assert (headers["x-first-death-queue"], headers["x-last-death-queue"]) == ("q", "wait")


def test_a_cycle_of_expiry_alone_is_cut(bench: Bench) -> None:
    bench.queue("a", x_message_ttl=1_000, x_dead_letter_exchange="", x_dead_letter_routing_key="b")
    bench.queue("b", x_message_ttl=1_000, x_dead_letter_exchange="", x_dead_letter_routing_key="a")
    bench.publish("a", b"round and round")

    bench.clock.advance(1.0)
    assert bench.bodies("b") == [b"round and round"]
    bench.clock.advance(1.0)

    assert bench.bodies("a") == bench.bodies("b") == []


def test_without_a_dead_letter_exchange_the_message_is_gone(bench: Bench) -> None:
    queue = bench.queue("q")
    listener, consumer = bench.consume(queue)
    bench.publish("q", b"1")
    bench.turn()

    consumer.reject(listener.deliveries[0].tag, requeue=False)
    bench.turn()

    assert bench.broker.count("q") == 0


def test_an_overflow_drops_or_refuses(bench: Bench) -> None:
    bench.queue("dead")
    bench.queue("drops", x_max_length=2, x_dead_letter_exchange="", x_dead_letter_routing_key="dead")
    bench.queue("refuses", x_max_length=2, x_overflow="reject-publish")
    for number in range(3):
        bench.publish("drops", b"%d" % number)
    for number in range(2):
        bench.publish("refuses", b"%d" % number)

    with pytest.raises(PublishRefused):
        bench.publish("refuses", b"2")

    assert bench.bodies("drops") == [b"1", b"2"]
    assert bench.bodies("dead") == [b"0"]
    assert bench.deaths("dead")[0]["reason"] == "maxlen"
    assert bench.bodies("refuses") == [b"0", b"1"]


# -- quorum queues


def test_a_quorum_queue_has_strict_priorities(bench: Bench) -> None:
    bench.queue("q", "quorum")
    for body, priority in ((b"none", None), (b"0", 0), (b"31", 31), (b"5", 5), (b"99", 99)):
        bench.publish("q", body, priority=priority)

    assert bench.bodies("q") == [b"31", b"99", b"5", b"none", b"0"]


@pytest.mark.parametrize(
    ("bench", "count"), [({"nack_counts": False}, 0), ({"nack_counts": True}, 2)], indirect=["bench"]
)
def test_whether_a_nack_counts_is_the_brokers_choice(bench: Bench, count: int) -> None:
    queue = bench.queue("q", "quorum", x_delivery_limit=5)
    listener, consumer = bench.consume(queue)
    bench.publish("q", b"1")

    for _ in range(2):
        bench.turn()
        consumer.nack(listener.deliveries[-1].tag)
    bench.turn()

    assert (listener.deliveries[-1].properties.headers or {}).get("x-delivery-count", 0) == count


def test_a_message_whose_consumers_die_ends_in_the_dead_letter_queue(bench: Bench) -> None:
    defaults = QueueDefaults(delivery_limit=3)
    queue = work_queue("work", defaults)
    dead = dead_letter_queue(queue, defaults)
    assert dead is not None
    bench.publisher.declare([dead, queue])
    bench.publish("work", b"poison")

    for _ in range(13):
        _, consumer = bench.consume(queue)
        consumer.stop()
        bench.turn()

    assert bench.bodies("work.dead") == [b"poison"]
    assert bench.deaths("work.dead")[0]["reason"] == "delivery_limit"


def test_returned_messages_have_their_old_place(bench: Bench) -> None:
    queue = bench.queue("q")
    listener, consumer = bench.consume(queue, prefetch=3)
    for number in range(5):
        bench.publish("q", b"%d" % number)
    bench.turn()
    assert len(listener.deliveries) == 3
    consumer.pause()

    for delivery in (listener.deliveries[2], listener.deliveries[0]):
        consumer.nack(delivery.tag)
    bench.turn()

    assert bench.bodies("q") == [b"0", b"2", b"3", b"4"]


# -- the channel


def test_answering_twice_costs_the_channel(bench: Bench) -> None:
    queue = bench.queue("q")
    listener, consumer = bench.consume(queue)
    bench.publish("q", b"1")
    bench.turn()
    consumer.ack(1)

    consumer.ack(1)
    bench.turn()

    assert "unknown delivery tag 1" in str(listener.lost[0])


def test_an_answer_after_a_cut_is_void(bench: Bench) -> None:
    queue = bench.queue("q")
    listener, consumer = bench.consume(queue)
    bench.publish("q", b"1")
    bench.turn()

    bench.broker.cut()
    consumer.ack(listener.deliveries[0].tag)

    assert bench.bodies("q") == [b"1"]


def test_an_auto_delete_queue_goes_with_its_last_consumer(bench: Bench) -> None:
    queue = Queue("q", auto_delete=True, arguments=arguments({"x-queue-type": "classic"}))
    _, first = bench.consume(queue)
    _, second = bench.consume(queue)

    first.stop()
    bench.turn()
    assert bench.broker.queue_names() == ["q"]
    second.stop()
    bench.turn()

    assert bench.broker.queue_names() == []


# -- alarms and stops


def test_a_stopped_broker_is_unreachable_and_keeps_what_is_durable(bench: Bench) -> None:
    queue = bench.queue("durable")
    bench.publisher.declare([Queue("transient", durable=False)])
    bench.publish("durable", b"kept")
    bench.publish("durable", b"lost", delivery_mode=1)
    listener, _ = bench.consume(queue, prefetch=1)

    bench.broker.stop()
    bench.turn()
    with pytest.raises(BrokerUnreachable):
        bench.publish("durable", b"nobody is there")
    bench.broker.start()
    bench.clock.advance(1.0)
    bench.turn()

    assert listener.lost
    assert listener.bodies == [b"kept", b"kept"]
    assert bench.broker.queue_names() == ["durable"]


def test_a_publish_waits_for_a_broker_that_comes_up(bench: Bench) -> None:
    bench.queue("q")
    bench.broker.stop()
    publisher = PikaPublisher(bench.addresses, timeout=10)
    thread = threading.Thread(target=publisher.publish, args=(Message(b"1", Properties(), "", "q"),))
    thread.start()

    bench.broker.start()
    thread.join(60)

    assert bench.bodies("q") == [b"1"]


def test_an_alarm_blocks_publishing_until_it_is_over(bench: Bench) -> None:
    bench.queue("q")
    publisher = PikaLoopPublisher(LoopConnection(bench.addresses, bench.loop))
    answers: list[Any] = []

    bench.broker.block("low on disk")
    with pytest.raises(ConnectionBlocked, match="low on disk"):
        bench.publish("q")
    publisher.publish(Message(b"1", Properties(), "", "q"), answers.append)
    bench.turn()
    assert (answers, publisher.outstanding) == ([], 1)
    bench.broker.unblock()
    bench.clock.advance(1.0)
    bench.turn()

    assert (answers, bench.bodies("q")) == ([None], [b"1"])


def test_an_alarm_does_not_hold_up_an_event_loop(bench: Bench) -> None:
    bench.queue("q")
    publisher = MemoryAsyncPublisher(PikaPublisher(bench.addresses, timeout=60.0))

    async def publish_during_an_alarm() -> None:
        bench.broker.block()
        publishing = asyncio.ensure_future(publisher.publish(Message(b"1", Properties(), "", "q")))
        await asyncio.sleep(0)
        assert not publishing.done()
        bench.broker.unblock()
        await publishing
        await publisher.close()

    asyncio.run(publish_during_an_alarm())

    assert bench.bodies("q") == [b"1"]


@pytest.mark.parametrize("bench", [{"max_message_size": 10}], indirect=True)
def test_a_message_over_the_limit_is_refused(bench: Bench) -> None:
    bench.queue("q")

    with pytest.raises(MessageTooLarge, match="11 bytes"):
        bench.publish("q", b"x" * 11)


# -- entities


def test_a_quorum_queue_cannot_be_transient(bench: Bench) -> None:
    with pytest.raises(PublishError, match="invalid property 'durable'"):
        bench.publisher.declare([Queue("q", durable=False, arguments=(("x-queue-type", "quorum"),))])


def test_a_binding_needs_both_its_ends(bench: Bench) -> None:
    exchange = Exchange("x")
    with pytest.raises(PublishError, match="no exchange 'x'"):
        bench.publisher.declare([Binding(exchange, "q")])
    with pytest.raises(PublishError, match="no queue 'q'"):
        bench.publisher.declare([exchange, Binding(exchange, "q")])


def test_what_exists_otherwise_is_named_once(bench: Bench) -> None:
    bench.queue("q", x_max_priority=3)
    bench.publisher.declare([Exchange("x", "direct")])

    for _ in range(2):
        bench.publisher.declare([Queue("q", arguments=(("x-queue-type", "quorum"),)), Exchange("x", "topic")])

    assert len(bench.warnings) == 2
    assert "'q'" in bench.warnings[0]
    assert "'x' exists with type" in bench.warnings[1]


def test_an_alternate_exchange_takes_what_nobody_else_does(bench: Bench) -> None:
    bench.queue("rest")
    other = Exchange("other", "fanout")
    main = Exchange("main", "direct", arguments=(("alternate-exchange", "other"),))

    bench.publisher.publish(Message(b"1", Properties(), "main", "k", (other, main, Binding(other, "rest"))))

    assert bench.bodies("rest") == [b"1"]


def test_a_purged_or_deleted_queue_is_empty_or_gone(bench: Bench) -> None:
    bench.queue("q")
    bench.publish("q")

    assert bench.broker.purge("q") == 1
    assert bench.broker.count("q") == 0
    bench.broker.delete_queue("q")

    with pytest.raises(Unroutable):
        bench.publish("q")


# -- matching


@pytest.mark.parametrize(
    ("pattern", "key", "hit"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.b.c", False),
        ("*", "a", True),
        ("*", "a.b", False),
        ("*", "", False),
        ("#", "", True),
        ("#", "a.b.c", True),
        ("a.#.z", "a.z", True),
        ("a.#.z", "a.b.c.z", True),
        ("a.#.z", "a.b", False),
        ("#.b.#", "a.b.c", True),
        ("#.b.#", "a.c", False),
        ("a.*.#", "a", False),
        ("", "", True),
        ("", "a", False),
    ],
)
def test_topic_patterns(pattern: str, key: str, hit: bool) -> None:
    assert matches_topic(pattern, key) is hit


@pytest.mark.parametrize(
    ("asked", "headers", "hit"),
    [
        ({}, {"a": 1}, True),
        ({"a": 1}, {"a": 1, "b": 2}, True),
        ({"a": 1, "b": 2}, {"a": 1}, False),
        ({"a": 1, "b": 2, "x-match": "any"}, {"b": 2}, True),
        ({"a": 1, "x-match": "any"}, {}, False),
        ({"a": None}, {"a": "whatever"}, True),
        ({"x-a": 1}, {}, True),
        ({"x-a": 1, "x-match": "all-with-x"}, {}, False),
        ({"x-a": 1, "x-match": "any-with-x"}, {"x-a": 1}, True),
    ],
)
def test_header_matches(asked: dict[str, Any], headers: dict[str, Any], hit: bool) -> None:
    assert matches_headers(asked, headers) is hit


# -- streams


def tail(bench: Bench, log: Queue, position: int | None) -> QueueTail:
    """Reads the stream from after this position."""
    return QueueTail(bench.addresses, log, (), position=position, connect_timeout=5.0, name="test")


def read(tail: QueueTail, limit: int = 10) -> list[tuple[int, bytes]]:
    """Offset and body of what has come, which is acknowledged."""
    deliveries = tail.read(limit, 5.0)
    tail.acknowledge()
    return [((delivery.properties.headers or {})[OFFSET], delivery.body) for delivery in deliveries]


def test_a_stream_is_read_by_many_and_keeps_what_it_has(bench: Bench) -> None:
    log = bench.queue("log", "stream")
    for body in (b"a", b"b", b"c"):
        bench.publish("log", body)
    first, second, late = tail(bench, log, None), tail(bench, log, 0), tail(bench, log, 2)

    assert read(first, 2) == [(0, b"a"), (1, b"b")]
    assert read(first) == [(2, b"c")]
    assert read(second) == [(1, b"b"), (2, b"c")]
    bench.publish("log", b"d")
    assert read(first) == read(second) == read(late) == [(3, b"d")]
    assert bench.broker.count("log") == 4


def test_a_consumer_of_a_stream_gets_more_when_it_has_acknowledged(bench: Bench) -> None:
    log = bench.queue("log", "stream")
    bodies = [str(number).encode() for number in range(PREFETCH + 50)]
    for body in bodies:
        bench.publish("log", body)
    reader = tail(bench, log, None)

    assert [body for _, body in read(reader, 1000)] == bodies[:PREFETCH]
    assert [body for _, body in read(reader, 1000)] == bodies[PREFETCH:]


def test_a_stream_drops_its_oldest_messages_beyond_its_bytes(bench: Bench) -> None:
    log = bench.queue("log", "stream", x_max_length_bytes=4)
    for body in (b"aa", b"bb", b"cc"):
        bench.publish("log", body)

    assert read(tail(bench, log, None)) == [(1, b"bb"), (2, b"cc")]


def test_a_note_is_the_last_message_of_its_stream(bench: Bench) -> None:
    note = StreamNote(bench.addresses, lambda: PikaPublisher(bench.addresses, timeout=1.5), "note")

    assert note.read() is None
    for text in ("first", "second"):
        note.write(text)
    assert note.read() == "second"

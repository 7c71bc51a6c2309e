"""PikaCollector on a real broker: over which host it looks. What it is for is in test_compositions.py and test_stores.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from amqtask.protocol.entities import Queue, arguments
from amqtask.protocol.message import Delivery
from amqtask.transport.collector import PikaCollector
from amqtask.transport.connection import LoopConnection
from amqtask.transport.contract import QueuePresence
from amqtask.transport.url import parse_broker_urls
from integration.conftest import Broker
from integration.faults import Forwarder
from integration.looped import Looped, Sent


@pytest.mark.parametrize("published", [False, True], ids=["before anything is published", "after that"])
def test_it_looks_over_the_host_that_parts_are_published_to(
    rabbit: Broker, looped: Looped, broker_url: str, published: bool
) -> None:
    queue = Queue(rabbit.queue("parts"), arguments=arguments({"x-queue-type": "classic"}))
    rabbit.channel().queue_declare(queue.name, durable=True, arguments=dict(queue.arguments))
    publisher = looped.publisher(broker_url)
    seen: list[QueuePresence] = []
    with Forwarder(broker_url) as way:
        collector = PikaCollector(
            LoopConnection(parse_broker_urls([way.url, broker_url]), looped.loop), beside=publisher
        )
        collector.collect(queue.name, 2, take=lambda *_: False, on_done=seen.append)
        looped.until(lambda: seen)
        if published:
            sent = Sent(publisher)
            sent.publish(b"part", queue.name)
            looped.until(lambda: sent.done)

        way.stall()
        collector.collect(queue.name, 2, take=lambda *_: False, on_done=seen.append)
        looped.until(lambda: len(seen) == 2)
        collector.stop()

    assert seen == [QueuePresence.THERE, QueuePresence.THERE if published else QueuePresence.AWAY]


@pytest.mark.parametrize("has_read", [False, True], ids=["before they have come", "while they are dealt with"])
def test_messages_that_a_silent_connection_was_given_are_awaited(
    rabbit: Broker, looped: Looped, broker_url: str, caplog: pytest.LogCaptureFixture, has_read: bool
) -> None:
    caplog.set_level("INFO", "amqtask.transport")
    queue = Queue(rabbit.queue("parts"), arguments=arguments({"x-queue-type": "classic"}))
    other = rabbit.queue("others")
    channel = rabbit.channel()
    for name in (queue.name, other):
        channel.queue_declare(name, durable=True, arguments=dict(queue.arguments))
    for body in (b"1", b"2"):
        channel.basic_publish("", queue.name, body)
    taken: list[list[bytes]] = []
    finish: list[Callable[[bool], None]] = []
    seen: list[QueuePresence] = []
    others: list[QueuePresence] = []

    def take(deliveries: Sequence[Delivery], finished: Callable[[bool], None]) -> bool:
        taken.append([delivery.body for delivery in deliveries])
        finish.append(finished)
        return True

    with Forwarder(broker_url) as way:
        if not has_read:
            way.keep_deliveries()
        collector = PikaCollector(LoopConnection(parse_broker_urls([way.url, broker_url]), looped.loop))
        collector.collect(queue.name, 2, take=take, on_done=seen.append)
        looped.until(lambda: rabbit.count(queue.name) == 0 and len(taken) == has_read)
        way.stall()
        looped.until(lambda: "chords: connection lost" in caplog.text)
        if has_read:
            finish[0](False)
        # Looks are taken in turns: when the other queue has had its own, this one has, too.
        collector.collect(other, 1, take=take, on_done=others.append)
        looped.until(lambda: others)
        assert (seen, len(taken)) == ([], has_read)

        way.cut()
        looped.until(lambda: len(taken) > has_read)
        finish[-1](True)
        looped.until(lambda: seen)
        collector.stop()

    assert taken[-1] == [b"1", b"2"]
    assert seen == [QueuePresence.GONE]

"""PikaCollector on a real broker: over which host it looks. What it is for is in test_compositions.py and test_stores.py."""

from __future__ import annotations

import pytest

from amqtask.protocol.entities import Queue, arguments
from amqtask.transport.collector import PikaCollector
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
        collector = PikaCollector(parse_broker_urls([way.url, broker_url]), looped.loop, beside=publisher)
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

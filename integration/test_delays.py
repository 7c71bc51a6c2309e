"""The delay levels on a real broker: on time, to any exchange, again and again, and nothing lost on the way."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from amqtask.entities import Declaration, Exchange, Queue
from amqtask.message import Message, Properties
from amqtask.protocol.task import strip_death_headers
from amqtask.topology.delays import DelayPlan
from amqtask.topology.plan import QueueDefaults, declarations, work_queue

DEFAULTS = QueueDefaults()


class Place:
    """One test's own delay levels, work queue and topic exchange; all are deleted after it."""

    def __init__(self, url: str, queue_type: str) -> None:
        self._connection = pika.BlockingConnection(pika.URLParameters(url))
        self.channel: BlockingChannel = self._connection.channel()
        self.channel.confirm_delivery()
        self.name = f"t-{uuid.uuid4().hex[:12]}"
        self.plan = DelayPlan(f"{self.name}.delay", queue_type)
        self.topic = Exchange(f"{self.name}.topic", type="topic")
        self.queue = work_queue(self.name, DEFAULTS, exchange=self.topic, routing_key="feed.#")
        self._made: list[Declaration] = []

    def declare(self, entities: tuple[Declaration, ...]) -> None:
        for entity in entities:
            if entity in self._made:
                continue
            self._made.append(entity)
            if isinstance(entity, Exchange):
                self.channel.exchange_declare(entity.name, entity.type, durable=entity.durable)
            elif isinstance(entity, Queue):
                self.channel.queue_declare(entity.name, durable=entity.durable, arguments=entity.argument_map)
            elif entity.to_exchange:
                self.channel.exchange_bind(
                    entity.destination, entity.source.name, entity.routing_key, dict(entity.arguments)
                )
            else:
                self.channel.queue_bind(
                    entity.destination, entity.source.name, entity.routing_key, dict(entity.arguments)
                )

    def message(self, name: str, exchange: str = "", routing_key: str = "", expiration: str | None = None) -> Message:
        return Message(
            name.encode(),
            Properties(headers={"task": "t"}, correlation_id=name, expiration=expiration),
            exchange,
            routing_key or self.queue.name,
            declarations(self.queue, DEFAULTS),
        )

    def publish(self, message: Message) -> None:
        self.declare(message.declare)
        properties = pika.BasicProperties(
            headers=message.properties.headers,
            correlation_id=message.properties.correlation_id,
            expiration=message.properties.expiration,
            delivery_mode=2,
        )
        self.channel.basic_publish(message.exchange, message.routing_key, message.body, properties, mandatory=True)

    def waited(self, headers: dict[str, Any]) -> float:
        """For how long the queues that a message passed have held it, in seconds."""
        lives = {entity.name: entity.argument_map["x-message-ttl"] for entity in self._made
                 if isinstance(entity, Queue) and entity.name.startswith(self.plan.prefix)}  # fmt: skip
        return float(sum(lives[death["queue"]] * death["count"] for death in headers["x-death"])) / 1000

    def arrivals(self, count: int) -> list[tuple[float, str, dict[str, Any]]]:
        """The next arrivals in the work queue: when, which, and their headers."""
        found = []
        for method, properties, body in self.channel.consume(self.queue.name, inactivity_timeout=90):
            if method is None:
                break
            self.channel.basic_ack(method.delivery_tag)
            found.append((time.monotonic(), body.decode(), properties.headers))
            if len(found) == count:
                break
        self.channel.cancel()
        return found

    def close(self) -> None:
        channel = self._connection.channel()
        for entity in self._made:
            if isinstance(entity, Queue):
                channel.queue_delete(entity.name)
            elif isinstance(entity, Exchange):
                channel.exchange_delete(entity.name)
        self._connection.close()


@pytest.fixture(params=["quorum", "classic"])
def place(request: pytest.FixtureRequest, broker_url: str) -> Iterator[Place]:
    place = Place(broker_url, request.param)
    try:
        yield place
    finally:
        place.close()


@pytest.fixture
def quorum(broker_url: str) -> Iterator[Place]:
    place = Place(broker_url, "quorum")
    try:
        yield place
    finally:
        place.close()


def test_messages_with_different_delays_wait_for_as_long_and_no_longer(place: Place) -> None:
    # One, two and three levels, both ends of a level, and the smallest wait there is.
    waits = [4.25, 0.125, 1.875, 2.0, 0.5, 2.125, 3.0]
    due = {}
    for wait in waits:
        due[str(wait)] = time.monotonic() + wait
        place.publish(place.plan.delayed(place.message(str(wait)), wait))

    arrived = place.arrivals(len(waits))

    assert sorted(name for _, name, _ in arrived) == sorted(due)
    assert min(when - due[name] for when, name, _ in arrived) > -0.1, (arrived, due)
    # How late they are is the machine's affair; the queues that they passed are ours.
    assert {name: place.waited(headers) for _, name, headers in arrived} == {name: float(name) for name in due}


def test_no_long_delay_holds_a_short_one_up(place: Place) -> None:
    place.publish(place.plan.delayed(place.message("long"), 3600.5))
    place.publish(place.plan.delayed(place.message("longer"), 90_000))
    place.publish(place.plan.delayed(place.message("short"), 0.5))

    arrived = place.arrivals(1)

    assert [name for _, name, _ in arrived] == ["short"]


def test_a_delayed_message_goes_to_a_topic_exchange_under_its_own_key(place: Place) -> None:
    wait = 2.2
    message = place.message("topic", place.topic.name, "feed.import")
    published = time.monotonic()
    place.publish(place.plan.delayed(message, wait))

    ((when, name, headers),) = place.arrivals(1)

    assert name == "topic"
    assert when - published > wait - 0.1
    assert headers["task"] == "t"


def test_the_same_message_is_delayed_again_and_again(place: Place) -> None:
    message = place.message("again")
    for _ in range(3):
        place.publish(place.plan.delayed(message, 0.6))
        ((_, name, headers),) = place.arrivals(1)
        assert name == "again"
        assert "x-death" in headers
        # As a worker publishes it again: with what it got.
        message = replace(message, properties=replace(message.properties, headers=strip_death_headers(headers)))


def test_a_queue_that_is_declared_later_still_gets_the_message(quorum: Place) -> None:
    # The at-least-once strategy keeps what cannot be delivered yet.
    other = replace(quorum.message("later"), declare=())
    quorum.publish(quorum.plan.delayed(other, 1.0))
    quorum.declare(declarations(quorum.queue, DEFAULTS))

    ((_, name, _),) = quorum.arrivals(1)

    assert name == "later"


def test_a_message_that_expires_sooner_does_not_arrive_early(place: Place) -> None:
    published = time.monotonic()
    place.publish(place.plan.delayed(place.message("expires", expiration="100"), 1.5))

    ((when, _, _),) = place.arrivals(1)

    assert when - published > 1.4


def test_many_at_once_all_arrive_once(quorum: Place) -> None:
    names = {f"m{number}" for number in range(300)}
    for number, name in enumerate(sorted(names)):
        quorum.publish(quorum.plan.delayed(quorum.message(name), 0.2 + number % 23 / 8))

    arrived = [name for _, name, _ in quorum.arrivals(len(names))]

    assert len(arrived) == len(names)
    assert set(arrived) == names


def test_the_work_queue_and_its_dead_letter_queue_are_what_a_broker_takes(quorum: Place) -> None:
    quorum.declare(declarations(quorum.queue, DEFAULTS))
    quorum.publish(quorum.message("poison"))

    method, _, _ = quorum.channel.basic_get(quorum.queue.name)
    quorum.channel.basic_reject(method.delivery_tag, requeue=False)

    dead = f"{quorum.queue.name}.dead"
    for _, properties, body in quorum.channel.consume(dead, auto_ack=True, inactivity_timeout=90):
        assert body == b"poison"
        assert properties.headers["x-first-death-reason"] == "rejected"
        break
    quorum.channel.cancel()

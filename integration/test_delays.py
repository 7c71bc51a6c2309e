"""Delayed messages on a real broker: without workers of ours, and with them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from amqtask import AmqTask
from amqtask.protocol.entities import Declaration, Exchange, Queue
from amqtask.protocol.message import Message, Properties
from amqtask.topology.declarations import QueueDefaults, declarations, work_queue
from amqtask.topology.delays import MARGIN_SECONDS, STEP_SECONDS, DelayPlan
from integration.conftest import Broker
from integration.nodes import RabbitNode
from integration.waiting import PATIENT, eventually
from integration.workers import WorkerProcess, run_cli

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


@pytest.fixture
def quorum(broker_url: str) -> Iterator[Place]:
    place = Place(broker_url, "quorum")
    try:
        yield place
    finally:
        place.close()


# -- without workers of ours: each waits for the broker's clock for ten seconds, so all do so at once


def waits_of_all_lengths(place: Place) -> tuple[dict[str, float], list[tuple[float, str, dict[str, Any]]], list[float]]:
    """When each message is due, the arrivals, and for how long the queues of each have held it."""
    due = {}
    for wait in (4.25, 0.125, 1.875, 2.0, 0.5, 2.125, 3.0):
        due[str(wait)] = time.monotonic() + wait
        place.publish(place.plan.delayed(place.message(str(wait)), wait))
    arrived = place.arrivals(len(due))
    return due, arrived, [place.waited(headers) for _, _, headers in arrived]


def long_ones_before_a_short_one(place: Place) -> list[str]:
    """What arrives first."""
    place.publish(place.plan.delayed(place.message("long"), 3600.5))
    place.publish(place.plan.delayed(place.message("longer"), 90_000))
    place.publish(place.plan.delayed(place.message("short"), 0.5))
    return [name for _, name, _ in place.arrivals(1)]


def by_a_topic_exchange(place: Place) -> tuple[float, str, dict[str, Any]]:
    """After how many seconds it arrives, and what."""
    published = time.monotonic()
    place.publish(place.plan.delayed(place.message("topic", place.topic.name, "feed.import"), 0.2))
    ((when, name, headers),) = place.arrivals(1)
    return when - published, name, headers


def to_a_queue_that_is_declared_later(place: Place) -> str:
    """What arrives. The at-least-once strategy keeps what cannot be delivered yet."""
    other = replace(place.message("later"), declare=())
    place.publish(place.plan.delayed(other, 1.0))
    place.declare(declarations(place.queue, DEFAULTS))
    ((_, name, _),) = place.arrivals(1)
    return name


def with_an_expiration(place: Place) -> float:
    """After how many seconds it arrives."""
    published = time.monotonic()
    place.publish(place.plan.delayed(place.message("expires", expiration="100"), 0.5))
    ((when, _, _),) = place.arrivals(1)
    return when - published


KINDS = ("quorum", "classic")
SCENARIOS: tuple[tuple[Callable[[Place], Any], str], ...] = (
    *((waits_of_all_lengths, kind) for kind in KINDS),
    *((long_ones_before_a_short_one, kind) for kind in KINDS),
    *((by_a_topic_exchange, kind) for kind in KINDS),
    *((with_an_expiration, kind) for kind in KINDS),
    (to_a_queue_that_is_declared_later, "quorum"),
)
Found = Callable[[Callable[[Place], Any], str], Any]


@pytest.fixture(scope="module")
def found(broker_url: str) -> Iterator[Found]:
    """What came of a scenario on queues of a kind."""

    def run(scenario: Callable[[Place], Any], kind: str) -> Any:
        place = Place(broker_url, kind)
        try:
            return scenario(place)
        finally:
            place.close()

    with ThreadPoolExecutor(len(SCENARIOS)) as threads:
        running = {(scenario, kind): threads.submit(run, scenario, kind) for scenario, kind in SCENARIOS}
        yield lambda scenario, kind: running[scenario, kind].result()


@pytest.mark.parametrize("kind", KINDS)
def test_without_any_worker_of_ours_messages_come_some_seconds_late_and_never_early(found: Found, kind: str) -> None:
    due, arrived, waited = found(waits_of_all_lengths, kind)

    assert sorted(name for _, name, _ in arrived) == sorted(due)
    assert min(when - due[name] for when, name, _ in arrived) > MARGIN_SECONDS - 0.1, (arrived, due)
    # How late they are is the machine's affair; the queues that they passed are ours.
    most = MARGIN_SECONDS + STEP_SECONDS
    names = [float(name) for _, name, _ in arrived]
    assert all(name < seconds <= name + most for name, seconds in zip(names, waited, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_no_long_delay_holds_a_short_one_up(found: Found, kind: str) -> None:
    assert found(long_ones_before_a_short_one, kind) == ["short"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_delayed_message_goes_to_a_topic_exchange_under_its_own_key(found: Found, kind: str) -> None:
    seconds, name, headers = found(by_a_topic_exchange, kind)

    assert name == "topic"
    assert seconds > 0.1
    assert headers["task"] == "t"


def test_a_queue_that_is_declared_later_still_gets_the_message(found: Found) -> None:
    assert found(to_a_queue_that_is_declared_later, "quorum") == "later"


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_that_expires_sooner_does_not_arrive_early(found: Found, kind: str) -> None:
    assert found(with_an_expiration, kind) > 0.4


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


# -- with workers of ours


@pytest.fixture
def nobody(hurt_node: RabbitNode) -> Iterator[RabbitNode]:
    """A node with two users that may declare nothing: a worker and a producer of the queue "operated"."""
    for user, write, read in (
        ("worker", r"^(operated(\.dead)?|amqtask\.delay\..*|amq\.default)$", r"^(operated|amqtask\.delay\..*)$"),
        ("producer", r"^(amqtask\.delay\..*|amq\.default)$", "^$"),
    ):
        hurt_node.ctl("add_user", user, "secret")
        hurt_node.ctl("set_permissions", "-p", "/", user, "^$", write, read)
    yield hurt_node
    for user in ("worker", "producer"):
        hurt_node.ctl("delete_user", user)


def test_who_may_declare_nothing_delays_and_retries_on_an_operators_topology(
    nobody: RabbitNode, tmp_path: Path
) -> None:
    def url(user: str) -> str:
        return nobody.url.replace("guest:guest", f"{user}:secret")

    assert run_cli("-A", "integration.apps.least", "-b", nobody.url, "topology", "declare")[0] == 0
    asked = ("-P", "threads", "-c", "2", "--without-mingle", "--without-gossip", "--without-heartbeat")
    environment = {"AMQTASK_BROKER_URL": url("worker"), "LEAST_FOLDER": str(tmp_path)}
    producer = AmqTask(
        "producer", broker=url("producer"), task_default_queue="operated", set_as_current=False, **PATIENT
    )
    began = time.time()
    with WorkerProcess("integration.apps.least", *asked, environment=environment):
        producer.send_task("least.retried", ("sync",), countdown=1)
        asyncio.run(_send(producer, ("async",)))
        eventually(lambda: len(list(tmp_path.iterdir())) == 2, what="the delayed tasks never ran, or not again")
    producer.close()

    assert time.time() - began > 2


async def _send(app: AmqTask, args: tuple[str]) -> None:
    await app.asend_task("least.retried", args, countdown=1)


def test_a_worker_that_is_killed_leaves_what_it_held_to_the_next_one(rabbit: Broker, tmp_path: Path) -> None:
    queue, file = rabbit.queue("held"), tmp_path / "ran"
    file.touch()
    app = AmqTask("held", broker=rabbit.url, task_default_queue=queue, set_as_current=False, **PATIENT)
    environment = {"SOAK_QUEUE": queue, "SOAK_FILE": str(file), "AMQTASK_BROKER_URL": rabbit.url}
    with WorkerProcess("integration.apps.numbered", "-P", "solo", environment=environment) as first:
        for number in range(20):
            app.send_task("numbered.due", (number, time.time() + 4), countdown=4)
        first.kill()
    with WorkerProcess("integration.apps.numbered", "-P", "solo", environment=environment):
        eventually(lambda: file.read_text().count("\n") >= 20, what="not all of the delayed tasks ran")
    app.close()

    rows = [line.split() for line in file.read_text().splitlines()]
    assert sorted(int(number) for number, _ in rows) == list(range(20))
    assert min(float(late) for _, late in rows) >= 0


def test_a_burst_is_held_by_further_consumers_and_each_task_of_it_runs_once(rabbit: Broker, tmp_path: Path) -> None:
    queue, file = rabbit.queue("burst"), tmp_path / "ran"
    file.touch()
    app = AmqTask("burst", broker=rabbit.url, task_default_queue=queue, set_as_current=False, **PATIENT)
    environment = {"SOAK_QUEUE": queue, "SOAK_FILE": str(file), "AMQTASK_BROKER_URL": rabbit.url}
    held = app.delays.queue_name(0, 1)
    with WorkerProcess("integration.apps.numbered", "-P", "solo", environment=environment):
        for number in range(500):
            app.send_task("numbered.due", (number, time.time() + 7), countdown=7)
        channel = rabbit.channel()
        eventually(
            lambda: channel.queue_declare(held, passive=True).method.consumer_count > 2,
            what="nobody made room for more",
        )
        eventually(lambda: file.read_text().count("\n") >= 500, what="not all of the delayed tasks ran")
    app.close()

    rows = [line.split() for line in file.read_text().splitlines()]
    assert sorted(int(number) for number, _ in rows) == list(range(500))
    assert min(float(late) for _, late in rows) >= 0

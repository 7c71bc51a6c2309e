"""Fixtures of all integration tests: a broker, the result stores' servers, and queue names that nobody else uses.

A server starts when the first test asks for it and stops with the session. One that is missing skips its tests on a laptop
and fails them in CI. `postgres` is a new database for each test; tests that share one make it from `postgres_server`:

    @pytest.fixture(scope="module")
    def database(postgres_server: Postgres) -> str:
        return postgres_server.create_database()
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pika
import pytest
from hypothesis import HealthCheck, settings

from amqtask import AmqTask
from amqtask.topology.delays import LEVELS
from amqtask.transport import content
from integration.looped import Looped
from integration.nodes import Cluster, NodeError, RabbitNode, broker, rabbitmq_installed
from integration.servers import (
    Postgres,
    Sentinel,
    memcached,
    mongodb,
    postgres,
    redis_cluster,
    redis_sentinel,
    redis_server,
    valkey_server,
)
from integration.waiting import eventually

# A machine with other work is no failure.
settings.register_profile("amqtask", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("amqtask")

T = TypeVar("T")


def pytest_configure() -> None:
    """A shell has its background jobs ignore SIGINT, and so would all programs that these tests start and interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def whole_floats() -> None:
    """The tests' own pika connections read headers as ours do: pika cuts floats off."""
    content.install()


def _while_it_runs(server: contextlib.AbstractContextManager[T]) -> Iterator[T]:
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(server)
        except NodeError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(str(error))
        yield found


@pytest.fixture(scope="session")
def broker_url() -> Iterator[str]:
    """The URL of a real RabbitMQ."""
    for url in _while_it_runs(broker()):
        os.environ["AMQTASK_BROKER_URL"] = url
        yield url


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """The URL of a real Redis."""
    for url in _while_it_runs(redis_server()):
        os.environ["AMQTASK_REDIS_URL"] = url
        yield url


@pytest.fixture(scope="session", autouse=True)
def servers_of_its_own(request: pytest.FixtureRequest) -> None:
    """Of processes that test side by side each has its own broker and Redis, for what it starts, too (integration.run)."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        request.getfixturevalue("broker_url")
        request.getfixturevalue("redis_url")


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    """The URL of a real Valkey."""
    yield from _while_it_runs(valkey_server())


@pytest.fixture(scope="session")
def redis_cluster_url() -> Iterator[str]:
    """The URL of one node of a Redis cluster of three masters."""
    yield from _while_it_runs(redis_cluster())


@pytest.fixture(scope="module")
def sentinel() -> Iterator[Sentinel]:
    """A Redis with a replica behind a sentinel; a module of its own may kill the master."""
    yield from _while_it_runs(redis_sentinel())


@pytest.fixture(scope="session")
def memcached_address() -> Iterator[str]:
    """`host:port` of a memcached."""
    yield from _while_it_runs(memcached())


@pytest.fixture(params=["rabbitmq", "redis"])
def load_application(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Any]]:
    """Loads a module of integration.apps that reads its broker, folder and queue (its own) from the environment: NAME_BROKER …"""
    broker = request.getfixturevalue("redis_url" if request.param == "redis" else "broker_url")
    loaded: list[Any] = []

    def load(name: str) -> Any:
        for what, value in (("BROKER", broker), ("FOLDER", str(tmp_path)), ("QUEUE", f"{name}-{uuid.uuid4().hex[:8]}")):
            monkeypatch.setenv(f"{name.upper()}_{what}", value)
        loaded.append(importlib.reload(importlib.import_module(f"integration.apps.{name}")))
        return loaded[-1]

    yield load
    for module in loaded:
        module.app.control.purge()
        module.app.close()


@pytest.fixture(scope="session")
def mongodb_url() -> Iterator[str]:
    """The URL of a MongoDB database, or of its stand-in (see integration.servers)."""
    yield from _while_it_runs(mongodb())


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """A PostgreSQL server; `create_database()` gives the URL of a new database."""
    yield from _while_it_runs(postgres())


@pytest.fixture(name="postgres")
def postgres_database(postgres_server: Postgres) -> Iterator[str]:
    """The URL (`postgresql://user@host:port/name`) of a new, empty PostgreSQL database, deleted after the test."""
    url = postgres_server.create_database()
    yield url
    postgres_server.drop_database(url)


@pytest.fixture(scope="session")
def hurt_node() -> Iterator[RabbitNode]:
    """A node that tests may stop, fill up or reconfigure, whatever broker the others use."""
    if not rabbitmq_installed():
        pytest.skip("rabbitmq-server is not installed")
    node = RabbitNode("hurt")
    # Small enough that a test can go over it.
    node.configure("max_message_size = 1048576")
    try:
        yield node.start()
    finally:
        node.remove()


@pytest.fixture(scope="session")
def three_nodes() -> Iterator[Cluster]:
    """The nodes of `cluster`."""
    if not rabbitmq_installed():
        pytest.skip("rabbitmq-server is not installed")
    with Cluster() as nodes:
        yield nodes


@pytest.fixture
def cluster(three_nodes: Cluster) -> Iterator[Cluster]:
    """Three nodes that are one broker, which a test may hurt; they run together again after it."""
    yield three_nodes
    three_nodes.mend()


class Broker:
    """What a test needs to know of a broker from outside: counts, raw messages, raw publishing."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._made: list[str] = []
        self._connection = pika.BlockingConnection(pika.URLParameters(url))

    def channel(self) -> pika.adapters.blocking_connection.BlockingChannel:
        """A channel of its own, on a live connection."""
        try:
            self._connection.process_data_events(0)
        except pika.exceptions.AMQPError:
            # Nothing was said over it for two heartbeats: a test may take long, or the machine may have stood still.
            self._connection = pika.BlockingConnection(pika.URLParameters(self.url))
        return self._connection.channel()

    def queue(self, prefix: str = "q") -> str:
        """A new queue name; the queue and its dead-letter queue are deleted after the test."""
        name = f"{prefix}-{uuid.uuid4().hex[:12]}"
        self._made.append(name)
        return name

    def count(self, queue: str) -> int:
        """Ready messages; 0 for a queue that is not there."""
        channel = self.channel()
        try:
            found = int(channel.queue_declare(queue, passive=True).method.message_count)
        except pika.exceptions.ChannelClosedByBroker:
            return 0
        # It may be asked every 20 ms for minutes, and a connection has 2,047 channels.
        channel.close()
        return found

    def exists(self, queue: str) -> bool:
        """Whether there is such a queue."""
        channel = self.channel()
        try:
            channel.queue_declare(queue, passive=True)
        except pika.exceptions.ChannelClosedByBroker:
            return False
        channel.close()
        return True

    def take(self, queue: str) -> tuple[pika.BasicProperties, bytes] | None:
        """The first message, acknowledged; None when there is none."""
        channel = self.channel()
        try:
            method, properties, body = channel.basic_get(queue, auto_ack=True)
        except pika.exceptions.ChannelClosedByBroker:
            return None
        channel.close()
        return None if method is None else (properties, body)

    def publish(self, queue: str, body: bytes, properties: pika.BasicProperties) -> None:
        """A raw message through the default exchange. A quorum queue that was just made may refuse it for a moment."""
        channel = self.channel()
        channel.confirm_delivery()

        def is_taken() -> bool:
            try:
                channel.basic_publish("", queue, body, properties, mandatory=True)
            except pika.exceptions.NackError:
                return False
            return True

        eventually(is_taken, what=f"{queue} refuses messages")
        channel.close()

    def close(self) -> None:
        """Delete what the test made."""
        channel = self.channel()
        for name in self._made:
            for queue in (name, f"{name}.dead"):
                channel.queue_delete(queue)
        self._connection.close()


@pytest.fixture
def rabbit(broker_url: str) -> Iterator[Broker]:
    """The broker as seen from outside."""
    seen = Broker(broker_url)
    try:
        yield seen
    finally:
        seen.close()


@pytest.fixture
def own_delays(rabbit: Broker) -> Iterator[Callable[[AmqTask], None]]:
    """Gives an application delay levels that no other test uses, and deletes them after the test."""
    given: list[AmqTask] = []

    def give(app: AmqTask) -> None:
        app.conf.task_delay_prefix = rabbit.queue("delay")
        given.append(app)

    yield give
    channel = rabbit.channel()
    for app in given:
        for _, name in app.delays.queue_names([0]):
            channel.queue_delete(name)
        for level in range(-1, LEVELS):
            channel.exchange_delete(app.delays.level_name(level))


@pytest.fixture
def looped(broker_url: str) -> Iterator[Looped]:
    """Consumers and publishers on a loop that the test turns."""
    made = Looped(broker_url)
    try:
        yield made
    finally:
        made.close()

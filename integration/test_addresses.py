"""A host's name with two addresses, of which the first takes connections and says nothing: a node that stands still."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from amqtask import AmqTask
from amqtask.transport.publisher import PikaPublisher
from amqtask.transport.url import parse_broker_urls
from integration.conftest import Broker
from integration.test_hosts import to
from integration.workers import WorkerProcess

NAME = "two.example"
# For the programs: NAME has the addresses that ADDRESSES has.
RESOLVER = """
    import os, socket
    from amqtask import AmqTask

    look_up = socket.getaddrinfo

    def resolver(host, port, *options, **more):
        if host not in ("two.example", b"two.example"):
            return look_up(host, port, *options, **more)
        ports = os.environ["ADDRESSES"].split()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", int(port))) for port in ports]

    socket.getaddrinfo = resolver
    app = AmqTask("two")

    @app.task(name="two.add")
    def add(x, y):
        return x + y
"""


@pytest.fixture
def queue(rabbit: Broker) -> str:
    """A queue's name."""
    return rabbit.queue("two")


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of somebody who takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def url(broker_url: str, silent: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """The broker at a name whose first address is silent."""
    split = urlsplit(broker_url)
    look_up = socket.getaddrinfo

    def resolver(host: Any, port: Any, *options: Any, **more: Any) -> Any:
        if host not in (NAME, NAME.encode()):
            return look_up(host, port, *options, **more)
        return [look_up(split.hostname, each, *options, **more)[0] for each in (silent, split.port)]

    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    monkeypatch.setenv("ADDRESSES", f"{silent} {split.port}")
    return broker_url.replace(str(split.hostname), NAME)


def test_a_publish_goes_to_the_address_that_answers(rabbit: Broker, url: str, queue: str) -> None:
    publisher = PikaPublisher(parse_broker_urls(url), timeout=20.0, connect_timeout=4.0)

    publisher.publish(to(queue))

    began = time.monotonic()
    publisher.close()
    publisher.publish(to(queue))
    assert time.monotonic() - began < 2.0  # the silent one is not asked first again
    assert rabbit.count(queue) == 2
    publisher.close()


def test_so_does_an_async_publish(rabbit: Broker, url: str, queue: str) -> None:
    app = AmqTask("async", broker=url, broker_publish_timeout=20.0, task_default_queue=queue)

    async def publish() -> None:
        await app.asend_task("two.add", (1, 2))

    asyncio.run(publish())
    assert rabbit.count(queue) == 1
    app.close()


def test_so_does_a_worker(rabbit: Broker, url: str, tmp_path: Path) -> None:
    queue = rabbit.queue("two")
    (tmp_path / "two.py").write_text(textwrap.dedent(RESOLVER))
    environment = {"AMQTASK_BROKER_URL": url, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parent.parent}"}

    with WorkerProcess("two", "-Q", queue, "-P", "threads", "-c", "1", environment=environment) as worker:
        assert worker.log.count("no broker answers") <= 2


HANGING = """
    import asyncio, socket, sys, time
    from amqtask import AmqTask
    from amqtask.exceptions import BackendUnreachable, BrokerUnreachable, TimeoutError

    def hang(*_, **__):
        time.sleep(3600)

    socket.getaddrinfo = hang
    url = sys.argv[1]
    is_redis = not url.startswith("amqp")
    app = AmqTask("hanging", broker=url, backend=url if is_redis else None, broker_publish_timeout=1.0)
    app.conf.broker_connection_timeout = 1.0
    if is_redis:
        app.conf.broker_transport_options = {"master_name": "m"}
        app.conf.result_backend_transport_options = {"master_name": "m", "retry_for": 1}
    ways = {
        "blocking": lambda: app.send_task("t", ignore_result=True),
        "async": lambda: asyncio.run(app.asend_task("t", ignore_result=True)),
        "results": lambda: app.AsyncResult("x").get(timeout=1),
        "async results": lambda: asyncio.run(app.AsyncResult("x").aget(timeout=1)),
    }
    try:
        ways[sys.argv[2]]()
    except (BrokerUnreachable, BackendUnreachable, TimeoutError) as error:
        print("unreachable", error)
"""


REDISES = [
    "redis://somewhere.invalid/0", "rediss://somewhere.invalid", "sentinel://somewhere.invalid",
    "redis+cluster://somewhere.invalid:6379", "rediss+cluster://somewhere.invalid:6379",
]  # fmt: skip


@pytest.mark.parametrize(
    ("broker", "way"),
    [(url, way) for url in ("amqp://somewhere.invalid/", *REDISES) for way in ("blocking", "async")]
    + [(url, way) for url in REDISES for way in ("results", "async results")],
)
def test_a_resolver_that_hangs_keeps_neither_a_call_nor_its_loop(broker: str, way: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(HANGING), broker, way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("unreachable")


@pytest.mark.parametrize("host", ["a..b", f"{'a' * 70}.example"])
def test_a_name_that_no_host_can_have_is_a_broker_that_cannot_be_reached(host: str) -> None:
    app = AmqTask("nobody", broker=f"amqp://{host}/", broker_publish_timeout=0.3)

    async def publish() -> None:
        await app.asend_task("two.add", (1, 2))

    with pytest.raises(Exception, match="no broker answers") as caught:
        asyncio.run(publish())
    assert type(caught.value).__name__ == "BrokerUnreachable"
    app.close()

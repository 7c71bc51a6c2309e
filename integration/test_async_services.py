"""FastAPI and aiohttp services on real sockets: nothing waits on their event loops."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from amqtask import AmqTask
from amqtask.contrib.asgi import connected
from amqtask.exceptions import BrokerUnreachable, PublishError
from integration.conftest import Broker
from integration.nodes import free_port
from integration.waiting import PATIENT
from integration.workers import LoggedProcess, WorkerProcess, eventually

Start = Callable[..., str]


@pytest.fixture
def environment(broker_url: str, rabbit: Broker) -> dict[str, str]:
    """A queue of its own."""
    return {"CELERY_BROKER_URL": broker_url, "SERVICES_QUEUE": rabbit.queue("services")}


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Start]:
    """Start a service; its URL. `{port}` stands for one that is free."""
    with ExitStack() as stack:

        def begin(line: str, ready: str = "Uvicorn running on") -> str:
            # Before that it has started the application, and does not listen yet.
            port = free_port()
            command = [sys.executable, "-m", *line.format(port=port).split()]
            stack.enter_context(LoggedProcess(command, ready=ready, environment=environment).start())
            return f"http://127.0.0.1:{port}"

        yield begin


@pytest.fixture
def worker(environment: dict[str, str]) -> Iterator[WorkerProcess]:
    """One worker of the services' tasks."""
    options = ("-P", "threads", "-c", "4", "-Q", environment["SERVICES_QUEUE"])
    with WorkerProcess("integration.apps.services", *options, environment=environment, loglevel="WARNING") as started:
        yield started


def client() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=90, limits=httpx.Limits(max_connections=None), trust_env=False)


@pytest.mark.usefixtures("worker")
def test_a_thousand_requests_wait_for_results_at_once(start: Start) -> None:
    url = start("uvicorn integration.apps.services:service --port {port} --log-level info")

    async def ask() -> list[Any]:
        async with client() as session:
            answers = await asyncio.gather(*(session.get(f"{url}/add?x={n}&y=1") for n in range(1000)))
        return [(answer.status_code, answer.json()) for answer in answers]

    assert asyncio.run(ask()) == [(200, n + 1) for n in range(1000)]


@pytest.mark.usefixtures("worker")
def test_others_are_served_while_hundreds_wait(start: Start, tmp_path: Path) -> None:
    url = start("uvicorn integration.apps.services:service --port {port} --log-level info")
    file = tmp_path / "go"

    async def ask() -> Any:
        async with client() as session:
            waiting = [asyncio.ensure_future(session.get(f"{url}/wait?path={file}")) for _ in range(300)]
            pongs = [(await session.get(f"{url}/ping")).json() for _ in range(20)]
            done_before = sum(future.done() for future in waiting)
            file.touch()
            answers = {answer.json() for answer in await asyncio.gather(*waiting)}
        return pongs, done_before, answers

    assert asyncio.run(ask()) == (["pong"] * 20, 0, {"there"})


@pytest.mark.usefixtures("worker")
def test_an_aiohttp_service(start: Start) -> None:
    url = start("aiohttp.web -H 127.0.0.1 -P {port} integration.apps.services:aiohttp_service", "Running on")

    async def ask() -> list[Any]:
        async with client() as session:
            answers = await asyncio.gather(*(session.get(f"{url}/add?x={n}&y=1") for n in range(100)))
        return [answer.json() for answer in answers]

    assert asyncio.run(ask()) == [n + 1 for n in range(100)]


def test_a_service_that_needs_its_broker_does_not_start_without(environment: dict[str, str]) -> None:
    environment.update(CELERY_BROKER_URL=f"amqp://127.0.0.1:{free_port()}//", SERVICES_TIMEOUT="2")
    command = [sys.executable, "-m", "uvicorn", "integration.apps.services:service", "--port", str(free_port())]
    process = LoggedProcess(command, environment=environment).start(wait=False)
    try:
        assert process.wait() == 3
        assert "BrokerUnreachable" in process.log
    finally:
        process.kill()


def test_the_loop_goes_on_while_a_call_waits_for_a_broker_that_is_silent() -> None:
    async def call(app: AmqTask, order: list[str]) -> None:
        with pytest.raises(PublishError):
            await app.asend_task("any")
        order.append("call")

    async def others(order: list[str]) -> None:
        for _ in range(50):
            await asyncio.sleep(0)
        order.append("others")

    async def main(app: AmqTask) -> list[str]:
        order: list[str] = []
        await asyncio.gather(call(app, order), others(order))
        await app.aclose()
        return order

    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections come, and nobody answers
        app = AmqTask(
            "shop", broker="amqp://{}:{}//".format(*silent.getsockname()), backend="rpc://", set_as_current=False
        )
        app.conf.update(broker_connection_timeout=4, broker_publish_timeout=4)
        assert asyncio.run(main(app)) == ["others", "call"]


def test_connecting_early_says_what_is_wrong() -> None:
    app = AmqTask("shop", broker=f"amqp://127.0.0.1:{free_port()}//", backend="rpc://", set_as_current=False)

    with pytest.raises(BrokerUnreachable):
        asyncio.run(app.aconnect(timeout=1))


def test_a_service_may_start_before_its_broker(caplog: pytest.LogCaptureFixture) -> None:
    app = AmqTask("shop", broker=f"amqp://127.0.0.1:{free_port()}//", backend="rpc://", set_as_current=False)
    app.conf.broker_connection_timeout = 1

    async def serve() -> None:
        async with connected(app, must_connect=False):
            with pytest.raises(BrokerUnreachable):
                await app.asend_task("any", timeout=1)

    asyncio.run(serve())
    assert "the service starts without a broker: " in caplog.text


def test_a_service_that_ends_leaves_nothing_in_the_broker(broker_url: str, rabbit: Broker) -> None:
    app = AmqTask("shop", broker=broker_url, backend="rpc://", **PATIENT, set_as_current=False)

    async def serve() -> str:
        async with connected(app):
            assert app.backend is not None
            replies = app.backend.reply_to()
            assert rabbit.exists(replies)
        return replies

    assert not rabbit.exists(asyncio.run(serve()))
    eventually(lambda: not [one for one in threading.enumerate() if one.name.startswith("amqtask")])


# -- examples/fastapi_progress


def events(text: str) -> list[tuple[str, Any]]:
    """Server-sent events."""
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        found.append((fields["event"], json.loads(fields["data"])))
    return found


@pytest.mark.parametrize("store", ["rpc", "redis"])
def test_progress_is_seen_in_a_browser(
    start: Start, environment: dict[str, str], rabbit: Broker, redis_url: str, store: str
) -> None:
    if store == "redis":
        environment["CELERY_RESULT_BACKEND"] = redis_url
    try:
        worker = WorkerProcess("examples.fastapi_progress.tasks", "-P", "threads", "-c", "2", environment=environment)
        url = start("uvicorn examples.fastapi_progress.service:service --port {port}")
        try:
            seen, failed, whole = asyncio.run(_watch(url, worker))
        finally:
            worker.kill()
    finally:
        for queue in ("fastapi-progress-example", "fastapi-progress-example.dead"):
            rabbit.channel().queue_delete(queue)

    progress = [data["page"] for event, data in seen if event == "PROGRESS"]
    assert progress
    assert progress == sorted(set(progress))
    assert seen[-1] == ("SUCCESS", "10 pages")
    assert failed[-1] == ("FAILURE", "a report has pages")
    assert whole == "10 pages"


async def _watch(url: str, worker: WorkerProcess) -> tuple[list[Any], list[Any], str]:
    async with client() as session:
        assert "EventSource" in (await session.get(url)).text
        good = (await session.post(f"{url}/reports?pages=10&seconds=0.3")).json()["id"]
        bad = (await session.post(f"{url}/reports?pages=0")).json()["id"]
        async with session.stream("GET", f"{url}/reports/{good}/events") as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            lines = stream.aiter_lines()
            seen = [await anext(lines)]  # somebody watches before the report is begun
            await asyncio.to_thread(worker.start)
            seen += [line async for line in lines]
        failed = (await session.get(f"{url}/reports/{bad}/events")).text
        whole = (await session.get(f"{url}/reports/{good}")).json()
    return events("\n".join(seen)), events(failed), whole

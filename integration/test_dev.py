"""`amqtask dev`: the broker that it serves keeps the transport's contract over sockets; and a project that needs nothing else."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aio_pika
import pika
import pytest

from amqtask.testing.suites.transport import TransportSuite
from amqtask.transport.connection import LoopConnection
from amqtask.transport.consumer import PikaConsumer
from amqtask.transport.contract import Consumer, ConsumerListener, LoopPublisher, Publisher
from amqtask.transport.loop import PikaLoop
from amqtask.transport.loop_publisher import PikaLoopPublisher
from amqtask.transport.memory.server import MemoryServer
from amqtask.transport.publisher import PikaPublisher
from amqtask.transport.url import parse_broker_urls
from integration.machine import free_port, is_running
from integration.waiting import LONG, eventually
from integration.workers import ROOT, LoggedProcess


@pytest.fixture
def server() -> Iterator[MemoryServer]:
    server = MemoryServer().start()
    yield server
    server.stop()


class TestServedMemory(TransportSuite):
    @pytest.fixture(autouse=True)
    def parts(self, server: MemoryServer) -> Iterator[None]:
        self.server = server
        self.addresses = parse_broker_urls(server.url)
        yield from self.with_parts()

    def make_publisher(self, on_warning: Callable[[str], None]) -> Publisher:
        return PikaPublisher(self.addresses, timeout=2.0, on_warning=on_warning)

    def make_loop(self) -> PikaLoop:
        return PikaLoop()

    def make_consumer(self, loop: Any, listener: ConsumerListener) -> Consumer:
        return PikaConsumer(LoopConnection(self.addresses, loop), listener)

    def make_loop_publisher(self, loop: Any, on_warning: Callable[[str], None]) -> LoopPublisher:
        return PikaLoopPublisher(LoopConnection(self.addresses, loop), on_warning=on_warning, nack_patience=0.5)

    def cut(self) -> None:
        self.server.broker.cut()

    def delete_queue(self, name: str) -> None:
        self.server.broker.delete_queue(name)

    def delete_exchange(self, name: str) -> None:
        self.server.broker.delete_exchange(name)


def test_pika_itself_speaks_to_it(server: MemoryServer) -> None:
    with pika.BlockingConnection(pika.URLParameters(f"{server.url}?heartbeat=1")) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        channel.queue_declare("plain")
        body = os.urandom(1_000_000)
        channel.basic_publish("", "plain", body, mandatory=True)
        # Two heartbeats long nothing comes but what the broker answers to them.
        connection.process_data_events(time_limit=2.5)
        method, _, got = channel.basic_get("plain", auto_ack=True)
        assert method is not None
        assert got == body


def test_aio_pika_itself_speaks_to_it(server: MemoryServer) -> None:
    async def speak() -> bytes:
        async with await aio_pika.connect(server.url) as connection:
            channel = await connection.channel()
            queue = await channel.declare_queue("plain")
            await channel.default_exchange.publish(aio_pika.Message(b"body"), routing_key=queue.name)
            message = await queue.get()
            await message.ack()
            return bytes(message.body)

    assert asyncio.run(speak()) == b"body"


def test_what_is_not_amqp_is_told_the_protocol(server: MemoryServer) -> None:
    with socket.create_connection((server.host, server.port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert connection.recv(100) == b"AMQP\x00\x00\x09\x01"


PROJECT = """
from amqtask import AmqTask

app = AmqTask("tasks", broker="redis://localhost:1/0", backend="redis://localhost:1/1")
app.conf.beat_schedule = {{"each second": {{"task": "tick", "schedule": 1.0}}}}


@app.task(name="answer")
def answer():
    return {answer!r}


@app.task(name="tick")
def tick():
    print("the clock ticks", flush=True)
"""
CALLS = """
import asyncio
from tasks import answer


async def main():
    return await (await answer.adelay()).aget(timeout=60)


print([answer.delay().get(timeout=60), asyncio.run(main()), answer.apply_async(countdown=0.5).get(timeout=60)])
"""


class Developed:
    """A project, and the programs that its developer runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.scratch = folder / "project", folder / "scratch"
        self.folder.mkdir()
        self.scratch.mkdir()
        self.port, self.console_port = free_port(), free_port()

    def write(self, answer: str) -> None:
        """The code whose answer this is."""
        (self.folder / "tasks.py").write_text(PROJECT.format(answer=answer))

    def dev(self, *options: str) -> LoggedProcess:
        """`amqtask dev`."""
        ports = ["--port", str(self.port), "--console-port", str(self.console_port)]
        line = ["--workdir", str(self.folder), "-A", "tasks", "dev", *ports, *options]
        return LoggedProcess([sys.executable, "-m", "amqtask", *line], environment={"TMPDIR": str(self.scratch)})

    def run(self, program: str) -> str:
        """What a program of the project prints."""
        environment = {**os.environ, "CELERY_BROKER_URL": f"dev://:{self.port}", "PYTHONPATH": str(self.folder)}
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LONG,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def console(self) -> Any:
        """The tasks that the console knows, by name."""
        return {(task["name"], task["state"]) for task in self._asked("tasks")["tasks"]}

    def schedule(self) -> Any:
        """The entries that the console shows; nothing while it is away."""
        try:
            return {entry["name"] for entry in self._asked("schedules")["entries"]}
        except OSError:
            return None

    def _asked(self, page: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.console_port}/api/{page}", timeout=LONG) as answer:
            return json.load(answer)


@pytest.mark.parametrize("pool", ["prefork", "gevent"])
def test_a_project_is_developed_with_nothing_installed(pool: str, tmp_path: Path) -> None:
    project = Developed(tmp_path)
    project.write("first")
    with project.dev("-P", pool, "-c", "1") as dev:
        assert f"CELERY_BROKER_URL=dev://:{project.port}" in dev.log
        assert project.run(CALLS) == "['first', 'first', 'first']"
        dev.await_log("the clock ticks")

        (project.folder / "tasks.py").write_text("def broken(:\n")
        dev.await_log("SyntaxError")
        project.write("secnd")
        eventually(lambda: dev.log.count(" ready.") == 2)
        assert project.run(CALLS) == "['secnd', 'secnd', 'secnd']"

        dev.await_log("The console is on")
        eventually(lambda: {("answer", "SUCCESS"), ("tick", "SUCCESS")} <= project.console())
        dev.signal(signal.SIGINT)
        assert dev.wait() == 0
    left = {path.name for path in (*project.folder.iterdir(), *project.scratch.iterdir())}
    assert left - {"__pycache__"} == {"tasks.py"}


def test_messages_survive_a_worker_that_cannot_be_started(tmp_path: Path) -> None:
    project = Developed(tmp_path)
    project.write("first")
    with project.dev("--no-console", "--no-beat", "-P", "solo") as dev:
        # The one that works, not the one that stands by.
        (worker,) = (
            child for child in dev.children if "RELOAD" in (about := _environment(child)) and "REPEATED" not in about
        )
        os.kill(worker, signal.SIGKILL)
        dev.await_log("nothing runs until the next change")
        project.run("from tasks import answer; answer.delay()")
        project.write("secnd")
        dev.await_log("succeeded")
        assert "'secnd'" in dev.log

        # Nor does a worker survive a command that is killed.
        workers = dev.children
        dev.signal(signal.SIGKILL)
        eventually(lambda: not any(map(is_running, workers)))


def test_the_console_is_there_whatever_ends_it_and_shows_the_schedule_of_the_new_code(tmp_path: Path) -> None:
    project = Developed(tmp_path)
    project.write("first")
    with project.dev("-P", "solo") as dev:
        dev.await_log("The console is on")
        eventually(lambda: project.schedule() == {"each second"})
        path = project.folder / "tasks.py"
        path.write_text(path.read_text().replace("each second", "always"))
        eventually(lambda: project.schedule() == {"always"})

        ticks = dev.log.count("the clock ticks")
        eventually(lambda: dev.log.count("the clock ticks") > ticks + 4)  # one that ends at once is not started again
        (console,) = (child for child in dev.children if "_AMQTASK_DEV_PART=console" in _environment(child))
        os.kill(console, signal.SIGKILL)
        dev.await_log("the console has ended with exit code -9, and is started again")
        eventually(lambda: project.schedule() == {"always"})
        assert dev.log.count("The console is on") == 1
        dev.signal(signal.SIGINT)
        assert dev.wait() == 0


def _environment(pid: int) -> str:
    return Path(f"/proc/{pid}/environ").read_text().replace("\0", "\n")

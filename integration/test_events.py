"""Events over a real broker: our workers and Celery's tell, our receivers and Celery's listen."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.events import EventReceiver
from amqtask.result import AsyncResult
from integration import celery_peer
from integration.celery_peer import CeleryWorker
from integration.conftest import Broker
from integration.faults import Forwarder
from integration.nodes import RabbitNode
from integration.waiting import PATIENT
from integration.workers import ROOT, WorkerProcess, eventually, run_cli

APP = "integration.apps.sample"


class Listening:
    """A receiver in a thread; what it has heard."""

    def __init__(self, app: AmqTask, *, wakeup: bool = False, routing_key: str = "#") -> None:
        self.events: list[dict[str, Any]] = []
        self.error: BaseException | None = None
        self.state = app.events.State()
        with app.connection() as connection:
            self.receiver: EventReceiver = app.events.Receiver(
                connection, handlers={"*": self._take}, routing_key=routing_key
            )
        self._wakeup = wakeup
        self._app = app
        self._thread = threading.Thread(target=self._run)

    def _take(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        self.state.event(event)

    def _run(self) -> None:
        try:
            self.receiver.capture(limit=None, timeout=None, wakeup=self._wakeup)
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Listening:
        self._thread.start()
        self.say_until_heard()
        return self

    def say_until_heard(self) -> None:
        """Until an event of our own comes, which means that it is consuming."""
        word = f"test-{uuid.uuid4().hex}"
        dispatcher = self._app.events.Dispatcher()

        def is_heard() -> bool:
            dispatcher.send(word)
            return any(event["type"] == word for event in self.events)

        eventually(is_heard, every=0.05, what="the receiver hears nothing")

    def __exit__(self, *_: object) -> None:
        self.receiver.should_stop = True
        self._thread.join(90)
        assert not self._thread.is_alive()

    def of_task(self, task_id: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event.get("uuid") == task_id]

    def types(self, task_id: str) -> list[str]:
        return [event["type"] for event in self.of_task(task_id)]

    def await_type(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The first event of a type with these fields, once it has come."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found[:] = [
                event
                for event in list(self.events)
                if event["type"] == kind and all(event.get(key) == value for key, value in fields.items())
            ]
            return bool(found)

        eventually(
            look, what=lambda: f"no {kind} with {fields}; heard: {sorted({event['type'] for event in self.events})}"
        )
        return found[0]


@pytest.fixture
def queue(rabbit: Broker) -> str:
    return rabbit.queue("events")


@pytest.fixture
def app(rabbit: Broker, queue: str) -> Iterator[AmqTask]:
    made = AmqTask(
        "producer", broker=rabbit.url, backend="rpc://", **PATIENT, task_default_queue=queue, set_as_current=False
    )
    yield made
    made.close()


def node() -> str:
    """A node name that no other test's worker has."""
    return f"w{uuid.uuid4().hex[:8]}@test"


def our_worker(queue: str, name: str, *options: str) -> WorkerProcess:
    return WorkerProcess(APP, "-Q", queue, "-c", "2", "-n", name, *options, loglevel="WARNING")


def declare_as_celery_does(rabbit: Broker, queue: str) -> None:
    channel = rabbit.channel()
    channel.queue_declare(queue, durable=True)
    channel.close()


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_what_happens_to_tasks_is_told(app: AmqTask, queue: str, pool: str, tmp_path: Path) -> None:
    name = node()
    with Listening(app) as heard:
        with our_worker(queue, name, "-E", "-P", pool) as worker:
            good = app.send_task("sample.add", (2, 3))
            bad = app.send_task("sample.fail", ("as told",))
            again = app.send_task("sample.retry", (str(tmp_path / "runs"), 1))
            app.control.revoke("unwanted", destination=[name], reply=True, timeout=90)
            app.send_task("sample.add", (0, 0), task_id="unwanted")
            assert again.get(timeout=90) == 1
            heard.await_type("task-succeeded", uuid=again.id)
            heard.await_type("task-failed", uuid=bad.id)
            assert worker.stop() == 0
        heard.await_type("worker-offline", hostname=name)

        assert heard.types(good.id) == ["task-received", "task-started", "task-succeeded"]
        received, _, succeeded = heard.of_task(good.id)
        assert (received["name"], received["args"], received["hostname"]) == ("sample.add", "(2, 3)", name)
        assert (succeeded["result"], succeeded["runtime"] > 0) == ("5", True)
        failed = heard.of_task(bad.id)[-1]
        assert failed["exception"] == "ValueError('as told')"
        assert "Traceback" in failed["traceback"]
        assert heard.types(again.id) == [
            "task-received", "task-started", "task-retried", "task-received", "task-started", "task-succeeded",
        ]  # fmt: skip
        retried = heard.await_type("task-retried", uuid=again.id)
        assert "not yet" in retried["exception"]
        assert "RuntimeError" in retried["traceback"]
        revoked = heard.await_type("task-revoked", uuid="unwanted")
        assert (revoked["expired"], revoked["terminated"]) == (False, False)
        clocks = [event["clock"] for event in heard.events if event["hostname"] == name]
        assert clocks == sorted(set(clocks))
        assert heard.state.tasks[good.id].state == "SUCCESS"
        assert name not in heard.state.workers  # it said goodbye


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_cold_shutdown_tells_of_what_it_ends(app: AmqTask, queue: str, pool: str, tmp_path: Path) -> None:
    name, started = node(), tmp_path / "started"
    with Listening(app) as heard, our_worker(queue, name, "-E", "-P", pool) as worker:
        running = app.send_task("sample.wait_for", (str(started), str(tmp_path / "never")))
        eventually(started.exists)
        worker.signal(signal.SIGQUIT)
        worker.wait()
        heard.await_type("worker-offline", hostname=name)

        assert heard.types(running.id) == ["task-received", "task-started", "task-cancelled"]


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_worker_without_E_tells_only_that_it_lives_until_somebody_wants_more(
    app: AmqTask, queue: str, pool: str
) -> None:
    name = node()
    with Listening(app) as heard, our_worker(queue, name, "-P", pool):
        heard.await_type("worker-online", hostname=name)
        quiet = app.send_task("sample.add", (2, 3))
        quiet.get(timeout=90)
        beat = heard.await_type("worker-heartbeat", hostname=name, processed=1)
        assert (beat["freq"], beat["sw_ident"]) == (2.0, "py-amqtask")

        assert app.control.enable_events(destination=[name], reply=True, timeout=90) == [
            {name: {"ok": "task events enabled"}}
        ]
        loud = app.send_task("sample.add", (2, 3))
        assert heard.await_type("task-succeeded", uuid=loud.id)["result"] == "5"
        assert app.control.disable_events(destination=[name], reply=True, timeout=90) == [
            {name: {"ok": "task events disabled"}}
        ]
        last = app.send_task("sample.add", (2, 3))
        last.get(timeout=90)
        app.control.heartbeat(destination=[name])
        heard.await_type("worker-heartbeat", hostname=name, freq=5)

        assert heard.types(quiet.id) == heard.types(last.id) == []


def test_celerys_receiver_and_state_understand_our_worker(rabbit: Broker, queue: str) -> None:
    declare_as_celery_does(rabbit, queue)
    environment = celery_peer.environment(rabbit.url, "rpc://", queue)
    name = node()
    code = f"""
import json
state, sent, alive = app.events.State(), [], []
def on_event(event):
    state.event(event)
    alive.extend(worker.alive for worker in state.workers.values() if worker.hostname == {name!r})
    if event["hostname"] == {name!r} and not sent:
        sent.append(add.delay(2, 3))  # our worker answered the receiver's call for heartbeats
    if event["type"] == "task-succeeded" and event["uuid"] == sent[0].id:
        receiver.should_stop = True
with app.connection() as connection:
    receiver = app.events.Receiver(connection, handlers={{"*": on_event}})
    receiver.capture(limit=None, timeout=60, wakeup=True)
task, worker = state.tasks[sent[0].id], state.workers[{name!r}]
print(json.dumps([task.state, task.name, task.args, task.result, task.worker.hostname, any(alive), worker.sw_ident]))
"""
    with our_worker(queue, name, "-E") as worker:
        told = celery_peer.call(code, environment)
        worker.stop()

    assert json.loads(told) == ["SUCCESS", "sample.add", "(2, 3)", "5", name, True, "py-amqtask"]


def test_our_receiver_understands_celerys_worker(rabbit: Broker, app: AmqTask, queue: str) -> None:
    declare_as_celery_does(rabbit, queue)
    environment = celery_peer.environment(rabbit.url, "rpc://", queue)
    with CeleryWorker(environment, queue), Listening(app, wakeup=True) as heard:
        found = heard.await_type("worker-heartbeat", sw_ident="py-celery")
        app.control.enable_events(destination=[found["hostname"]], reply=True, timeout=90)
        result = app.send_task("sample.add", (2, 3))
        heard.await_type("task-succeeded", uuid=result.id)

        task = heard.state.tasks[result.id]
        assert heard.types(result.id) == ["task-received", "task-started", "task-succeeded"]
        assert (task.state, task.name, task.result) == ("SUCCESS", "sample.add", "5")
        eventually(lambda: heard.state.workers[found["hostname"]].alive, what="its heartbeats are not heard")


def test_a_workers_events_go_on_when_its_connections_were_lost(rabbit: Broker, app: AmqTask, queue: str) -> None:
    name = node()
    with Forwarder(rabbit.url) as forwarder, Listening(app) as heard:
        options = ("-Q", queue, "-P", "threads", "-n", name, "-E")
        with WorkerProcess(APP, *options, environment={"AMQTASK_BROKER_URL": forwarder.url}) as worker:
            heard.await_type("worker-online", hostname=name)
            before = app.send_task("sample.add", (1, 1))
            heard.await_type("task-succeeded", uuid=before.id)
            forwarder.cut()
            after = app.send_task("sample.add", (20, 22))
            assert heard.await_type("task-succeeded", uuid=after.id)["result"] == "42"
            assert worker.stop() == 0
        heard.await_type("worker-offline", hostname=name)


def test_a_receiver_goes_on_when_the_connection_was_lost(rabbit: Broker) -> None:
    with Forwarder(rabbit.url) as forwarder:
        app = AmqTask("far", broker=forwarder.url, set_as_current=False)
        try:
            with Listening(app) as heard:
                forwarder.cut()
                heard.say_until_heard()
                assert heard.error is None
        finally:
            app.close()


async def call_and_close(app: AmqTask) -> AsyncResult[Any]:
    result = await app.asend_task("sample.add", (3, 4))
    await app.async_publisher.close()
    return result


def test_producers_tell_of_their_calls(rabbit: Broker, queue: str) -> None:
    app = AmqTask(
        "telling", broker=rabbit.url, task_default_queue=queue, task_send_sent_event=True, set_as_current=False
    )
    try:
        with Listening(app) as heard:
            one = app.send_task("sample.add", (1, 2))
            with app.pipeline():
                several = [app.send_task("sample.add", (number, 0)) for number in range(150)]
            awaited = asyncio.run(call_and_close(app))
            for result in (one, several[0], several[-1], awaited):
                event = heard.await_type("task-sent", uuid=result.id)
                assert (event["name"], event["queue"]) == ("sample.add", queue)
            assert heard.state.tasks[one.id].state == "PENDING"
            assert str(heard.state.tasks[one.id].client).startswith("gen")
    finally:
        app.close()


def test_calls_do_not_mind_what_becomes_of_their_events(
    rabbit: Broker, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody may publish to the exchange of events, and their connection is cut, then hangs; each call is stored."""
    with Forwarder(rabbit.url) as forwarder:
        app = AmqTask("telling", broker=rabbit.url, **PATIENT, task_default_queue=queue, set_as_current=False)
        app.conf.update(task_send_sent_event=True, event_exchange="amq.rabbitmq.trace")  # an internal one
        far = AmqTask("far", broker=forwarder.url, set_as_current=False)
        app.__dict__["event_publisher"] = far.event_publisher
        try:
            for number in range(3):
                app.send_task("sample.add", (number, 0))
                forwarder.cut()
            forwarder.stall(new_ones=True)
            for number in range(3):
                app.send_task("sample.add", (number, 0))
        finally:
            forwarder.heal()
            app.close()
            far.close()
    eventually(lambda: rabbit.count(queue) == 6)


def test_tasks_run_on_while_the_broker_takes_no_events(hurt_node: RabbitNode) -> None:
    """An alarm blocks who publishes, and lets who consumes go on."""
    app = AmqTask("blocked", broker=hurt_node.url, **PATIENT, task_default_queue="blocked", set_as_current=False)
    for number in range(300):
        app.send_task("sample.add", (number, 0), ignore_result=True)
    app.close()
    environment = {"AMQTASK_BROKER_URL": hurt_node.url}
    rabbit = Broker(hurt_node.url)
    hurt_node.ctl("set_vm_memory_high_watermark", "0.00001")
    try:
        options = ("-Q", "blocked", "-P", "threads", "-n", "blocked@test", "-E")
        with WorkerProcess(APP, *options, environment=environment) as worker:
            eventually(lambda: worker.log.count(" succeeded in ") == 300)
            assert rabbit.count("blocked") == 0
            hurt_node.ctl("set_vm_memory_high_watermark", "0.6")
            with Listening(app) as heard:
                heard.await_type("worker-heartbeat", hostname="blocked@test")
            assert worker.stop() == 0
    finally:
        hurt_node.ctl("set_vm_memory_high_watermark", "0.6")
        rabbit.close()
        app.close()


class Cli:
    """`amqtask events …` on a terminal of its own."""

    def __init__(self, broker: str, *options: str) -> None:
        self.shown = ""
        ours, self._fd = os.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "amqtask", "-A", APP, "-b", broker, "events", *options],
            cwd=ROOT, env={**os.environ, "COLUMNS": "160", "LINES": "40"}, stdin=ours, stdout=ours, stderr=ours,
            start_new_session=True,
        )  # fmt: skip
        os.close(ours)
        os.set_blocking(self._fd, False)

    def await_text(self, *texts: str) -> None:
        """Until all of these have been shown."""

        def look() -> bool:
            self._read()
            assert self._process.poll() is None, self.shown
            return all(text in self.shown for text in texts)

        eventually(look, every=0.05, what=lambda: f"{texts} not in:\n{self.shown[-3000:]}")

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # nothing there; or nobody is at the other end any more
            self.shown += os.read(self._fd, 1 << 20).decode(errors="replace")

    def interrupt(self) -> int:
        """Its exit code. It writes on until it has ended, and waits for who reads that."""
        self._process.send_signal(signal.SIGINT)

        def has_ended() -> bool:
            self._read()
            return self._process.poll() is not None

        eventually(has_ended, what=lambda: f"it did not end:\n{self.shown[-3000:]}")
        return self._process.returncode

    def __enter__(self) -> Cli:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._fd)


def test_the_terminal_view_updates(rabbit: Broker, app: AmqTask, queue: str) -> None:
    name = node()
    with our_worker(queue, name, "-E", "-P", "threads"), Cli(rabbit.url, "--frequency", "0.1") as cli:
        cli.await_text(name, "ONLINE")
        first = app.send_task("sample.add", (20, 22))
        cli.await_text(first.id, "sample.add")
        second = app.send_task("sample.fail", ("seen in the view",))
        cli.await_text(second.id, "seen in the view", "FAILURE 1")
        assert cli.interrupt() == 0


@pytest.mark.parametrize("option", ["--dump", "--json"])
def test_events_are_printed_on_lines(rabbit: Broker, app: AmqTask, queue: str, option: str) -> None:
    name = node()
    with our_worker(queue, name, "-E", "-P", "threads"), Cli(rabbit.url, option) as cli:
        cli.await_text("worker-heartbeat", name)
        result = app.send_task("sample.add", (20, 22))
        cli.await_text("task-received", "task-succeeded", result.id, "42")
        assert cli.interrupt() == 0


def test_a_camera_takes_snapshots(rabbit: Broker, queue: str, tmp_path: Path) -> None:
    name = node()
    with our_worker(queue, name, "-P", "threads"), Cli(
        rabbit.url, "--camera", "integration.apps.camera:Camera", "--frequency", "0.1"
    ) as cli:  # fmt: skip
        cli.await_text(f"alive: {name}")
        assert cli.interrupt() == 0


def test_a_camera_runs_in_the_background_until_term(rabbit: Broker, queue: str, tmp_path: Path) -> None:
    name = node()
    pictures, pidfile = tmp_path / "pictures", tmp_path / "camera.pid"
    with our_worker(queue, name, "-P", "threads"):
        code, text = run_cli(
            "-A", APP, "-b", rabbit.url, "events", "-D", "--camera", "integration.apps.camera:Album", "-F", "0.1",
            "--pidfile", str(pidfile), environment={"ALBUM": str(pictures)},
        )  # fmt: skip
        assert (code, text) == (0, "")
        eventually(lambda: pictures.exists() and f"alive: {name}" in pictures.read_text())
        os.kill(int(pidfile.read_text()), signal.SIGTERM)
        eventually(lambda: not pidfile.exists(), what="the camera goes on")

    assert pictures.read_text().endswith("the last one\n")

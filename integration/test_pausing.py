"""Queues that are paused stay so, whatever restarts, until somebody resumes them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.exceptions import OperationalError
from amqtask.remote.kept import NOTE, Pauses
from integration.conftest import Broker
from integration.faults import Forwarder
from integration.nodes import RabbitNode
from integration.waiting import LONG, PATIENT
from integration.workers import WorkerProcess, eventually, run_cli

SAMPLE = "integration.apps.sample"


class Paused:
    """A queue of a test's own, commands and workers for it."""

    def __init__(self, broker: str) -> None:
        self.queue = f"paused-{uuid.uuid4().hex[:12]}"
        self.app = AmqTask("client", broker=broker, **PATIENT, set_as_current=False)
        self.app.conf.task_default_queue = self.queue
        self.environment = {"AMQTASK_BROKER_URL": broker, "SAMPLE_QUEUE": self.queue, "SAMPLE_BACKEND": broker}
        if broker.startswith("amqp"):
            del self.environment["SAMPLE_BACKEND"]

    def worker(self, *options: str) -> WorkerProcess:
        return WorkerProcess(
            SAMPLE, "-Q", self.queue, "-c", "2", "-n", f"{uuid.uuid4().hex[:8]}@test", *options,
            environment=self.environment,
        )  # fmt: skip

    def json(self, *words: str) -> Any:
        code, printed = run_cli("-A", SAMPLE, *words, "--json", environment=self.environment)
        assert code == 0, printed
        return json.loads(printed)

    def send(self, number: int) -> None:
        for _ in range(number):
            self.app.send_task("sample.add", (1, 1))

    @property
    def ready(self) -> int:
        with self.app.broker.admin() as admin:
            return admin.count(self.queue)

    def close(self) -> None:
        self.app.control.pauses.resume(self.queue)
        with self.app.broker.admin() as admin:
            admin.delete(self.queue)
            admin.delete(f"{self.queue}.dead")
        self.app.close()


@pytest.fixture(params=["rabbitmq", "redis"])
def paused(request: pytest.FixtureRequest) -> Iterator[Paused]:
    url = request.getfixturevalue("broker_url" if request.param == "rabbitmq" else "redis_url")
    made = Paused(url)
    yield made
    made.close()


def test_no_worker_consumes_a_paused_queue_until_it_is_resumed(paused: Paused) -> None:
    with paused.worker("-P", "threads") as old:
        paused.send(1)
        eventually(lambda: paused.ready == 0)
        told = paused.json("queues", "pause", paused.queue)
        assert ([pause["queue"] for pause in told["paused"]], len(told["answers"][paused.queue])) == ([paused.queue], 1)
        paused.send(5)
        with paused.worker() as new:
            assert paused.ready == 5
            workers = {row["worker"]: (row["queues"], row["paused"]) for row in paused.json("workers")}
            assert set(map(str, workers.values())) == {str(([], [paused.queue]))}
            (row,) = [row for row in paused.json("queues") if row["queue"] == paused.queue]
            assert (row["ready"], row["paused_by"] is not None) == (5, True)

            assert paused.json("queues", "resume", paused.queue)["paused"] == []
            eventually(lambda: paused.ready == 0)
            assert (new.stop(), old.stop()) == (0, 0)


def test_what_a_worker_only_holds_goes_back_when_its_queue_is_paused(paused: Paused, tmp_path: Any) -> None:
    started, release = tmp_path / "started", tmp_path / "release"
    with paused.worker("-c", "1", "-P", "threads") as worker:
        paused.app.send_task("sample.wait_for", (str(started), str(release)))
        eventually(started.exists)
        paused.send(3)
        paused.json("queues", "pause", paused.queue)
        eventually(lambda: paused.ready == 3)
        release.touch()
        assert worker.stop() == 0
    assert paused.ready == 3


def test_two_who_pause_at_once_have_paused_both(paused: Paused) -> None:
    class Crossed:
        """A note that somebody else writes to, right after us, once."""

        def __init__(self) -> None:
            self.note = paused.app.broker.note("amqtask.config")
            self.crossing: str | None = None

        def read(self) -> str | None:
            return self.note.read()

        def write(self, text: str) -> None:
            self.note.write(text)
            crossing, self.crossing = self.crossing, None
            if crossing is not None:
                self.note.write(crossing)

    note = Crossed()
    note.crossing = json.dumps({"paused": {"theirs": {"queue": "theirs", "since": 1.0, "by": "them"}}})
    pauses = Pauses(note)
    pauses.pause(paused.queue, "us")

    assert {paused.queue, "theirs"} <= pauses.read().keys()
    assert (pauses.resume("theirs"), pauses.resume("theirs")) == (True, False)


def first_told(app: AmqTask) -> set[str]:
    """The paused queues, in the first words of a broker that starts."""
    told: list[set[str]] = []

    def is_told() -> bool:
        try:
            told.append(set(app.control.pauses.read()))
        except OperationalError:
            return False
        return True

    eventually(is_told, 2 * LONG)
    return told[0]


def test_a_pause_holds_over_a_restart_of_the_broker_and_of_workers(hurt_node: RabbitNode) -> None:
    paused = Paused(hurt_node.url)
    with paused.worker("-P", "threads") as going:
        paused.json("queues", "pause", paused.queue)
        paused.send(4)
        hurt_node.stop()
        with paused.worker("-P", "threads").start(wait=False) as early:
            early.await_log("which queues are paused")
            hurt_node.launch()
            # For a moment RabbitMQ says that a stream's node is down, with the code for a queue that is not there.
            assert paused.queue in first_told(paused.app)
            early.await_log(" ready.")
            eventually(lambda: len(paused.json("workers")) == 2)
            # A quorum queue that has just come back counts its messages a moment later.
            eventually(lambda: paused.ready == 4)
            assert {str(row["queues"]) for row in paused.json("workers")} == {"[]"}
            paused.json("queues", "resume", paused.queue)
            eventually(lambda: paused.ready == 0)
            assert (going.stop(), early.stop()) == (0, 0)
    paused.close()


def test_pauses_that_the_broker_is_slow_to_tell_are_not_taken_for_none(
    broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused = Paused(broker_url)
    pauses = paused.app.control.pauses
    pauses.pause(paused.queue)
    with paused.app.broker.admin() as admin:
        # A broker counts the messages of a stream every five seconds.
        eventually(lambda: admin.count(NOTE))

    monkeypatch.setattr("amqtask.transport.admin.NOTE_SECONDS", 2.0)
    with Forwarder(broker_url) as way, AmqTask("reader", broker=way.url, set_as_current=False) as reader:
        way.keep_deliveries()
        with pytest.raises(OperationalError, match="did not deliver it"):
            reader.control.pauses.read()
        way.heal()
        assert paused.queue in reader.control.pauses.read()
    paused.close()


def test_delayed_tasks_are_shown_by_their_time(broker_url: str, own_delays: Any, rabbit: Broker) -> None:
    paused = Paused(broker_url)
    own_delays(paused.app)
    paused.environment["SAMPLE_DELAYS"] = paused.app.conf.task_delay_prefix
    later = paused.app.send_task("sample.add", (1, 1), countdown=7200)
    sooner = paused.app.send_task("sample.add", (1, 1), countdown=600)

    rows = paused.json("queues", "-Q", paused.queue, "--delayed")
    assert [(row["id"], row["task"], row["queue"]) for row in rows] == [
        (sooner.id, "sample.add", paused.queue), (later.id, "sample.add", paused.queue),
    ]  # fmt: skip
    code, shown = run_cli("-A", SAMPLE, "queues", "--delayed", environment=paused.environment)
    assert (code, "9 min" in shown, "1 h 59 min" in shown) == (0, True, True)
    paused.close()

"""Chains whose steps a worker runs one after the other without the broker: none is lost, and none runs twice that need not."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amqtask import AmqTask, chain
from amqtask.exceptions import TaskRevokedError
from amqtask.result import AsyncResult
from integration.chains import under_fire
from integration.conftest import Broker
from integration.faults import Forwarder
from integration.nodes import free_port
from integration.test_monitoring import Scraped
from integration.waiting import PATIENT
from integration.workers import WorkerProcess, eventually

STEPS = "integration.apps.steps"
POOLS = ["prefork", "threads", "solo", "eventlet", "gevent", "asyncio"]
NAMES = [f"s{number}" for number in range(8)]


class Scene:
    """A queue, a client and the folder in which steps leave their traces."""

    def __init__(self, rabbit: Broker, redis_url: str, folder: Path) -> None:
        self.rabbit, self.redis_url, self.folder = rabbit, redis_url, folder
        self.queue = rabbit.queue("steps")
        self.app = AmqTask("client", broker=rabbit.url, backend=redis_url, **PATIENT)

    def worker(self, pool: str, *options: str, seconds: float = 30.0, broker: str | None = None) -> WorkerProcess:
        """A worker with one slot that goes on with a chain for so long."""
        environment = {
            "STEPS_BACKEND": self.redis_url,
            "STEPS_QUEUE": self.queue,
            "STEPS_SECONDS": str(seconds),
            "AMQTASK_BROKER_URL": broker or self.rabbit.url,
        }
        return WorkerProcess(STEPS, "-Q", self.queue, "-P", pool, "-c", "1", *options, environment=environment)

    def call(self, names: list[str] = NAMES) -> AsyncResult[list[str]]:
        """Publish a chain of steps with these names."""
        steps = [
            self.app.signature("steps.note", ([], *where) if not number else where, queue=self.queue)
            for number, where in enumerate((str(self.folder), name) for name in names)
        ]
        found: AsyncResult[list[str]] = chain(*steps).apply_async()
        return found

    def order(self, what: str) -> Path:
        """Have the step do it, e.g. `hold-s3`."""
        path = self.folder / what
        path.touch()
        return path

    @property
    def runs(self) -> list[str]:
        """What ran, in order."""
        path = self.folder / "runs"
        return path.read_text().split() if path.exists() else []

    def await_run(self, name: str) -> None:
        eventually(lambda: name in self.runs, what=f"{name} runs")


def confirmed(port: int) -> float:
    """How many messages of the worker's the broker has confirmed."""
    return Scraped(port)("amqtask_publish_confirms_total", outcome="confirmed")


@pytest.fixture
def scene(rabbit: Broker, redis_url: str, tmp_path: Path) -> Iterator[Scene]:
    """See Scene."""
    made = Scene(rabbit, redis_url, tmp_path)
    yield made
    made.app.close()


@pytest.mark.parametrize("pool", POOLS)
def test_steps_need_no_broker_and_every_result_is_stored(scene: Scene, pool: str) -> None:
    port = free_port()
    with scene.worker(pool, "--without-mingle", "--metrics-port", str(port)) as worker:
        before = confirmed(port)
        last = scene.call()
        assert last.get(timeout=60) == NAMES
        results: list[Any] = [last]
        while (parent := results[-1].parent) is not None:
            results.append(parent)
        values = [each.get(timeout=60) for each in results]
        assert confirmed(port) == before
        assert worker.stop() == 0

    assert values == [NAMES[:end] for end in range(len(NAMES), 0, -1)]
    assert scene.runs == NAMES
    assert scene.rabbit.count(scene.queue) == 0


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_worker_that_is_told_so_sends_each_step_through_the_broker(scene: Scene, pool: str) -> None:
    port = free_port()
    with scene.worker(pool, "--without-mingle", "--metrics-port", str(port), seconds=0):
        before = confirmed(port)
        assert scene.call().get(timeout=60) == NAMES
        # A step may have run before its confirm has come.
        eventually(lambda: confirmed(port) == before + len(NAMES) - 1, what="each step but the first was published")


def test_a_process_that_dies_in_a_step_costs_that_step_only(scene: Scene) -> None:
    scene.order("kill-s3")
    with scene.worker("prefork"):
        assert scene.call().get(timeout=60) == NAMES

    assert scene.runs == ["s0", "s1", "s2", "s3", *NAMES[3:]]


@pytest.mark.parametrize("pool", POOLS)
def test_a_worker_that_dies_in_a_step_costs_that_step_only(scene: Scene, pool: str) -> None:
    hold = scene.order("hold-s3")
    with scene.worker(pool) as worker:
        result = scene.call()
        scene.await_run("s3")
        worker.kill()
    hold.unlink()
    with scene.worker(pool):
        assert result.get(timeout=60) == NAMES

    assert scene.runs == ["s0", "s1", "s2", "s3", *NAMES[3:]]


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_a_connection_that_is_cut_in_a_step_costs_nothing(scene: Scene, pool: str) -> None:
    hold = scene.order("hold-s3")
    with Forwarder(scene.rabbit.url) as forwarder, scene.worker(pool, broker=forwarder.url) as worker:
        result = scene.call()
        scene.await_run("s3")
        forwarder.cut()
        worker.await_log("Trying to re-establish the connection")
        hold.unlink()
        assert result.get(timeout=60) == NAMES
        # Behind the redelivery, which has been answered when this one ends.
        assert scene.call(["after"]).get(timeout=60) == ["after"]
        assert worker.stop() == 0

    assert scene.runs == [*NAMES, "after"]
    assert scene.rabbit.count(scene.queue) == 0


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_a_worker_that_stops_hands_the_chain_over(scene: Scene, pool: str) -> None:
    hold = scene.order("hold-s3")
    with scene.worker(pool) as worker:
        result = scene.call()
        scene.await_run("s3")
        worker.signal(signal.SIGTERM)
        worker.await_log("Warm shutdown")
        hold.unlink()
        assert worker.wait() == 0
    with scene.worker(pool):
        assert result.get(timeout=60) == NAMES

    assert scene.runs == NAMES


def test_a_step_that_was_revoked_ends_the_chain(scene: Scene) -> None:
    hold = scene.order("hold-s1")
    node = f"{scene.queue}@here"
    with scene.worker("prefork", "-n", node):
        last = scene.call(["s0", "s1", "s2", "s3"])
        scene.await_run("s1")
        step = last.parent
        assert step is not None
        scene.app.control.revoke(step.id, destination=[node], reply=True, timeout=90)
        hold.unlink()
        with pytest.raises(TaskRevokedError):
            last.get(timeout=60)

    assert scene.runs == ["s0", "s1"]


def test_a_step_that_runs_can_be_terminated(scene: Scene) -> None:
    scene.order("hold-s1")
    node = f"{scene.queue}@here"
    with scene.worker("prefork", "-n", node) as worker:
        last = scene.call(["s0", "s1", "s2"])
        scene.await_run("s1")
        step = last.parent
        assert step is not None
        scene.app.control.revoke(step.id, terminate=True, destination=[node], reply=True, timeout=90)
        with pytest.raises(TaskRevokedError):
            last.get(timeout=60)
        assert worker.stop() == 0

    assert scene.runs == ["s0", "s1"]
    assert scene.rabbit.count(scene.queue) == 0


def test_a_step_may_retry(scene: Scene) -> None:
    scene.order("retry-s3")
    with scene.worker("prefork"):
        assert scene.call().get(timeout=60) == NAMES

    assert scene.runs == ["s0", "s1", "s2", "s3", *NAMES[3:]]


def test_a_step_that_fails_ends_the_chain(scene: Scene) -> None:
    scene.order("fail-s3")
    with scene.worker("prefork"):
        with pytest.raises(ValueError, match="told to fail"):
            scene.call().get(timeout=60)
        assert scene.call(["again"]).get(timeout=60) == ["again"]

    assert scene.runs == ["s0", "s1", "s2", "s3", "again"]


def test_workers_that_are_killed_again_and_again_lose_nothing(scene: Scene) -> None:
    names = [[f"c{number}s{step}" for step in range(20)] for number in range(20)]
    results = []
    kills = 0
    worker = scene.worker("prefork")
    try:
        for number, each in enumerate(names):
            results.append(scene.call(each))
            if number % 4 == 0:
                hold = scene.order(f"hold-c{number}s7")
                if kills == 0:
                    worker.start()
                scene.await_run(f"c{number}s7")
                worker.kill()
                kills += 1
                hold.unlink()
                worker.start()
        assert [result.get(timeout=60) for result in results] == names
    finally:
        worker.kill()

    twice = [name for name, count in Counter(scene.runs).items() if count > 1]
    assert set(scene.runs) == {name for each in names for name in each}
    assert len(twice) <= kills


def test_chains_under_fire_come_to_their_end(rabbit: Broker, redis_url: str) -> None:
    outcome = under_fire(rabbit.url, redis_url, chains=40, size=40, pause=(1.0, 2.0), delivery_limit=1000)

    assert (outcome.ended, outcome.missing) == (40, 0)

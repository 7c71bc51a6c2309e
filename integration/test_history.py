"""History over real brokers: what our workers and Celery's tell is kept, whatever is killed, and found by API and commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.assembly import build_indexer
from integration import celery_peer
from integration.celery_peer import CeleryWorker
from integration.conftest import Broker
from integration.nodes import RabbitNode
from integration.waiting import PATIENT
from integration.workers import LoggedProcess, WorkerProcess, eventually, run_cli

SAMPLE = "integration.apps.sample"


class Kept:
    """An application of a test's own whose events are kept, in a queue and an index of its own."""

    def __init__(self, broker: str, queue: str, folder: Path, queue_type: str = "stream", **environment: str) -> None:
        self.queue = queue
        self.history_queue = f"{queue}.history"
        self.url = f"sqlite:///{folder}/history.sqlite3"
        self.broker = broker
        self.environment = {
            "AMQTASK_BROKER_URL": broker,
            "SAMPLE_QUEUE": queue,
            "SAMPLE_HISTORY": f"{self.history_queue}|{self.url}",
            "SAMPLE_HISTORY_TYPE": queue_type,
            **environment,
        }
        self.app = AmqTask("client", broker=broker, **PATIENT, set_as_current=False)
        self.app.conf.update(
            task_default_queue=queue,
            task_history=True,
            history_queue=self.history_queue,
            history_queue_type=queue_type,
            event_exchange=f"{self.history_queue}.events",
            history_url=self.url,
        )
        self.indexer = build_indexer(self.app)

    def worker(self, *options: str) -> WorkerProcess:
        """Ours, not started."""
        return WorkerProcess(SAMPLE, "-Q", self.queue, "-c", "2", *options, environment=self.environment)

    def index(self) -> LoggedProcess:
        """`amqtask history`, not started."""
        from sys import executable

        command = [executable, "-m", "amqtask", "-A", SAMPLE, "history"]
        return LoggedProcess(command, ready="history: reading", environment=self.environment)

    def read_until(self, condition: Callable[[], object], what: str | Callable[[], str] = "") -> None:
        """Index here until something is true."""

        def is_so() -> bool:
            self.indexer.read_once(0.1)
            return bool(condition())

        eventually(is_so, what=what)

    def states(self) -> dict[str, str]:
        """id → state of what is in the index."""
        return {task.id: task.state for task in self.app.history.find(limit=100_000)}

    def cli(self, *words: str) -> tuple[int, str]:
        """`amqtask …`."""
        return run_cli("-A", SAMPLE, *words, environment=self.environment)

    def json(self, *words: str) -> Any:
        """What a command prints as JSON."""
        code, printed = self.cli(*words, "--json")
        assert code == 0, printed
        return json.loads(printed)

    def close(self) -> None:
        self.indexer.close()
        self.app.close()


@pytest.fixture
def kept(rabbit: Broker, tmp_path: Path) -> Iterator[Kept]:
    made = Kept(rabbit.url, rabbit.queue("kept"), tmp_path)
    yield made
    made.close()
    channel = rabbit.channel()
    channel.queue_delete(made.history_queue)
    channel.exchange_delete(f"{made.history_queue}.events")


def test_what_happens_to_a_task_is_kept_and_found(kept: Kept, tmp_path: Path) -> None:
    with kept.worker("-n", "w1@kept") as worker:
        good = kept.app.send_task(
            "sample.add", (2, 3), headers={"stamped_headers": ["tenant"], "stamps": {"tenant": "7"}}
        )
        bad = kept.app.send_task("sample.fail", ("no such address",))
        again = kept.app.send_task("sample.retry", (str(tmp_path / "runs"), 1))
        kept.read_until(
            lambda: sorted(kept.states().values()) == ["FAILURE", "SUCCESS", "SUCCESS"],
            lambda: f"{kept.app.history.find()}\n{worker.log}",
        )
        assert worker.stop() == 0
    find = kept.app.history.find

    (added,) = find(task="sample.add")
    assert (added.args, added.result, added.queue, added.worker) == ("(2, 3)", "5", kept.queue, "w1@kept")
    assert [step.event for step in added.steps] == ["sent", "received", "started", "succeeded"]
    assert [task.id for task in find(text="address")] == [task.id for task in find(error="ValueError")] == [bad.id]
    assert [task.id for task in find(stamp=("tenant", "7"))] == [good.id]
    found = kept.app.history.get(again.id)
    assert found is not None
    assert found.task.retries == 1
    assert [step.event for step in found.task.steps].count("retried") == 1
    kept.read_until(lambda: [worker.is_online for worker in kept.app.history.workers()] == [False])

    assert [task["id"] for task in kept.json("tasks", "find", "-s", "failure", "--since", "1h")] == [bad.id]
    code, shown = kept.cli("tasks", "show", bad.id)
    assert (code, "ValueError('no such address')" in shown, "Traceback" in shown) == (0, True, True)
    assert kept.cli("tasks", "find", "nowhere")[0] == 0
    assert kept.cli("tasks", "show", "nobody")[0] == 1


def test_a_family_is_found(kept: Kept) -> None:
    steps = kept.app.signature("sample.add", (1, 1)) | kept.app.signature("sample.add", (10,))
    with kept.worker():
        result = steps.apply_async()
        kept.read_until(lambda: kept.states().get(result.id) == "SUCCESS")

    whole = kept.app.history.get(result.id)
    assert whole is not None
    (first,) = whole.parents
    assert (first.result, whole.task.result, whole.task.root_id) == ("2", "12", first.id)
    assert [task.id for task in kept.app.history.find(root_id=first.id)] == [result.id, first.id]


def test_celerys_workers_are_kept_too(kept: Kept, rabbit: Broker) -> None:
    channel = rabbit.channel()
    channel.queue_declare(kept.queue, durable=True)
    kept.indexer.read_once(0.0)  # the stream is there before Celery's worker tells anything
    environment = celery_peer.environment(rabbit.url, "rpc://", kept.queue) | {
        "PEER_EVENTS": f"{kept.history_queue}.events"
    }
    with CeleryWorker(environment, kept.queue, "-E", "-n", "celery@kept"):
        celery_peer.call("add.delay(20, 22)", environment)
        kept.read_until(lambda: "SUCCESS" in kept.states().values(), lambda: str(kept.states()))

    (task,) = kept.app.history.find()
    assert (task.name, task.args, task.result, task.worker) == ("sample.add", "(20, 22)", "42", "celery@kept")


@pytest.mark.parametrize("queue_type", ["stream", "quorum"])
def test_no_row_is_lost_or_doubled_while_indexers_are_killed(rabbit: Broker, tmp_path: Path, queue_type: str) -> None:
    kept = Kept(rabbit.url, rabbit.queue("kept"), tmp_path, queue_type)
    with kept.worker("-P", "threads"):
        sent: set[str] = set()
        for round_number in range(5):
            with kept.index() as process:
                sent |= {kept.app.send_task("sample.add", (round_number, n)).id for n in range(60)}
                eventually(lambda: len(kept.states()) >= len(sent) - 50)
                process.kill()
        kept.read_until(lambda: list(kept.states().values()).count("SUCCESS") == len(sent), lambda: str(kept.states()))

    tasks = kept.app.history.find(limit=1000)
    assert {task.id for task in tasks} == sent
    assert {tuple(step.event for step in task.steps) for task in tasks} == {
        ("sent", "received", "started", "succeeded")
    }
    assert sum(minute.succeeded for minute in kept.app.history.minutes(0)) == len(sent)
    channel = rabbit.channel()
    channel.queue_delete(kept.history_queue)
    channel.exchange_delete(f"{kept.history_queue}.events")
    kept.close()


def test_a_restart_of_everything_loses_no_row(hurt_node: RabbitNode, tmp_path: Path) -> None:
    kept = Kept(hurt_node.url, "kept-restart", tmp_path)
    sent: set[str] = set()
    for _ in range(2):
        with kept.worker() as worker, kept.index() as index:
            sent |= {kept.app.send_task("sample.add", (1, n)).id for n in range(50)}
            eventually(lambda: list(kept.states().values()).count("SUCCESS") > len(sent) - 40)
            hurt_node.stop()
            hurt_node.start()
            sent |= {kept.app.send_task("sample.add", (2, n)).id for n in range(50)}
            eventually(
                lambda: list(kept.states().values()).count("SUCCESS") == len(sent), what=lambda: str(kept.states())
            )
            worker.stop()
            index.stop()

    assert set(kept.states()) == sent
    kept.close()


def test_on_redis_history_is_kept_in_a_list_until_it_is_indexed(redis_url: str, tmp_path: Path) -> None:
    kept = Kept(redis_url, f"kept-{tmp_path.name}", tmp_path, SAMPLE_BACKEND=redis_url)
    with kept.worker("-P", "threads") as worker:
        sent = {kept.app.send_task("sample.add", (1, n)).id for n in range(50)}
        bad = kept.app.send_task("sample.fail", ("on redis",))
        with kept.app.broker.admin() as admin:
            eventually(lambda: not admin.count(kept.queue))
        assert worker.stop() == 0
    with kept.index():
        eventually(lambda: list(kept.states().values()).count("SUCCESS") == 50, what=lambda: str(kept.states()))
        eventually(lambda: [task.id for task in kept.app.history.find(text="redis")] == [bad.id])

    assert set(kept.states()) == sent | {bad.id}
    with kept.app.broker.admin() as admin:
        assert admin.count(kept.history_queue) == 0
    kept.close()

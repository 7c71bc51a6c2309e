"""History over real brokers: what our workers and Celery's tell is kept, whatever is killed, and found by API and commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from amqtask import AmqTask
from amqtask.assembly import build_indexer
from amqtask.console.notices import AlertLog, Problem
from amqtask.history.client import History
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
        command = [sys.executable, "-m", "amqtask", "-A", SAMPLE, "history"]
        return LoggedProcess(command, ready="history: reading", environment=self.environment)

    def read_until(self, condition: Callable[[], object], what: str | Callable[[], str] = "") -> None:
        """Index here until something is true."""

        def is_so() -> bool:
            self.indexer.read_once(0.1)
            return bool(condition())

        eventually(is_so, what=what)

    def succeeded(self, number: int) -> None:
        """Wait until so many have, by somebody else's indexing."""
        eventually(lambda: list(self.states().values()).count("SUCCESS") >= number, what=lambda: str(self.states()))

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


def test_a_failed_task_runs_again_as_it_was_or_with_other_arguments(kept: Kept, rabbit: Broker) -> None:
    kept.environment["SAMPLE_HISTORY_ARGUMENTS"] = "1"
    with kept.worker("-P", "threads"):
        bad = kept.app.send_task("sample.fail", ("wrong",))
        lost = kept.app.send_task("sample.add", ("1", 1), argsrepr="<hidden>", expires=3600)
        kept.read_until(lambda: sorted(kept.states().values()) == ["FAILURE", "FAILURE"], lambda: str(kept.states()))

        assert kept.json("tasks", "retry", bad.id)["run_again"] == [{"id": bad.id}]
        told = kept.json("tasks", "retry", lost.id, "--args", "[1, 1]")
        (new,) = told["run_again"]
        assert new["rerun_of"] == lost.id
        kept.read_until(lambda: kept.states().get(new["id"]) == "SUCCESS", lambda: str(kept.states()))

    edited = kept.app.history.get(new["id"])
    again = kept.app.history.get(bad.id)
    assert edited is not None
    assert again is not None
    assert (edited.task.result, edited.task.rerun_of, edited.task.queue) == ("2", lost.id, kept.queue)
    assert [step.event for step in again.task.steps].count("failed") == 2
    assert rabbit.count(kept.queue) == 0


def test_what_is_not_kept_is_asked_for_and_dead_letters_come_back_whole(kept: Kept, rabbit: Broker) -> None:
    with kept.worker("-P", "threads"):
        bad = kept.app.send_task("sample.fail", ("private",), argsrepr="<hidden>")
        buried = kept.app.send_task("sample.nobody_knows", (1,))
        kept.read_until(lambda: sorted(kept.states().values()) == ["FAILURE", "FAILURE"], lambda: str(kept.states()))
        eventually(lambda: rabbit.count(f"{kept.queue}.dead") == 1)

    code, printed = kept.cli("tasks", "retry", bad.id)
    assert (code, "task_history_arguments" in printed) == (1, True)
    code, printed = kept.cli("tasks", "retry", bad.id, "--kwargs", "{}")
    assert (code, "the args of task" in printed) == (1, True)
    assert kept.json("tasks", "retry", buried.id)["run_again"] == [{"id": buried.id}]
    assert (rabbit.count(kept.queue), rabbit.count(f"{kept.queue}.dead")) == (1, 0)


def test_all_that_a_search_finds_is_revoked_after_a_question(kept: Kept, rabbit: Broker) -> None:
    waiting = [kept.app.send_task("sample.add", (n, 1)) for n in range(3)]
    kept.read_until(lambda: len(kept.states()) == 3)

    assert kept.cli("tasks", "revoke")[0] == 2
    assert kept.cli("tasks", "revoke", "--task", "sample.add")[0] == 1  # nobody says yes
    with kept.worker("-P", "threads", "-X", kept.queue):
        told = kept.json("tasks", "revoke", "--task", "sample.add", "--force")
        assert {task["id"] for task in told["revoked"]} == {task.id for task in waiting}
        kept.app.control.add_consumer(kept.queue)
        kept.read_until(lambda: set(kept.states().values()) == {"REVOKED"}, lambda: str(kept.states()))


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
                kept.succeeded(len(sent) - 50)
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
    with kept.worker() as worker, kept.index() as index:
        sent |= {kept.app.send_task("sample.add", (1, n)).id for n in range(50)}
        kept.succeeded(len(sent) - 40)
        hurt_node.stop()
        hurt_node.start()
        sent |= {kept.app.send_task("sample.add", (2, n)).id for n in range(50)}
        kept.succeeded(len(sent))
        assert (worker.stop(), index.stop()) == (0, 0)

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
        kept.succeeded(50)
        eventually(lambda: [task.id for task in kept.app.history.find(text="redis")] == [bad.id])

    assert set(kept.states()) == sent | {bad.id}
    with kept.app.broker.admin() as admin:
        assert admin.count(kept.history_queue) == 0
    kept.close()


def test_alerts_may_be_in_postgresql_and_are_told_once(postgres: str) -> None:
    former = History(postgres)

    def as_before_workflows(connection: sa.Connection) -> None:
        for column in ("group_id", "group_index", "joins", "follows", "periodic"):
            connection.execute(sa.text(f"ALTER TABLE amqtask_history DROP COLUMN {column}"))

    former.index.transact(as_before_workflows)
    former.close()
    history, other = History(postgres), History(postgres)
    told = {"uuid": "t1", "hostname": "w1@host", "timestamp": 1_764_500_000.0, "queue": "mail", "group_id": "g"}
    history.index.take([{**told, "type": "task-sent"}])
    assert ([task.id for task in history.workflow("g")], history.index.oldest_waiting("mail")) == (
        ["t1"],
        1_764_500_000.0,
    )

    problem = Problem("dead-letters", "mail.dead", "3 dead letters", 3, 0)
    mine, others = AlertLog(history.index), AlertLog(other.index)
    assert [log.fire(problem, 5.0, ["hook"], {"state": "firing"}) for log in (mine, others)] == [True, False]
    notice = mine.claim(6.0)
    assert notice is not None
    assert others.claim(6.0) is None
    mine.told(notice, 7.0)
    (alert,) = others.firing().values()
    assert [log.resolve(alert["id"], 8.0, ["hook"], {}) for log in (others, mine)] == [True, False]
    assert others.claim(9.0) is not None
    mine.forget(10.0)
    assert (mine.past(10), mine.claim(99.0)) == ([], None)
    history.close()
    other.close()

"""A worker on a real broker: what it answers, how it stops, what it can be told."""

from __future__ import annotations

import json
import signal
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pika
import pytest

from amqtask import AmqTask, Broadcast, Queue
from amqtask.exceptions import TaskRevokedError, Unroutable
from integration.conftest import Broker
from integration.nodes import RabbitNode
from integration.waiting import PATIENT
from integration.workers import WorkerProcess, eventually, run_cli

HELD = "integration.apps.held"
SAMPLE = "integration.apps.sample"


class Held:
    """The producer's end of the held tasks: start them, see them run, let them go."""

    def __init__(self, url: str, queue: str, folder: Path) -> None:
        self.app = AmqTask("client", broker=url, backend="rpc://", **PATIENT)
        self.queue = queue
        self.folder = folder

    def send(self, task: str, name: str, **options: Any) -> Any:
        return self.app.send_task(f"held.{task}", (str(self.folder), name), queue=self.queue, **options)

    @property
    def runs(self) -> list[str]:
        file = self.folder / "runs"
        return file.read_text().split() if file.exists() else []

    def await_run(self, *names: str) -> None:
        eventually(lambda: set(names) <= set(self.runs), what=lambda: f"{names} did not start; {self.runs} did")

    def release(self, name: str) -> None:
        (self.folder / f"release-{name}").touch()


@pytest.fixture
def held(rabbit: Broker, tmp_path: Path) -> Iterator[Held]:
    """On the broker that all tests share."""
    made = Held(rabbit.url, rabbit.queue("held"), tmp_path)
    yield made
    made.app.close()


def worker_of(held: Held, *options: str, **environment: str) -> WorkerProcess:
    return WorkerProcess(HELD, "-Q", held.queue, *options, environment=environment)


# -- stopping


@pytest.mark.parametrize("pool", ["solo", "threads", "prefork", "eventlet", "gevent", "asyncio"])
def test_an_idle_worker_stops_warmly(held: Held, pool: str) -> None:
    with worker_of(held, "-P", pool, "-c", "2") as worker:
        assert worker.stop() == 0
        assert "Warm shutdown" in worker.log


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_warm_stop_lets_the_running_task_end_and_gives_back_what_waits(
    rabbit: Broker, held: Held, signum: int
) -> None:
    with worker_of(held, "-c", "1", "--prefetch-multiplier", "5") as worker:
        running = held.send("hold", "a")
        held.await_run("a")
        for name in ("b", "c"):
            held.send("note", name)
        worker.signal(signum)
        worker.await_log("Warm shutdown")
        eventually(lambda: rabbit.count(held.queue) == 2, what="what waited was not given back")
        held.release("a")

        assert worker.wait() == 0
    assert running.get(timeout=90) == "a"
    assert held.runs == ["a"]
    assert rabbit.count(held.queue) == 2


@pytest.mark.parametrize(
    ("first", "second"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT), (None, signal.SIGQUIT)]
)
def test_a_second_signal_or_quit_requeues_what_runs(rabbit: Broker, held: Held, first: int | None, second: int) -> None:
    with worker_of(held, "-c", "1") as worker:
        held.send("hold", "a")
        held.await_run("a")
        if first is not None:
            worker.signal(first)
            worker.await_log("Warm shutdown")
        worker.signal(second)

        assert worker.wait() == 1
    eventually(lambda: rabbit.count(held.queue) == 1)


def test_the_end_of_the_grace_period_requeues_what_runs(rabbit: Broker, held: Held) -> None:
    with worker_of(held, "-c", "1", HELD_GRACE="0.5") as worker:
        held.send("hold", "a")
        held.await_run("a")

        assert worker.stop() == 1
    eventually(lambda: rabbit.count(held.queue) == 1)


def test_term_is_quit_when_remapped(rabbit: Broker, held: Held) -> None:
    with worker_of(held, "-c", "1", REMAP_SIGTERM="SIGQUIT") as worker:
        held.send("hold", "a")
        held.await_run("a")

        assert worker.stop() == 1
    eventually(lambda: rabbit.count(held.queue) == 1)


@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_hup_restarts_the_worker_when_what_runs_has_ended(held: Held, pool: str) -> None:
    with worker_of(held, "-P", pool, "-c", "1").start() as worker:
        before = worker.log.count(" ready.")
        result = held.send("hold", "a")
        held.await_run("a")
        worker.signal(signal.SIGHUP)
        worker.await_log("it starts anew")
        held.release("a")
        result.get(timeout=60)
        eventually(lambda: worker.log.count(" ready.") > before, what="the worker is not ready again")

        again = held.send("hold", "b")
        held.release("b")
        again.get(timeout=60)


def test_stacks_are_shown_on_request(held: Held) -> None:
    with worker_of(held, "-P", "solo") as worker:
        worker.signal(signal.SIGUSR1)
        worker.await_log("most recent call first")
        assert worker.stop() == 0


# -- answering


def test_late_acks_survive_the_workers_death_and_early_ones_do_not(rabbit: Broker, held: Held) -> None:
    node = f"acks-{uuid.uuid4().hex[:8]}@here"
    with worker_of(held, "-c", "2", "-n", node) as worker:
        held.send("hold", "late")
        held.send("hold_early", "early")
        held.await_run("late", "early")
        # The early ack is written soon after its task has begun; behind the answer the broker has it.
        assert held.app.control.ask("ping", {}, destination=[node], timeout=90)
        worker.kill()

    eventually(lambda: rabbit.count(held.queue) == 1)
    taken = rabbit.take(held.queue)
    assert taken is not None
    assert json.loads(taken[1])[0][1] == "late"


def test_a_task_whose_connection_was_cut_is_not_run_twice(hurt_node: RabbitNode, tmp_path: Path) -> None:
    held = Held(hurt_node.url, f"cut-{uuid.uuid4().hex[:8]}", tmp_path)
    with worker_of(held, "-c", "2", AMQTASK_BROKER_URL=hurt_node.url) as worker:
        result = held.send("hold", "a")
        held.await_run("a")
        hurt_node.ctl("close_all_connections", "a test cuts them")
        worker.await_log("Connection to broker lost")
        assert held.send("note", "b").get(timeout=90) == "b"  # the worker is back
        held.release("a")
        assert result.get(timeout=90) == "a"

        assert worker.stop() == 0
    broker = Broker(hurt_node.url)
    assert held.runs.count("a") == 1
    assert broker.count(held.queue) == 0
    broker.close()
    held.app.close()


def test_a_protocol_v1_message_runs(rabbit: Broker, held: Held) -> None:
    with worker_of(held, "-P", "solo") as worker:
        body = {"task": "held.note", "id": str(uuid.uuid4()), "args": [str(held.folder), "old"], "kwargs": {}}
        properties = pika.BasicProperties(
            content_type="application/json", content_encoding="utf-8", delivery_mode=2, headers={}
        )
        rabbit.publish(held.queue, json.dumps(body).encode(), properties)
        held.await_run("old")
        assert worker.stop() == 0
    assert rabbit.count(held.queue) == 0


def test_a_limited_task_holds_up_nobody(held: Held) -> None:
    with worker_of(held, "-c", "1"):
        for number in range(6):
            held.send("rare", f"rare-{number}")
        results = [held.send("note", str(number)) for number in range(20)]

        assert [result.get(timeout=90) for result in results] == [str(number) for number in range(20)]
    assert sum(name.startswith("rare") for name in held.runs) == 1


def test_a_task_waits_for_no_long_one_while_another_worker_is_idle(held: Held) -> None:
    with worker_of(held, "-c", "1", "-n", "one@%h"), worker_of(held, "-c", "1", "-n", "two@%h"):
        held.send("hold", "long")
        held.await_run("long")
        for number in range(5):
            assert held.send("note", f"short-{number}").get(timeout=90) == f"short-{number}"
        held.release("long")


@pytest.mark.parametrize("pool", ["prefork", "threads", "eventlet", "gevent"])
def test_long_tasks_that_follow_short_ones_are_shared_with_a_worker_that_idles(
    rabbit: Broker, held: Held, pool: str
) -> None:
    with worker_of(held, "-P", pool, "-c", "2", "-n", "one@%h") as one:
        first = [held.send("note", f"short-{number}") for number in range(200)]
        assert [result.get(timeout=90) for result in first] == [f"short-{number}" for number in range(200)]
        names = [f"long-{number}" for number in range(8)]
        results = [held.send("hold", name) for name in names]
        eventually(lambda: len(held.runs) == 202)
        with worker_of(held, "-P", pool, "-c", "2", "-n", "two@%h") as two:
            eventually(lambda: len(held.runs) == 204, what=lambda: f"only {held.runs[200:]} began")
            # What the first one held has gone back, but for one.
            eventually(lambda: rabbit.count(held.queue) >= 2, what="nothing waits in the queue")
            for name in held.runs[200:]:
                held.release(name)
            eventually(lambda: len(held.runs) == 208, what=lambda: f"only {held.runs[200:]} began")
            for name in names:
                held.release(name)
            assert [result.get(timeout=90) for result in results] == names
            assert sorted(held.runs[200:]) == names, f"{one.log}\n{two.log}"


# -- starting


def test_purge_deletes_what_waits_before_the_start(rabbit: Broker, held: Held) -> None:
    held.send("note", "old")
    with worker_of(held, "-P", "solo", "--purge") as worker:
        assert held.send("note", "new").get(timeout=90) == "new"
        assert worker.stop() == 0
    assert held.runs == ["new"]


def test_a_limit_that_the_pool_cannot_keep_is_refused_at_the_start(rabbit: Broker) -> None:
    code, output = run_cli("-A", HELD, "-b", rabbit.url, "worker", "-P", "solo", "--time-limit", "5")

    assert code == 1
    assert "hard time limit" in output
    assert "solo" in output


def test_a_limit_above_the_brokers_consumer_timeout_is_warned_of(held: Held) -> None:
    with worker_of(held, "-P", "solo", "--soft-time-limit", "7200") as worker:
        assert "consumer_timeout" in worker.log


# -- remote control


def test_a_worker_answers_questions(held: Held) -> None:
    with worker_of(held, "-c", "1", "-n", "asked@here"):
        held.send("hold", "a")
        held.await_run("a")
        ask = partial(held.app.control.ask, timeout=90)

        assert ask("ping", {}, destination=["asked@here"])["asked@here"] == {"ok": "pong"}
        (active,) = ask("active", {}, destination=["asked@here"])["asked@here"]
        assert active["name"] == "held.hold"
        assert [queue["name"] for queue in ask("active_queues", {}, destination=["asked@here"])["asked@here"]] == [
            held.queue
        ]
        assert "held.note" in ask("registered", {}, destination=["asked@here"])["asked@here"]
        held.release("a")


@pytest.mark.parametrize("pool", ["solo", "threads", "eventlet", "gevent", "asyncio"])
def test_a_worker_that_runs_a_task_in_its_own_process_answers(held: Held, pool: str) -> None:
    node = f"{pool}@here"
    with worker_of(held, "-P", pool, "-n", node) as worker:
        began = time.time()
        result = held.send("hold", "a")
        held.await_run("a")

        (active,) = held.app.control.ask("active", {}, destination=[node], timeout=90)[node]
        assert (active["id"], active["worker_pid"]) == (result.id, worker.pid)
        assert began - 0.1 <= active["time_start"] <= time.time()
        held.release("a")
        result.get(timeout=90)


def test_replies_that_nobody_can_get_do_no_harm(rabbit: Broker, held: Held) -> None:
    with worker_of(held, "-P", "solo", "-n", "patient@here") as worker:
        for reply_to in ({"exchange": "not-there", "routing_key": "x"}, {"exchange": "", "routing_key": "nobody"}):
            command = {"method": "ping", "destination": ["patient@here"], "ticket": "t", "reply_to": reply_to}
            channel = rabbit.channel()
            properties = pika.BasicProperties("application/json", "utf-8", {"clock": 1})
            channel.basic_publish("celery.pidbox", "", json.dumps(command).encode(), properties)
            channel.close()

        for _ in range(2):
            assert held.app.control.ask("ping", {}, destination=["patient@here"], timeout=90)
        assert held.send("note", "a").get(timeout=90) == "a"
        assert worker.stop() == 0


def test_a_revoked_task_does_not_run(held: Held) -> None:
    with worker_of(held, "-P", "solo", "-n", "revoker@here"):
        task_id = str(uuid.uuid4())
        held.app.control.ask("revoke", {"task_id": task_id}, destination=["revoker@here"], timeout=90)
        result = held.send("note", "never", task_id=task_id)

        with pytest.raises(TaskRevokedError):
            result.get(timeout=90)
    assert held.runs == []


def test_a_running_task_is_terminated(held: Held) -> None:
    with worker_of(held, "-c", "1", "-n", "killer@here"):
        result = held.send("hold", "a")
        held.await_run("a")
        held.app.control.ask(
            "terminate", {"task_id": result.id, "signal": "SIGTERM"}, destination=["killer@here"], timeout=90
        )

        with pytest.raises(TaskRevokedError):
            result.get(timeout=90)
        assert held.send("note", "b").get(timeout=90) == "b"


def test_queues_are_added_and_taken_away_at_run_time(rabbit: Broker, held: Held) -> None:
    other = rabbit.queue("other")
    with worker_of(held, "-P", "solo", "-n", "queues@here"):
        ask = partial(held.app.control.ask, timeout=90)
        ask("add_consumer", {"queue": other}, destination=["queues@here"])
        result = held.app.send_task("held.note", (str(held.folder), "there"), queue=other)
        assert result.get(timeout=90) == "there"
        ask("cancel_consumer", {"queue": other}, destination=["queues@here"])
        held.app.send_task("held.note", (str(held.folder), "stays"), queue=other)
        assert held.send("note", "here").get(timeout=90) == "here"
        eventually(lambda: rabbit.count(other) == 1)
    assert held.runs == ["there", "here"]


def test_the_pool_grows_with_the_work(held: Held) -> None:
    with worker_of(held, "--autoscale", "3,1", "-n", "scaled@here"):
        for name in "abc":
            held.send("hold", name)
        held.await_run("a", "b", "c")
        stats = held.app.control.ask("stats", {}, destination=["scaled@here"], timeout=90)["scaled@here"]
        assert stats["autoscaler"]["current"] == 3
        for name in "abc":
            held.release(name)


def test_a_remote_shutdown_is_warm(held: Held) -> None:
    with worker_of(held, "-P", "solo", "-n", "stopped@here") as worker:
        held.app.control.shutdown(destination=["stopped@here"])
        assert worker.wait() == 0


# -- to every worker, and to one


def test_a_broadcast_runs_in_every_worker(rabbit: Broker, tmp_path: Path) -> None:
    news, work = rabbit.queue("news"), rabbit.queue("work")
    environment = {"SAMPLE_BROADCAST": news, "SAMPLE_QUEUE": work}
    workers = [
        WorkerProcess(SAMPLE, "-Q", news, "-P", "solo", "-n", f"w{number}@%h", environment=environment)
        for number in range(2)
    ]
    app = AmqTask("client", broker=rabbit.url, **PATIENT, task_queues=[Broadcast(news), Queue(work)])
    with workers[0], workers[1], app:
        app.send_task("sample.leave", (str(tmp_path / "ran"),), queue=news)
        eventually(lambda: (tmp_path / "ran").exists() and (tmp_path / "ran").read_text().count("ran") == 2)
        assert [worker.stop() for worker in workers] == [0, 0]
        app.send_task("sample.leave", (str(tmp_path / "later"),), queue=news)  # to nobody, and no error
    assert not (tmp_path / "later").exists()
    rabbit.channel().exchange_delete(news)


def test_a_worker_is_reached_by_its_name(rabbit: Broker, tmp_path: Path) -> None:
    work, node = rabbit.queue("work"), f"direct-{uuid.uuid4().hex[:8]}@here"
    environment = {"SAMPLE_QUEUE": work, "SAMPLE_DIRECT": "1"}
    app = AmqTask("client", broker=rabbit.url, **PATIENT)
    with WorkerProcess(SAMPLE, "-P", "solo", "-n", node, environment=environment), app:
        app.send_task("sample.leave", (str(tmp_path / "ran"),), exchange="C.dq2", routing_key=node)
        eventually((tmp_path / "ran").exists)
        with pytest.raises(Unroutable):
            app.send_task("sample.leave", (str(tmp_path / "x"),), exchange="C.dq2", routing_key="nobody@here")
    rabbit.channel().queue_delete(f"{node}.dq2")

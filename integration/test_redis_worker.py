"""Workers and producers on a Redis broker, with results in Redis; beside Celery's on the same Redis; and nothing is lost."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from amqtask import AmqTask, Broadcast, Queue, chain, group
from amqtask.exceptions import TaskRevokedError
from integration import beats, celery_peer
from integration.celery_peer import CeleryWorker
from integration.flower_peer import Flower
from integration.waiting import PATIENT
from integration.workers import WorkerProcess, eventually

SAMPLE = "integration.apps.sample"
POOLS = ["prefork", "threads", "solo", "asyncio", "eventlet", "gevent"]


class OnRedis:
    """A queue of a test's own on a Redis: our application, our workers, and the environment of Celery's."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.queue = f"q-{uuid.uuid4().hex[:12]}"
        self.app = AmqTask("client", broker=url, backend=url, **PATIENT)
        self.app.conf.task_default_queue = self.queue
        self.client = redis.Redis.from_url(url)

    def worker(self, *options: str, **environment: str) -> WorkerProcess:
        """Not started."""
        return WorkerProcess(
            SAMPLE,
            "-Q",
            self.queue,
            "-n",
            f"{self.queue}@%h",
            *options,
            environment={
                "AMQTASK_BROKER_URL": self.url,
                "SAMPLE_BACKEND": self.url,
                "SAMPLE_QUEUE": self.queue,
                **environment,
            },
        )

    @property
    def celery(self) -> dict[str, str]:
        """The environment of Celery's programs."""
        return celery_peer.environment(self.url, self.url, self.queue)

    def asked(self, question: str, *nodes: str) -> dict[str, Any]:
        """The workers' answers to a question of `inspect`, by node name."""
        answers = getattr(self.app.control.inspect(nodes or None, timeout=10), question)()
        return answers or {}

    def send(self, name: str, *args: object, **options: Any) -> Any:
        """Call a task by name."""
        return self.app.send_task(f"sample.{name}", args, **options)

    @property
    def held(self) -> int:
        """How many messages of the queue are held."""
        entries: Any = self.client.hvals("unacked")
        return sum(entry.endswith(f'"{self.queue}"]'.encode()) for entry in entries)


@pytest.fixture
def on_redis(redis_url: str) -> Iterator[OnRedis]:
    made = OnRedis(redis_url)
    yield made
    made.app.close()
    made.client.close()


# -- alone


@pytest.mark.parametrize("pool", POOLS)
def test_each_pool_runs_tasks_retries_and_workflows(on_redis: OnRedis, pool: str, tmp_path: Path) -> None:
    add = on_redis.app.signature("sample.add")
    with on_redis.worker("-P", pool, "-c", "2") as worker:
        assert on_redis.send("add", 2, 3).get(timeout=90) == 5
        with pytest.raises(ValueError, match="as told"):
            on_redis.send("fail", "as told").get(timeout=90)
        assert on_redis.send("retry", str(tmp_path / "runs"), 1).get(timeout=90) == 1
        began = time.time()
        assert on_redis.send("add", 1, 1, countdown=1.5).get(timeout=90) == 2
        assert time.time() - began >= 1.5
        assert chain(add.clone((1, 2)), add.clone((3,))).apply_async().get(timeout=90) == 6
        assert group(add.clone((n, n)) for n in range(5)).apply_async().get(timeout=90) == [0, 2, 4, 6, 8]
        assert worker.stop() == 0

    assert on_redis.client.llen(on_redis.queue) == 0


def test_a_worker_is_asked_and_told_over_redis(on_redis: OnRedis, tmp_path: Path) -> None:
    with on_redis.worker("-c", "1", "--prefetch-multiplier", "2"):
        (name,) = [node for node in on_redis.asked("ping") if node.startswith(on_redis.queue)]
        running = on_redis.send("wait_for", str(tmp_path / "started"), str(tmp_path / "release"))
        eventually((tmp_path / "started").exists)
        later = on_redis.send("add", 1, 1, countdown=600)

        assert [task["id"] for task in on_redis.asked("active", name)[name]] == [running.id]
        assert later.id in [task["request"]["id"] for task in on_redis.asked("scheduled", name)[name]]
        waiting = on_redis.send("leave", str(tmp_path / "never"))
        waiting.revoke()
        running.revoke(terminate=True)
        for result in (running, waiting):
            with pytest.raises(TaskRevokedError):
                result.get(timeout=90)
    assert not (tmp_path / "never").exists()


def test_a_revoke_holds_for_a_worker_that_starts_later(on_redis: OnRedis) -> None:
    revoked, other = on_redis.send("add", 1, 1), on_redis.send("add", 2, 3)
    revoked.revoke()
    with on_redis.worker("-c", "1", "-P", "threads"):
        with pytest.raises(TaskRevokedError):
            revoked.get(timeout=90)
        assert other.get(timeout=90) == 5
        last = on_redis.send("add", 1, 1, countdown=1)
        last.revoke()
        with pytest.raises(TaskRevokedError):
            last.get(timeout=90)


def test_events_of_a_worker_come_over_redis(on_redis: OnRedis) -> None:
    seen: list[str] = []

    def on_event(event: dict[str, Any]) -> None:
        if not seen:  # it listens
            on_redis.send("add", 1, 1)
        if event.get("hostname", "").startswith(on_redis.queue):
            seen.append(event["type"])
        receiver.should_stop = "task-succeeded" in seen

    with on_redis.worker("-c", "1", "-E"):
        receiver = on_redis.app.events.Receiver(None, handlers={"*": on_event})
        receiver.capture(timeout=90)

    assert "task-received" in seen


def test_every_worker_has_a_broadcast_and_one_an_election(on_redis: OnRedis, tmp_path: Path) -> None:
    news, called = f"{on_redis.queue}-news", tmp_path / "called"
    told, queue = {"SAMPLE_BROADCAST": news}, Queue(on_redis.queue)
    app = AmqTask("client", broker=on_redis.url, task_queues=[Broadcast(news), queue], **PATIENT)
    queues = ("-Q", f"{news},{on_redis.queue}", "-P", "solo")
    with on_redis.worker(*queues, **told), on_redis.worker(*queues, "-n", "second@%h", **told), app:
        app.send_task("sample.leave", (str(tmp_path / "news"),), queue=news)
        eventually(lambda: (tmp_path / "news").exists() and (tmp_path / "news").read_text().count("ran") == 2)
        for number in range(3):
            action = app.signature("sample.leave", (str(called), f"called-{number}"), queue=on_redis.queue)
            app.control.election(f"{on_redis.queue}-{number}", "task", action)
        eventually(lambda: called.exists() and len(called.read_text().split()) >= 3)

    assert sorted(called.read_text().split()) == [f"called-{number}" for number in range(3)]


# -- beside Celery


def test_our_worker_runs_what_celery_calls(on_redis: OnRedis, tmp_path: Path) -> None:
    with on_redis.worker("-c", "2") as worker:
        called = celery_peer.call(
            "from celery import chord, group\n"
            "print(add.delay(2, 3).get(timeout=90))\n"
            "print((add.s(1, 2) | add.s(3) | add.s(4)).delay().get(timeout=90))\n"
            "print(group(add.s(n, n) for n in range(3))().get(timeout=90))\n"
            f"print(retry.delay({str(tmp_path / 'runs')!r}, 1).get(timeout=90))\n"
            "import time; t = time.time(); add.apply_async((1, 1), countdown=2).get(timeout=90); print(time.time() - t >= 2)",
            on_redis.celery,
        )
        code, answered = celery_peer.cli(on_redis.celery, "inspect", "ping", "-t", "5")
        assert worker.stop() == 0

    assert called.splitlines() == ["5", "10", "[0, 2, 4]", "1", "True"]
    assert (code, on_redis.queue in answered, "pong" in answered) == (0, True, True)


def test_celerys_worker_runs_what_we_call(on_redis: OnRedis) -> None:
    add = on_redis.app.signature("sample.add")
    with CeleryWorker(on_redis.celery, on_redis.queue):
        assert on_redis.send("add", 2, 3).get(timeout=90) == 5
        with pytest.raises(ValueError, match="as told"):
            on_redis.send("fail", "as told").get(timeout=90)
        assert chain(add.clone((1, 2)), add.clone((3,))).apply_async().get(timeout=90) == 6
        assert any(answer["ok"] == "pong" for answer in on_redis.asked("ping").values())


def test_our_worker_asks_celerys_what_was_revoked(on_redis: OnRedis) -> None:
    with CeleryWorker(on_redis.celery, on_redis.queue), on_redis.worker("-c", "1") as worker:
        worker.await_log("mingle: sync with")
        assert "mingle: all alone" not in worker.log


def test_a_delayed_call_reaches_celerys_worker_while_any_worker_of_ours_runs(on_redis: OnRedis) -> None:
    other = OnRedis(on_redis.url)
    with CeleryWorker(on_redis.celery, on_redis.queue), other.worker("-c", "1"):
        began = time.time()
        assert on_redis.send("add", 1, 1, countdown=2).get(timeout=90) == 2
        assert time.time() - began >= 2
    other.app.close()
    other.client.close()


PRIORITIES = (9, 3, 0, 6, 9, 0)


def test_celerys_priorities_hold_in_our_worker_and_ours_in_celerys(on_redis: OnRedis, tmp_path: Path) -> None:
    called = "\n".join(
        f"app.send_task('sample.leave', ({str(tmp_path / 'ours')!r}, '{number}'), priority={number})"
        for number in PRIORITIES
    )
    celery_peer.call(called, on_redis.celery)
    with on_redis.worker("-P", "solo"):
        eventually(lambda: (tmp_path / "ours").exists() and len((tmp_path / "ours").read_text().split()) == 6)
    for number in PRIORITIES:
        on_redis.send("leave", str(tmp_path / "theirs"), str(number), priority=number)
    with CeleryWorker(on_redis.celery, on_redis.queue, "-P", "solo"):
        eventually(lambda: (tmp_path / "theirs").exists() and len((tmp_path / "theirs").read_text().split()) == 6)

    for side in ("ours", "theirs"):
        assert (tmp_path / side).read_text().split() == ["0", "0", "3", "6", "9", "9"], side


LISTEN = """
def on_event(event):
    if event["hostname"].startswith({node!r}):
        seen.append(event["type"])
        if len(seen) == 1:
            add.delay(1, 1)
    receiver.should_stop = "task-succeeded" in seen

seen = []
with app.connection() as connection:
    receiver = app.events.Receiver(connection, handlers={{"*": on_event}})
    receiver.capture(timeout=90)
print(*sorted(set(seen) & {{"task-received", "task-started", "task-succeeded"}}))
"""


def test_celery_hears_our_worker_s_events(on_redis: OnRedis) -> None:
    with on_redis.worker("-c", "1", "-E"):
        heard = celery_peer.call(LISTEN.format(node=on_redis.queue), on_redis.celery)

    assert heard.split() == ["task-received", "task-started", "task-succeeded"]


def test_we_hear_celerys_worker_s_events_and_ask_and_change_it(on_redis: OnRedis) -> None:
    node = f"{on_redis.queue}@here"
    seen: list[str] = []

    def on_event(event: dict[str, Any]) -> None:
        if event.get("hostname") == node:
            seen.append(event["type"])
            if len(seen) == 1:
                on_redis.send("add", 1, 1)
        receiver.should_stop = "task-succeeded" in seen

    with CeleryWorker(on_redis.celery, on_redis.queue, "-n", node, "-E"):
        receiver = on_redis.app.events.Receiver(None, handlers={"*": on_event})
        receiver.capture(timeout=90)
        assert "sample.add" in on_redis.asked("registered", node)[node]
        (queue,) = on_redis.asked("active_queues", node)[node]
        assert queue["name"] == on_redis.queue
        answers = on_redis.app.control.pool_grow(1, destination=[node], reply=True, timeout=10)
        assert answers == [{node: {"ok": "pool will grow"}}]
    assert "task-received" in seen


def test_celerys_command_line_asks_and_changes_our_worker(on_redis: OnRedis) -> None:
    node = f"{on_redis.queue}@here"

    def says(*words: str) -> Any:
        code, printed = celery_peer.cli(on_redis.celery, *words, "-d", node, "--json", "-t", "10")
        assert code == 0, printed
        found = json.loads(printed)
        (reply,) = found if isinstance(found, list) else [found]
        return reply[node]

    with on_redis.worker("-c", "1", "-n", node):
        later = on_redis.send("add", 1, 1, countdown=600)
        assert "sample.add" in says("inspect", "registered")
        assert later.id in str(says("inspect", "scheduled"))
        assert says("inspect", "stats")["broker"]["transport"] == "redis"
        assert says("inspect", "active") == []
        assert says("control", "pool_grow", "1") == {"ok": "pool will grow"}
        assert says("inspect", "stats")["pool"]["max-concurrency"] == 2


def test_celerys_worker_retries_what_we_call(on_redis: OnRedis, tmp_path: Path) -> None:
    with CeleryWorker(on_redis.celery, on_redis.queue):
        assert on_redis.send("retry", str(tmp_path / "unused"), 2).get(timeout=90) == 2


def test_both_workers_share_a_queue(on_redis: OnRedis, tmp_path: Path) -> None:
    with CeleryWorker(on_redis.celery, on_redis.queue), on_redis.worker("-c", "2") as worker:
        results = [on_redis.send("add", number, 1) for number in range(100)]

        assert [result.get(timeout=90) for result in results] == [number + 1 for number in range(100)]
        assert worker.stop() == 0


def test_flower_shows_our_worker_and_its_tasks_over_redis(on_redis: OnRedis) -> None:
    environment = {"AMQTASK_BROKER_URL": on_redis.url, "SAMPLE_BACKEND": on_redis.url, "SAMPLE_QUEUE": on_redis.queue}
    with on_redis.worker("-c", "1", "-E") as worker, Flower(SAMPLE, environment=environment) as flower:

        def is_shown() -> bool:
            on_redis.send("add", 1, 1)
            shown: Any = flower.get("/api/tasks?limit=5")
            return any(task["state"] == "SUCCESS" and on_redis.queue in str(task["worker"]) for task in shown.values())

        eventually(is_shown, every=0.5, what=lambda: worker.log[-2000:])


# -- beat


def test_a_killed_leader_of_beats_is_followed_and_no_due_time_is_lost(redis_url: str) -> None:
    report = beats.run(redis_url, seconds=8, kills=1)

    assert report.is_good, str(report)
    assert report.takeovers[0][1] < 60

"""Every task runs at least once on a Redis broker, whatever breaks; and once where nothing has to run twice."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from integration.celery_peer import CeleryWorker
from integration.servers import RedisServer
from integration.test_redis_worker import OnRedis
from integration.workers import WorkerProcess, eventually

NUMBERS = 200


class Trial(OnRedis):
    """Numbered tasks on a Redis that writes to its disk before it answers, and what ran."""

    def __init__(self, server: RedisServer, folder: Path) -> None:
        super().__init__(server.url)
        self.server = server
        self.journal = folder / "journal"
        self.folder = folder
        self.workers: list[WorkerProcess] = []

    def start_worker(self, *options: str) -> WorkerProcess:
        """Ready; killed at the end."""
        self.workers.append(self.worker("-c", "2", *options).start())
        return self.workers[-1]

    def publish(self, fault: Callable[[], None], *, at: int = NUMBERS // 2) -> None:
        """Call all numbers, and let the fault happen in between."""
        for number in range(NUMBERS):
            if number == at:
                fault()
            self.send("leave", str(self.journal), str(number), ignore_result=True)

    @property
    def runs(self) -> Counter[str]:
        """How often each number ran."""
        return Counter(self.journal.read_text().split()) if self.journal.exists() else Counter()

    def await_all(self) -> None:
        """Each number has run, and nothing is left."""
        eventually(lambda: len(self.runs) == NUMBERS, 150, what=lambda: f"{NUMBERS - len(self.runs)} did not run")
        eventually(lambda: not self.held and not self.client.llen(self.queue), what="something is left")


@pytest.fixture
def trial(redis_url: str, tmp_path: Path) -> Iterator[Trial]:
    server = RedisServer("--appendonly", "yes", "--appendfsync", "always")
    made = Trial(server.start(), tmp_path)
    try:
        yield made
    finally:
        for worker in made.workers:
            worker.kill()
        made.app.close()
        made.client.close()
        server.remove()


def test_tasks_survive_their_worker(trial: Trial) -> None:
    first = trial.start_worker()
    trial.publish(first.kill)
    trial.start_worker()
    trial.await_all()


def test_tasks_survive_their_processes(trial: Trial) -> None:
    worker = trial.start_worker()

    def kill_children() -> None:
        for child in worker.children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    trial.publish(kill_children)
    trial.await_all()
    assert worker.stop() == 0


def test_killed_connections_make_no_task_run_twice(trial: Trial) -> None:
    worker = trial.start_worker()
    trial.publish(lambda: None)
    while len(trial.runs) < NUMBERS:
        trial.client.client_kill_filter(_type="normal", skipme=True)
        before = len(trial.runs)
        eventually(lambda before=before: len(trial.runs) > before or len(trial.runs) == NUMBERS)  # type: ignore[misc]
    trial.await_all()
    assert worker.stop() == 0
    assert set(trial.runs.values()) == {1}


def test_tasks_survive_a_redis_that_is_killed_and_comes_back(trial: Trial) -> None:
    worker = trial.start_worker()

    def restart() -> None:
        trial.server.kill()
        trial.server.start()

    trial.publish(restart)
    trial.await_all()
    assert worker.stop() == 0


def test_tasks_survive_a_redis_that_stands_still(trial: Trial) -> None:
    worker = trial.start_worker()

    def pause() -> None:
        assert trial.server.pid is not None
        os.kill(trial.server.pid, signal.SIGSTOP)
        time.sleep(15)  # the fault itself
        os.kill(trial.server.pid, signal.SIGCONT)

    trial.publish(pause)
    trial.await_all()
    assert worker.stop() == 0


def test_tasks_survive_a_full_memory(trial: Trial) -> None:
    trial.publish(lambda: None)
    trial.client.config_set("maxmemory", "1")
    worker = trial.start_worker()  # takes and acknowledges what is there all the same
    trial.await_all()
    trial.client.config_set("maxmemory", "0")
    assert worker.stop() == 0
    assert set(trial.runs.values()) == {1}


def test_tasks_survive_beside_celerys_workers(trial: Trial) -> None:
    first = trial.start_worker()
    with CeleryWorker(trial.celery, trial.queue):
        done = [trial.send("add", number, 1) for number in range(NUMBERS)]
        first.kill()
        trial.start_worker()
        assert [result.get(timeout=120) for result in done] == [number + 1 for number in range(NUMBERS)]


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["prefork", "solo", "threads"])
def test_a_task_that_is_longer_than_its_lease_runs_once(trial: Trial, pool: str) -> None:
    trial.start_worker("-P", pool)
    trial.start_worker("-P", pool, "-n", "second@%h")
    started, release = trial.folder / "started", trial.folder / "release"
    result = trial.send("wait_for", str(started), str(release))
    eventually(started.exists)
    started.unlink()

    time.sleep(45)  # a lease and a half
    assert not started.exists()
    release.touch()
    assert result.get(timeout=90) == "released"


def test_a_worker_that_stands_still_loses_what_it_holds_and_does_no_harm(trial: Trial) -> None:
    first = trial.start_worker("--prefetch-multiplier", "4")
    trial.publish(lambda: first.signal(signal.SIGSTOP))
    tags: Any = trial.client.zrange("amqtask.lease", 0, -1)
    trial.client.zadd("amqtask.lease", dict.fromkeys(tags, 1.0))  # as if it had stood for long
    trial.start_worker("-n", "second@%h")
    eventually(lambda: len(trial.runs) == NUMBERS, what=lambda: f"{NUMBERS - len(trial.runs)} did not run")
    first.signal(signal.SIGCONT)
    trial.await_all()
    assert first.stop() == 0


def test_a_redis_without_a_disk_forgets_and_the_worker_goes_on(redis_url: str, tmp_path: Path) -> None:
    server = RedisServer().start()
    trial = Trial(server, tmp_path)
    try:
        trial.start_worker()
        client = redis.Redis.from_url(server.url)
        client.set("kept", "?")
        queues = client.hgetall("amqtask.queues")
        assert queues
        server.kill()
        server.start()
        assert not client.exists("kept")
        eventually(lambda: client.hgetall("amqtask.queues") == queues)  # the worker has declared them anew
        trial.publish(lambda: None)
        trial.await_all()
    finally:
        for worker in trial.workers:
            worker.kill()
        trial.app.close()
        server.remove()


HOSTILE = [
    b"",
    b"\xff\xfe",
    b"[]",
    b"null",
    b"{}",
    b"[" * 5000,
    b'{"body": "W10=", "properties": {"body_encoding": "base64"}}',
    b'{"body": "%%%", "properties": {"body_encoding": "base64"}, "headers": {"task": "sample.add", "id": "x"}}',
    b'{"body": "W10=", "properties": {"correlation_id": {"a": 1}}, "headers": {"task": "sample.add", "id": "x"}}',
    b'{"body": "[[1, 2], {}, {}]", "content-type": "application/json", "content-encoding": "utf-8", "properties": {},'
    b' "headers": {"task": ["sample.add"], "id": 7}}',
    b'{"body": "W10=", "properties": {}, "headers": {"x": "' + b"y" * 100_000 + b'"}}',
]


def test_messages_that_are_none_go_to_the_dead_letters_and_harm_no_other(trial: Trial) -> None:
    worker = trial.start_worker()
    for text in HOSTILE:
        trial.client.lpush(trial.queue, text)
        trial.send("leave", str(trial.journal), "good", ignore_result=True)

    eventually(lambda: trial.runs["good"] == len(HOSTILE))
    eventually(lambda: trial.client.llen(f"{trial.queue}.dead") == len(HOSTILE), what=lambda: worker.log[-4000:])
    assert worker.stop() == 0
    assert not trial.held
    assert "Traceback" not in worker.log

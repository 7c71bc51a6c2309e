"""The command line on a Redis broker: queues, purge, dead letters, topology, and the way up to RabbitMQ."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amqtask.console.web import console
from amqtask.exceptions import TaskRevokedError
from amqtask.transport.redis.scripts import RESERVE
from integration.conftest import Broker
from integration.test_redis_worker import OnRedis
from integration.workers import WorkerProcess, eventually, run_cli
from tests.console.test_console import Client

SAMPLE = "integration.apps.sample"


class Told(OnRedis):
    """A queue on Redis, and commands for it."""

    def run(self, *words: str) -> tuple[int, str]:
        """Exit code, and what it printed."""
        environment = {"AMQTASK_BROKER_URL": self.url, "SAMPLE_BACKEND": self.url, "SAMPLE_QUEUE": self.queue}
        return run_cli("-A", SAMPLE, *words, environment=environment)

    def json(self, *words: str) -> Any:
        """What it printed as JSON."""
        code, printed = self.run(*words, "--json")
        assert code == 0, printed
        return json.loads(printed)


@pytest.fixture
def told(redis_url: str) -> Iterator[Told]:
    made = Told(redis_url.rpartition("/")[0] + "/5")
    made.client.flushdb()
    yield made
    made.app.close()
    made.client.close()


def test_queues_are_counted_and_purged_with_what_is_delayed(told: Told) -> None:
    for number in range(3):
        told.send("add", number, 1)
    told.send("add", 1, 1, countdown=600)

    by_name = {row["queue"]: row for row in told.json("queues")}
    assert by_name[told.queue]["ready"] == 3
    assert sum(row["ready"] for name, row in by_name.items() if name.startswith("amqtask.delay")) == 1
    assert told.json("purge", "-f") == {"purged": {told.queue: 3}, "delayed": {told.queue: 1}}
    assert told.json("purge", "-f", "--delayed")["purged_delayed"] == {told.queue: 1}
    assert told.client.zcard("amqtask.delay") == 0


def test_delayed_tasks_are_seen_by_their_time_sent_now_and_revoked(told: Told, tmp_path: Path) -> None:
    told.app.conf.history_url = f"sqlite:///{tmp_path}/index.sqlite3"
    client = Client(console(told.app, indexes=False, watches=False))
    third, first, second = (told.send("add", hours, 1, countdown=3600 * hours) for hours in (3, 1, 2))
    elsewhere = told.app.send_task("sample.fail", ("x",), countdown=600, queue=f"{told.queue}-2")

    listed = told.json("queues", "--delayed")
    assert [one["id"] for one in listed] == [elsewhere.id, first.id, second.id, third.id]
    assert {one["held_by"] for one in listed} == {None}
    assert [one["id"] for one in told.json("queues", "--delayed", "-Q", f"{told.queue}-2")] == [elsewhere.id]
    shown = client.get("/api/queues/delayed", params={"task": "sample.add"}).json()
    assert ([one["id"] for one in shown["tasks"]], shown["total"]) == ([first.id, second.id, third.id], 4)

    def do(action: str, **fields: str) -> Any:
        return client.post(f"/api/do/{action}", json=fields).json()

    assert do("send-now", id=second.id) == {"done": "1 delayed task sent now"}
    with told.worker("-c", "1"):
        assert second.get(timeout=90) == 3
        assert do("revoke-delayed", queue=told.queue) == {"done": "2 delayed tasks revoked"}
        with pytest.raises(TaskRevokedError):
            first.get(timeout=90)
    assert [one["id"] for one in told.json("queues", "--delayed")] == [elsewhere.id]


def test_dead_letters_are_listed_and_go_back_to_work(told: Told) -> None:
    with told.worker("-c", "1"):
        result = told.app.send_task("sample.nobody_knows", (1,))
        eventually(lambda: told.client.llen(f"{told.queue}.dead") == 1)

    code, printed = told.run("dead", "list")
    assert (code, "sample.nobody_knows" in printed, result.id in printed) == (0, True, True)
    assert told.json("dead", "retry", "--all")["retried"] == {f"{told.queue}.dead": 1}
    assert (told.client.llen(f"{told.queue}.dead"), told.client.llen(told.queue)) == (0, 1)


def test_the_topology_is_declared_and_checked(told: Told) -> None:
    assert told.run("topology", "check")[0] == 1
    code, printed = told.run("topology", "declare")
    assert (code, f"created  queue '{told.queue}'" in printed) == (0, True)
    assert told.run("topology", "check")[0] == 0


def test_everything_moves_up_to_rabbitmq_and_runs_there(told: Told, rabbit: Broker) -> None:
    told.queue = told.app.conf.task_default_queue = rabbit.queue("up")
    for number in range(60):
        told.send("add", number, 1)
    soon = told.send("add", 40, 2, countdown=3)

    code, printed = told.run("migrate", told.url, rabbit.url, "-Q", told.queue, "--delayed", "-f")

    assert code == 0, printed
    assert (told.client.llen(told.queue), told.client.zcard("amqtask.delay"), told.client.hlen("unacked")) == (0, 0, 0)
    assert rabbit.count(told.queue) in (60, 61)  # the delayed one may be due by now
    environment = {"AMQTASK_BROKER_URL": rabbit.url, "SAMPLE_BACKEND": told.url, "SAMPLE_QUEUE": told.queue}
    with WorkerProcess(SAMPLE, "-c", "2", environment=environment):
        assert soon.get(timeout=90) == 42


def test_a_move_between_queues_leaves_other_tasks_where_they_were(told: Told) -> None:
    for number in range(30):
        told.send("add", number, 1)
        told.send("fail", str(number))

    code, printed = told.run("migrate", "-Q", f"{told.queue}:{told.queue}-2", "-T", "sample.add", "-f")

    assert code == 0, printed
    left: Any = told.client.lrange(told.queue, 0, -1)
    assert [json.loads(text)["headers"]["argsrepr"] for text in reversed(left)] == [f"('{n}',)" for n in range(30)]
    assert told.client.llen(f"{told.queue}-2") == 30


def test_what_a_killed_move_held_moves_with_the_next_one(told: Told) -> None:
    for number in range(30):
        told.send("add", number, 1)
    told.client.eval(RESERVE.source, 1, "", "the-killed-one", 1, 30, 25, told.queue, 25, "")
    tags: Any = told.client.zrange("amqtask.lease", 0, -1)
    told.client.zadd("amqtask.lease", dict.fromkeys(tags, 1.0))  # half a minute later

    code, printed = told.run("migrate", "-Q", f"{told.queue}:{told.queue}-2", "-f")

    assert code == 0, printed
    assert (told.client.llen(f"{told.queue}-2"), told.held) == (30, 0)


def test_the_doctor_finds_what_was_put_there_and_nothing_before(told: Told) -> None:
    def examined() -> set[str]:
        _, printed = told.run("doctor", "--json")
        return {f"{one['severity']} {one['what']}" for one in json.loads(printed) if one["severity"] != "info"}

    before = {name: told.client.config_get(name)[name] for name in ("appendonly", "maxmemory-policy", "maxmemory")}
    try:
        told.client.config_set("appendonly", "yes")
        assert examined() == set()

        told.client.config_set("maxmemory-policy", "allkeys-lru")
        told.client.config_set("appendonly", "no")
        told.client.config_set("maxmemory", told.client.info("memory")["used_memory"] + 200_000)
        told.client.lpush(f"{told.queue}.dead", "{}")
        found = examined()
    finally:
        for name, value in before.items():
            told.client.config_set(name, value or "")

    assert "error evicts keys when memory is short (allkeys-lru)" in found
    assert any(line.startswith("warning writes no append-only file") for line in found)
    assert any(line.endswith("of maxmemory") for line in found)
    assert "warning has 1 dead letter" in found

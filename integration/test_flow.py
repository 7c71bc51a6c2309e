"""Limits and unique tasks with a store in Redis, on RabbitMQ and on Redis: with several workers, one of which is killed."""

from __future__ import annotations

import importlib
import json
import os
import signal
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import pika
import pytest
import redis

from amqtask import chain, chord, group
from amqtask.client.flow_store import open_flow_store
from amqtask.exceptions import FlowStoreUnreachable
from amqtask.flow.contract import RUN, Bound, Entry, FlowStore
from amqtask.testing.suites.flow import FlowStoreSuite
from integration.conftest import Broker
from integration.machine import free_port
from integration.servers import Postgres
from integration.workers import WorkerProcess, eventually, run_cli


class TestRedisStore(FlowStoreSuite):
    @pytest.fixture
    def store(self, redis_url: str) -> Iterator[FlowStore]:
        made = open_flow_store(redis_url, {}, 30.0)
        yield made
        made.close()


@pytest.fixture(scope="module")
def database(postgres_server: Postgres) -> Iterator[str]:
    """One for all, whose scopes are each test's own."""
    url = postgres_server.create_database()
    yield url
    postgres_server.drop_database(url)


class TestPostgresStore(FlowStoreSuite):
    is_for_several = False

    @pytest.fixture
    def store(self, database: str) -> Iterator[FlowStore]:
        made = open_flow_store(database, {}, 30.0)
        yield made
        made.close()

    def test_those_who_ask_at_once_get_no_more_places_than_there_are(self, database: str, scope: str) -> None:
        place, running, most = Bound(f"{scope}:concurrency::x", "concurrency", places=3), Counter[str](), Counter[str]()
        mutex = threading.Lock()

        def count(change: int) -> None:
            with mutex:
                running["now"] += change
                most["now"] = max(most["now"], running["now"])

        def work(store: FlowStore, name: str) -> None:
            for number in range(10):
                entry = Entry(scope, f"{name}-{number}", f"{name}-{number} w", None, (place,), {"concurrency": 0})
                while store.enter(entry, 60.0) != RUN:
                    pass
                count(1)
                count(-1)
                store.leave(entry, 0.01, "free")

        with closing(open_flow_store(database, {}, 30.0)) as one, closing(open_flow_store(database, {}, 30.0)) as two:
            threads = [threading.Thread(target=work, args=((one, two)[name % 2], str(name))) for name in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert most["now"] <= 3


def test_a_store_that_is_away_is_told_without_its_password() -> None:
    store = open_flow_store(f"redis://:secret@127.0.0.1:{free_port()}/0", {}, 1.0)

    with pytest.raises(FlowStoreUnreachable, match="is flow_store right") as raised:
        store.take("key", "id", 1)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("mishap", ["its script is gone", "its connection is gone"])
def test_what_is_given_back_without_waiting_for_an_answer_is_given_back(redis_url: str, mishap: str) -> None:
    store, key = open_flow_store(redis_url, {}, 5.0), f"amqtask-flow:{{{uuid.uuid4()}}}"
    place = Bound(f"{key}:concurrency::x", "concurrency", places=1)
    runs = [Entry(key, str(number), f"{number} w 1", None, (place,)) for number in range(4)]
    with closing(redis.Redis.from_url(redis_url)) as client, closing(store):
        for run in runs[:2]:  # the first opens the line that the second uses
            assert store.enter(run, 60.0) == RUN
            store.leave(run, 0.1, "free")
        assert store.enter(runs[2], 60.0) == RUN
        if "script" in mishap:
            client.script_flush()
        else:
            client.client_kill_filter(_type="normal", skipme=True)
        store.leave(runs[2], 0.1, "free")
        assert store.enter(runs[3], 60.0) == RUN


@pytest.fixture(params=["rabbitmq", "redis"])
def flow(request: pytest.FixtureRequest, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the application, on a queue of its own."""
    broker = redis_url if request.param == "redis" else request.getfixturevalue("rabbit").url
    queue = f"flow-{uuid.uuid4().hex[:8]}"
    for name, value in (("BROKER", broker), ("STORE", redis_url), ("QUEUE", queue)):
        monkeypatch.setenv(f"FLOW_{name}", value)
    module: Any = importlib.reload(importlib.import_module("integration.apps.flow"))
    yield module
    module.app.control.purge()
    redis.Redis.from_url(redis_url).delete(module.JOURNAL)
    module.app.close()


def workers(stack: ExitStack, count: int, *options: str) -> list[WorkerProcess]:
    environment = {name: os.environ[name] for name in ("FLOW_BROKER", "FLOW_STORE", "FLOW_QUEUE")}
    made = []
    for number in range(count):
        name = f"w{number}-{uuid.uuid4().hex[:6]}@here"
        worker = WorkerProcess("integration.apps.flow", "-n", name, *options, environment=environment)
        made.append(stack.enter_context(worker))
    return made


def most_at_once(flow: Any) -> tuple[int, int]:
    """The most runs at once, of all and of a tenant."""
    running: Counter[str] = Counter()
    most, most_of_tenant = 0, 0
    for line in lines(flow):
        what, tenant, _ = line.split()
        running[tenant] += 1 if what == "begin" else -1
        most = max(most, sum(running.values()))
        most_of_tenant = max(most_of_tenant, *running.values())
    return most, most_of_tenant


def test_limits_hold_on_all_workers(flow: Any) -> None:
    with ExitStack() as stack:
        workers(stack, 2, "-c", "4", "-P", "prefork")
        results = group(flow.work.s(number, "abcde"[number % 5]) for number in range(60)).apply_async()
        rates = group(flow.paced.s(number) for number in range(10)).apply_async()
        assert results.get(timeout=90) == list(range(60))
        times = sorted(rates.get(timeout=90))
    assert most_at_once(flow) == (3, 1)
    assert times[-1] - times[0] >= 9 * 0.05 * 0.9


@pytest.mark.parametrize("flow", ["rabbitmq"], indirect=True)
def test_a_message_that_waits_for_its_turn_reaches_no_mailbox(flow: Any, rabbit: Broker) -> None:
    """Its sender, with a right on one exchange only, ended workers: one published it again, to the keys in CC, too."""
    queue, task_id = flow.app.conf.task_default_queue, str(uuid.uuid4())
    with ExitStack() as stack:
        (worker,) = workers(stack, 1, "-c", "2", "-P", "threads")
        ((name,),) = flow.app.control.ping(timeout=30, limit=1)
        first = flow.work.delay(1, "a", 2.0)
        eventually(lambda: "begin a 1" in lines(flow))
        channel = rabbit.channel()
        channel.queue_bind(queue, "amq.direct", queue)
        # A task of the old protocol, and a command.
        body = {
            "task": "flow.work",
            "id": task_id,
            "args": [2, "a"],
            "kwargs": {},
            "method": "shutdown",
            "arguments": {},
        }
        headers = {"task": "flow.work", "id": task_id, "CC": [f"{name}.celery.pidbox"]}
        properties = pika.BasicProperties("application/json", "utf-8", headers, delivery_mode=2)
        channel.basic_publish("amq.direct", queue, json.dumps(body).encode(), properties)
        assert first.get(timeout=90) == 1
        eventually(lambda: "end a 2" in lines(flow))
        assert flow.work.delay(3, "a").get(timeout=90) == 3
        assert "shutdown" not in worker.log.lower()


def test_parts_of_workflows_and_what_is_published_together_have_limits_keys_and_deadlines(flow: Any) -> None:
    part, deadline = flow.part, 120
    first = part.delay(0)
    together = flow.app.publish_many(part.s(number) for number in (0, 2, 2, 3))
    parts = group(part.si(number, 2) for number in (4, 5)).apply_async(deadline=deadline)
    steps = chain(part.si(6), part.si(7), part.si(8)).apply_async(deadline=deadline)
    joined = chord([part.si(number) for number in (9, 10, 11)], flow.app.signature("celery.accumulate")).apply_async(
        deadline=deadline
    )
    assert [first.id, together[1].id] == [together[0].id, together[2].id]
    assert [part.delay(4).id, part.delay(6).id] == [parts.results[0].id, steps.parent.parent.id]

    with ExitStack() as stack:
        workers(stack, 2, "-c", "4", "-P", "threads")
        assert [result.get(timeout=90)[0] for result in together] == [0, 2, 2, 3]
        deadlines = [
            moment for _, moment in (*parts.get(timeout=90), steps.get(timeout=90), *joined.get(timeout=90)[0])
        ]
        children = ("5000", "5002", "6000", "6002")
        eventually(lambda: all(f"end part {child}" in lines(flow) for child in children))
    assert None not in deadlines
    assert len(set(deadlines)) == 3
    assert most_at_once(flow)[0] <= 2
    # Each ran once, those that were tried again twice.
    begun = Counter(line.split()[-1] for line in lines(flow) if line.startswith("begin"))
    assert begun == {**{str(number): 1 + number % 2 for number in (0, *range(2, 12))}, **dict.fromkeys(children, 1)}


def lines(flow: Any) -> list[str]:
    return [line.decode() for line in flow.journal.lrange(flow.JOURNAL, 0, -1)]


@pytest.mark.parametrize("flow", ["redis"], indirect=True)
def test_a_limit_is_changed_while_workers_run(flow: Any) -> None:
    environment = {name: os.environ[name] for name in ("FLOW_BROKER", "FLOW_STORE", "FLOW_QUEUE")}

    def limits(*arguments: str) -> Any:
        code, said = run_cli("-A", "integration.apps.flow", "limits", *arguments, environment=environment)
        assert code == 0, said
        return said

    try:
        with ExitStack() as stack:
            workers(stack, 1, "-c", "4", "-P", "threads")
            limits("set", "flow.work", "concurrency", "1", "--by", "ann")
            results = group(flow.work.s(number, "abcde"[number % 5]) for number in range(10)).apply_async()
            assert results.get(timeout=60) == list(range(10))
            assert most_at_once(flow) == (1, 1)
            shown = {row["limit"]: row for row in json.loads(limits("--json")) if row["task"] == "flow.work"}
            assert (shown["concurrency"]["value"], shown["concurrency"]["by"]) == ("1", "ann")
            assert {use["key"] for use in shown["concurrency by tenant"]["keys"]} >= set("abcde")
    finally:
        limits("reset", "flow.work", "concurrency")


def test_calls_of_what_is_down_wait_until_one_has_succeeded(flow: Any) -> None:
    with ExitStack() as stack:
        (worker,) = workers(stack, 1, "-c", "1", "-P", "prefork")
        results = [flow.call.delay() for _ in range(8)]
        for failed in results[:2]:
            with pytest.raises(ConnectionError):
                failed.get(timeout=90)
        flow.journal.set(f"{flow.JOURNAL}-up", 1, ex=90)
        assert {result.get(timeout=90, propagate=False) for result in results[-3:]} == {"up"}
        assert "the breaker of task flow.call is closed" in worker.log
    assert flow.journal.llen(flow.JOURNAL) == 8


def test_a_killed_workers_places_are_free_and_its_unique_call_runs_again_alone(flow: Any) -> None:
    # Its last call is purged with the queue, and has the key for as long as nobody ends it.
    key = uuid.uuid4().hex
    with ExitStack() as stack:
        (first,) = workers(stack, 1, "-c", "2", "-P", "threads")
        once = flow.once.delay(key, 1.0)
        work = flow.work.delay(1, "a", 1.0)
        eventually(lambda: flow.journal.llen(flow.JOURNAL) == 2)
        first.signal(signal.SIGKILL)
        assert flow.once.delay(key).id == once.id
        workers(stack, 1, "-c", "2", "-P", "threads")
        assert flow.once.delay(key, 1.0).id == once.id
        assert (once.get(timeout=90), work.get(timeout=90)) == (key, 1)
        eventually(lambda: flow.once.delay(key).id != once.id)
    assert lines(flow).count("begin a 1") == 2
    assert lines(flow).count("end a 1") == 1

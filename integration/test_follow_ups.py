"""Follow-ups that cannot be published, and what one message may ask for: each costs itself and nothing else."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pika
import pytest

from amqtask import AmqTask, chain, chord, group
from amqtask.exceptions import PublishError
from amqtask.protocol.control import mailbox
from integration.conftest import Broker
from integration.waiting import PATIENT
from integration.workers import WorkerProcess, eventually

FLOWS = "integration.apps.flows"
POOLS = ["prefork", "threads", "solo", "eventlet", "gevent", "asyncio"]
# Options with which no broker takes a message, or none has a queue for it.
HOPELESS: dict[str, dict[str, Any]] = {
    "priority": {"priority": 300},
    "routing key": {"exchange": "amq.direct", "routing_key": "k" * 256},
    "user": {"user_id": "somebody-else"},
    "headers": {"headers": {"odd": "x" * 300_000}},
}
NOWHERE = {"exchange": "no-such-exchange", "routing_key": "k"}


class Scene:
    """A queue, its worker's application in another process, and a client."""

    def __init__(self, rabbit: Broker, folder: Path, backend: str) -> None:
        self.rabbit, self.folder, self.backend = rabbit, folder, backend
        self.queue = rabbit.queue("flows")
        self.app = AmqTask("client", broker=rabbit.url, backend=backend or None, **PATIENT)
        self.app.conf.task_default_queue = self.queue

    def worker(self, pool: str = "threads", *options: str, **environment: str) -> WorkerProcess:
        given = {"FLOWS_BACKEND": self.backend, "FLOWS_QUEUE": self.queue, "AMQTASK_BROKER_URL": self.rabbit.url}
        return WorkerProcess(FLOWS, "-P", pool, "-c", "2", *options, environment={**given, **environment})

    def mark(self, name: str, **options: Any) -> Any:
        return self.app.signature("leave_mark", (str(self.folder), name), immutable=True, **options)

    def runs(self, name: str) -> int:
        path = self.folder / name
        return len(path.read_text().split()) if path.exists() else 0


@pytest.fixture(params=["rpc://", "redis", ""], ids=["rpc", "redis", "no store"])
def scene(request: pytest.FixtureRequest, rabbit: Broker, tmp_path: Path) -> Iterator[Scene]:
    """With each kind of result store."""
    backend = request.getfixturevalue("redis_url") if request.param == "redis" else request.param
    made = Scene(rabbit, tmp_path, backend)
    yield made
    made.app.close()


@pytest.fixture
def over_rpc(rabbit: Broker, tmp_path: Path) -> Iterator[Scene]:
    """With results over rpc://."""
    made = Scene(rabbit, tmp_path, "rpc://")
    yield made
    made.app.close()


@pytest.mark.parametrize("pool", POOLS)
def test_a_task_whose_follow_ups_nobody_takes_runs_once_and_its_follow_ups_fail(over_rpc: Scene, pool: str) -> None:
    callbacks = {name: over_rpc.mark(name, **options) for name, options in HOPELESS.items()}
    follow_ups = {name: callback.freeze() for name, callback in callbacks.items()}
    with over_rpc.worker(pool) as worker:
        result = over_rpc.mark("first").apply_async(link=[*callbacks.values(), over_rpc.mark("good")])
        assert result.get(timeout=60) == "first"
        for name, follow_up in follow_ups.items():
            with pytest.raises(PublishError):
                follow_up.get(timeout=60)
            assert over_rpc.runs(name) == 0
        eventually(lambda: over_rpc.runs("good") == 1)
        assert over_rpc.mark("later").apply_async().get(timeout=60) == "later"
        assert worker.stop() == 0

    assert over_rpc.runs("first") == 1
    assert over_rpc.rabbit.count(over_rpc.queue) == over_rpc.rabbit.count(f"{over_rpc.queue}.dead") == 0


def test_a_follow_up_for_an_exchange_that_is_not_there_fails_after_a_while(over_rpc: Scene) -> None:
    callback = over_rpc.mark("nowhere", **NOWHERE)
    follow_up = callback.freeze()
    with over_rpc.worker() as worker:
        assert over_rpc.mark("first").apply_async(link=callback).get(timeout=60) == "first"
        with pytest.raises(PublishError, match="no-such-exchange"):
            follow_up.get(timeout=60)
        assert worker.stop() == 0

    assert over_rpc.runs("first") == 1


def test_what_depends_on_a_follow_up_that_nobody_takes_ends_with_it(scene: Scene) -> None:
    errback = scene.mark("errback")
    bad = scene.mark("bad", priority=300).on_error(errback)
    with scene.worker() as worker:
        steps = chain(scene.mark("one"), bad, scene.mark("three")).apply_async()
        body = chord([scene.mark("two") | scene.mark("worse", priority=300), scene.mark("four")], scene.mark("body"))
        joined = body.apply_async()
        eventually(lambda: scene.runs("errback") == 1, what="the errback was called")
        if scene.backend:
            with pytest.raises(PublishError):
                steps.get(timeout=60)
            with pytest.raises(PublishError, match="AMQP"):
                joined.get(timeout=60)
        eventually(lambda: scene.runs("four") == 1)
        assert worker.stop() == 0

    assert [scene.runs(name) for name in ("one", "two", "bad", "worse", "three", "body")] == [1, 1, 0, 0, 0, 0]
    assert scene.rabbit.count(scene.queue) == 0


def test_a_retry_that_nobody_takes_is_its_tasks_failure_and_kept_as_a_dead_letter(scene: Scene) -> None:
    with scene.worker() as worker:
        result = scene.app.signature("retries_badly", (str(scene.folder), "once")).apply_async()
        eventually(lambda: scene.rabbit.count(f"{scene.queue}.dead") == 1)
        if scene.backend:
            with pytest.raises(PublishError):
                result.get(timeout=60)
        assert worker.stop() == 0

    assert scene.runs("once") == 1
    taken = scene.rabbit.take(f"{scene.queue}.dead")
    assert taken is not None
    assert "cannot be published" in (taken[0].headers or {})["x-amqtask-reason"]


def test_a_follow_up_to_a_full_queue_waits_there_and_its_task_does_not_run_again(over_rpc: Scene) -> None:
    full = over_rpc.rabbit.queue("full")
    channel = over_rpc.rabbit.channel()
    channel.queue_declare(full, durable=True, arguments={"x-max-length": 1, "x-overflow": "reject-publish"})
    over_rpc.rabbit.publish(full, b"in the way", pika.BasicProperties())
    callback = over_rpc.mark("later", exchange="amq.direct", routing_key=full)
    channel.queue_bind(full, "amq.direct", full)
    with over_rpc.worker() as worker:
        assert over_rpc.mark("first").apply_async(link=callback).get(timeout=60) == "first"
        worker.await_log("published again until it is taken")
        assert over_rpc.rabbit.take(full) is not None
        eventually(lambda: over_rpc.rabbit.count(full) == 1, what="the follow-up is in its queue")
        assert worker.stop() == 0

    assert over_rpc.runs("first") == 1


def test_one_message_makes_no_more_queues_than_it_may(over_rpc: Scene) -> None:
    names = [over_rpc.rabbit.queue("made") for _ in range(20)]
    with over_rpc.worker() as worker:
        result = over_rpc.mark("many").apply_async(link=[over_rpc.mark(name, queue=name) for name in names])
        with pytest.raises(Exception, match="worker_max_new_queues"):
            result.get(timeout=60)
        assert over_rpc.mark("few").apply_async(link=over_rpc.mark("made", queue=names[0])).get(timeout=60) == "few"
        eventually(lambda: over_rpc.rabbit.count(names[0]) == 1)
        assert worker.stop() == 0

    assert over_rpc.runs("many") == 0
    assert [over_rpc.rabbit.exists(name) for name in names[1:]] == [False] * 19
    assert over_rpc.rabbit.count(f"{over_rpc.queue}.dead") == 1


def test_a_result_goes_to_no_mailbox_whatever_the_message_says(over_rpc: Scene) -> None:
    stamps: dict[str, Any] = {"method": "shutdown", "arguments": {}, "destination": None, "customer": "7"}
    with over_rpc.worker("threads", "-n", "target@here") as worker:
        for reply_to in (mailbox("target@here").name, over_rpc.queue, f"{over_rpc.queue}.dead"):
            sig = over_rpc.mark(f"to-{len(reply_to)}")
            sig.apply_async(reply_to=reply_to, headers={"stamped_headers": list(stamps), "stamps": stamps})
            worker.await_log(f"{reply_to!r}, is not a reply queue")
        assert over_rpc.mark("later").apply_async().get(timeout=60) == "later"
        assert worker.process.poll() is None
        assert over_rpc.app.control.ping(destination=["target@here"], timeout=30)
        assert worker.stop() == 0

    assert over_rpc.rabbit.count(f"{over_rpc.queue}.dead") == 0


@pytest.mark.parametrize("size", [0, 1, None])
@pytest.mark.parametrize("scene", ["rpc://", "redis"], ids=["rpc", "redis"], indirect=True)
def test_who_knows_a_groups_id_gets_no_values_of_its_chord(scene: Scene, size: int | None) -> None:
    header = [scene.app.signature("slow_same", (value, 0.01)) for value in range(5)]
    held = scene.app.signature("slow_same", (5, 3.0))
    thief = {
        "task": "leave_total", "args": [], "kwargs": {"folder": str(scene.folder), "name": "thief"},
        "options": {"queue": scene.queue}, **({} if size is None else {"chord_size": size}),
    }  # fmt: skip
    with scene.worker() as worker:
        result = chord([*header, held], scene.app.signature("same")).apply_async()
        for number in range(10):
            task_id = str(uuid.uuid4())
            headers = {
                "lang": "py", "task": "slow_same", "id": task_id, "group": result.parent.id, "group_index": number,
                "retries": 0, "x-amqtask-chord": result.parent.id,
            }  # fmt: skip
            properties = pika.BasicProperties("application/json", "utf-8", headers, 2, correlation_id=task_id)
            scene.rabbit.publish(scene.queue, json.dumps([[1, 0.0], {}, {"chord": thief}]).encode(), properties)
        assert result.get(timeout=60) == [0, 1, 2, 3, 4, 5]
        assert worker.stop() == 0

    assert scene.runs("thief") == 0


def test_a_group_of_more_than_all_bounds_allow_is_a_dead_letter(over_rpc: Scene) -> None:
    many = group(over_rpc.mark("never") for _ in range(30))
    with over_rpc.worker("threads", FLOWS_FOLLOW_UPS="20") as worker:
        result = (over_rpc.mark("one") | many).apply_async()
        eventually(lambda: over_rpc.rabbit.count(f"{over_rpc.queue}.dead") == 1)
        assert worker.stop() == 0

    assert over_rpc.runs("one") == over_rpc.runs("never") == 0
    assert result.results

"""`amqtask migrate` loses nothing: filters, limits, refusals, another broker, and a kill in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pika
import pytest

from amqtask import AmqTask
from amqtask.cli.main import run
from integration.conftest import Broker
from integration.faults import Forwarder
from integration.nodes import RabbitNode
from integration.waiting import PATIENT
from integration.workers import ROOT, eventually

Cli = Callable[..., Any]


@pytest.fixture
def app(rabbit: Broker) -> Iterator[AmqTask]:
    """An application on the broker."""
    made = AmqTask("migrate", broker=rabbit.url, **PATIENT, set_as_current=False)
    yield made
    made.close()


@pytest.fixture
def old(rabbit: Broker, app: AmqTask) -> str:
    """A declared queue."""
    name = rabbit.queue("old")
    app.publisher.declare(app.queues.declarations(app.queues[name]))
    return name


@pytest.fixture
def new(rabbit: Broker) -> str:
    """A queue that is not there yet."""
    return rabbit.queue("new")


@pytest.fixture
def migrate(app: AmqTask, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run `amqtask migrate -f --json …`: what it printed; it must end with the exit code `code`."""

    def ask(*argv: str, code: int = 0) -> Any:
        capsys.readouterr()
        ended = run(["migrate", "-f", "--json", *argv], app)
        said = capsys.readouterr()
        assert ended == code, said
        return json.loads(said.out)

    return ask


def fill(rabbit: Broker, queue: str, number: int, task: str = "add", **more: Any) -> list[str]:
    """So many messages; their ids in order."""
    channel = rabbit.channel()
    channel.confirm_delivery()
    ids = [str(uuid.uuid4()) for _ in range(number)]
    for task_id in ids:
        properties = pika.BasicProperties(
            content_type="application/json",
            content_encoding="utf-8",
            correlation_id=task_id,
            delivery_mode=2,
            headers={"lang": "py", "task": task, "id": task_id, **more.get("headers", {})},
            **{name: value for name, value in more.items() if name != "headers"},
        )
        channel.basic_publish("", queue, b"[[1, 2], {}, {}]", properties, mandatory=True)
    channel.close()
    return ids


def drain(rabbit: Broker, queue: str) -> list[pika.BasicProperties]:
    """Everything in the queue, taken out."""
    found = []
    while (taken := rabbit.take(queue)) is not None:
        found.append(taken[0])
    return found


def ids_in(rabbit: Broker, queue: str) -> list[str]:
    """The task ids in the queue, taken out, in their order."""
    return [properties.headers["id"] for properties in drain(rabbit, queue)]


def settled(rabbit: Broker, queue: str, number: int) -> None:
    """Wait until what stays is ready again: a quorum queue takes its time after the channel has closed."""
    eventually(lambda: rabbit.count(queue) == number, what=lambda: f"{rabbit.count(queue)} in {queue}, not {number}")


def test_messages_move_in_their_order_as_they_are(rabbit: Broker, old: str, new: str, migrate: Cli) -> None:
    dying = {
        "x-death": [{"queue": "q", "reason": "expired"}],
        "amqtask-delay-to": "",
        "CC": [],
        "mine": [1.5, {"a": True}],
    }
    ids = fill(
        rabbit,
        old,
        60,
        headers=dying,
        priority=0,
        reply_to="replies",
        expiration="600000",
        type="t",
        app_id="a",
        timestamp=5,
    )

    (way,) = migrate("-Q", f"{old}:{new}")["queues"]

    assert way == {"source": old, "destination": new, "moved": 60, "repeated": 0, "kept": 0, "failed": 0}
    assert rabbit.count(old) == 0
    assert rabbit.count(f"{new}.dead") == 0
    found = drain(rabbit, new)
    assert [properties.headers["id"] for properties in found] == ids
    first = found[0]
    assert {name for name, value in first.headers.items() if value} == {"lang", "task", "id", "mine"}
    assert first.headers["mine"] == [1.5, {"a": True}]
    assert (first.reply_to, first.expiration, first.type, first.app_id) == ("replies", "600000", "t", "a")
    assert (first.correlation_id, first.delivery_mode, first.content_type) == (ids[0], 2, "application/json")


def test_only_some_tasks_and_the_others_stay(rabbit: Broker, old: str, new: str, migrate: Cli) -> None:
    # One that stays is first, so each of the others has an acknowledgement of its own: RabbitMQ must not forget any.
    other = fill(rabbit, old, 1, task="other")
    ids = fill(rabbit, old, 150)

    (way,) = migrate("-Q", f"{old}:{new}", "-T", "add")["queues"]

    assert (way["moved"], way["kept"]) == (150, 1)
    settled(rabbit, old, 1)
    assert ids_in(rabbit, new) == ids
    assert ids_in(rabbit, old) == other


def test_no_more_than_the_limit(rabbit: Broker, old: str, new: str, migrate: Cli) -> None:
    ids = fill(rabbit, old, 40)

    assert migrate("-Q", f"{old}:{new}", "-n", "30")["queues"][0]["moved"] == 30
    assert ids_in(rabbit, new) == ids[:30]
    assert ids_in(rabbit, old) == ids[30:]


def test_a_copy_leaves_the_messages(rabbit: Broker, old: str, new: str, migrate: Cli) -> None:
    ids = fill(rabbit, old, 30)

    migrate("-Q", f"{old}:{new}", "--copy")

    settled(rabbit, old, 30)
    assert ids_in(rabbit, new) == ids
    assert sorted(ids_in(rabbit, old)) == sorted(ids)


def test_what_the_destination_refuses_stays(rabbit: Broker, old: str, new: str, migrate: Cli) -> None:
    channel = rabbit.channel()
    limits = {"x-max-length": 10, "x-overflow": "reject-publish"}
    channel.queue_declare(new, durable=True, arguments=limits)
    ids = fill(rabbit, old, 40)

    answer = migrate("-Q", f"{old}:{new}", code=1)

    moved = answer["queues"][0]["moved"]
    assert "refused" in answer["error"]
    assert rabbit.count(new) == moved >= 10
    settled(rabbit, old, 40 - moved)
    assert sorted(ids_in(rabbit, old) + ids_in(rabbit, new)) == sorted(ids)


def test_to_another_broker(rabbit: Broker, old: str, hurt_node: RabbitNode, migrate: Cli) -> None:
    ids = fill(rabbit, old, 30)

    (way,) = migrate(rabbit.url, hurt_node.url, "-Q", old)["queues"]

    there = Broker(hurt_node.url)
    assert way["moved"] == 30
    assert rabbit.count(old) == 0
    assert ids_in(there, old) == ids
    there.close()


@pytest.fixture
def delays(own_delays: Callable[[AmqTask], None], app: AmqTask) -> None:
    """Delay levels of this test's own, on both brokers."""
    own_delays(app)


@pytest.mark.usefixtures("delays")
def test_delayed_tasks_wait_for_the_rest_of_their_time_on_the_other_broker(
    rabbit: Broker, app: AmqTask, old: str, hurt_node: RabbitNode, migrate: Cli
) -> None:
    there = Broker(hurt_node.url)
    began = time.time()
    # It must not be due before it has moved, and the machine may stand still.
    soon = app.send_task("add", (1, 2), queue=old, countdown=15).id
    late = app.send_task("add", (1, 2), queue=old, countdown=3600).id
    now = app.send_task("add", (1, 2), queue=old).id

    answer = migrate(rabbit.url, hurt_node.url, "-Q", old, "--delayed")

    assert sum(way["moved"] for way in answer["queues"]) == 3
    assert ids_in(there, old) == [now]
    eventually(lambda: there.count(old) == 1, what="the delayed task never came out")
    assert time.time() - began >= 15
    assert ids_in(there, old) == [soon]
    # Back again: it waits there now, and this time only it.
    back = migrate(hurt_node.url, rabbit.url, "-Q", old, "--delayed")
    assert sum(way["moved"] for way in back["queues"]) == 1
    waiting = [name for _, name in app.delays.queue_names([0]) if rabbit.count(name)]
    (properties,) = drain(rabbit, waiting[0])
    assert properties.headers["id"] == late
    there.close()


def test_a_queue_does_not_move_onto_itself(app: AmqTask, old: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["migrate", "-f", "-Q", old], app) == 2
    assert "onto itself" in capsys.readouterr().err


def test_a_queue_that_is_not_there_stops_it_before_anything_moves(
    rabbit: Broker, app: AmqTask, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(rabbit, old, 3)

    assert run(["migrate", "-f", "-Q", f"{old}:{new},nosuchqueue:{new}"], app) == 1

    assert "nosuchqueue" in capsys.readouterr().err
    assert rabbit.count(old) == 3


def start(url: str, old: str, new: str, *more: str) -> subprocess.Popen[str]:
    """`amqtask migrate` in a process of its own."""
    command = [sys.executable, "-m", "amqtask", "-A", "integration.apps.sample", "-b", url, "migrate", "-f", "--json"]
    return subprocess.Popen(
        [*command, "-Q", f"{old}:{new}", *more],
        cwd=ROOT,
        env=os.environ.copy(),
        stdout=subprocess.PIPE,
        text=True,
    )


@contextmanager
def in_the_middle(rabbit: Broker, old: str, new: str, middle: str) -> Iterator[tuple[subprocess.Popen[str], Forwarder]]:
    """A process that waits for the confirm of this message, which its way to the broker holds back."""
    with Forwarder(rabbit.url) as way:
        way.hold_after(middle.encode())
        process = start(way.url, old, new)
        try:
            assert way.sprung.wait(90), "the message did not move"
            yield process, way
        finally:
            process.kill()
            process.communicate()


def test_killed_in_the_middle_nothing_is_lost(rabbit: Broker, old: str, new: str, migrate: Cli) -> None:
    ids = fill(rabbit, old, 1500)
    with in_the_middle(rabbit, old, new, ids[700]):
        pass
    assert 0 < rabbit.count(new) < 1500, "it was killed before or after its work"
    eventually(lambda: rabbit.count(old) + rabbit.count(new) >= 1500, what="what was on its way did not come back")

    (way,) = migrate("-Q", f"{old}:{new}")["queues"]

    found = ids_in(rabbit, new)
    assert set(found) == set(ids)
    # A batch may have been published and not yet acknowledged; it is said how many these can be.
    assert len(found) - len(ids) <= way["repeated"] <= 25
    assert rabbit.count(old) == 0


def test_terminated_in_the_middle_nothing_is_there_twice(rabbit: Broker, old: str, new: str) -> None:
    ids = fill(rabbit, old, 1500)
    with in_the_middle(rabbit, old, new, ids[700]) as (process, way):
        process.send_signal(signal.SIGTERM)
        way.heal()
        said, _ = process.communicate(timeout=90)

    answer = json.loads(said)
    assert process.returncode == 0
    assert answer["stopped"]
    assert answer["queues"][0]["moved"] == rabbit.count(new) < 1500
    assert sorted(ids_in(rabbit, old) + ids_in(rabbit, new)) == sorted(ids)


def test_for_ever_takes_what_comes_later(rabbit: Broker, old: str, new: str) -> None:
    process = start(rabbit.url, old, new, "--forever", "--timeout", "0.05")
    try:
        for number in (10, 20):
            fill(rabbit, old, 10)
            eventually(lambda number=number: rabbit.count(new) == number, what="it does not go on")  # type: ignore[misc]
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=90)
        assert json.loads(said)["queues"][0]["moved"] == 20
    finally:
        process.kill()
        process.communicate()

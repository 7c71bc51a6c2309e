"""The commands that look into the broker and change it, with RabbitMQ's own answers."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pika
import pytest

from amqtask import AmqTask, Exchange, Queue
from amqtask.cli.doctor import read_facts
from amqtask.cli.main import run
from amqtask.protocol.message import Delivery
from amqtask.services.delayed import Which, look, release
from amqtask.transport.admin import QueueAdmin
from integration.conftest import Broker
from integration.nodes import RabbitNode, free_port, rabbitmq_installed
from integration.waiting import PATIENT
from integration.workers import WorkerProcess, eventually

Cli = Callable[..., Any]
OwnDelays = Callable[[AmqTask], None]


@pytest.fixture
def queue(rabbit: Broker) -> str:
    """A queue for this test."""
    return rabbit.queue()


@pytest.fixture
def app(rabbit: Broker, queue: str) -> Iterator[AmqTask]:
    """An application with one queue."""
    made = AmqTask("tools", broker=rabbit.url, **PATIENT, task_default_queue=queue, set_as_current=False)

    @made.task(name="add")
    def add(x: int, y: int) -> int:
        return x + y

    yield made
    made.close()


@pytest.fixture
def cli(app: AmqTask, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command with that application: what it printed as JSON; it must end with the exit code `code`."""

    def ask(*argv: str, code: int = 0, app: AmqTask = app) -> Any:
        capsys.readouterr()
        ended = run([*argv, "--json"], app)
        said = capsys.readouterr()
        assert ended == code, said
        return json.loads(said.out)

    return ask


def bury(rabbit: Broker, queue: str, task: str = "add", **headers: Any) -> str:
    """A message in the queue's dead-letter queue, as a worker of ours puts it there; its id."""
    task_id = str(uuid.uuid4())
    ours = {"x-amqtask-reason": "crashed", "x-amqtask-queue": queue, "x-amqtask-attempts": 5}
    properties = pika.BasicProperties(
        content_type="application/json",
        content_encoding="utf-8",
        correlation_id=task_id,
        delivery_mode=2,
        headers={"lang": "py", "task": task, "id": task_id, "retries": 0, **ours, **headers},
    )
    rabbit.publish(f"{queue}.dead", b"[[1, 2], {}, {}]", properties)
    return task_id


def settled(rabbit: Broker, queue: str, number: int) -> None:
    """Wait until what a command looked at is ready again: a quorum queue takes its time after the channel has closed."""
    eventually(lambda: rabbit.count(queue) == number, what=lambda: f"{rabbit.count(queue)} in {queue}, not {number}")


# -- queues, purge


def test_depth_consumers_and_dead_letters(rabbit: Broker, app: AmqTask, queue: str, cli: Cli) -> None:
    for _ in range(3):
        app.send_task("add", (1, 2))
    bury(rabbit, queue)
    channel = rabbit.channel()
    channel.basic_qos(prefetch_count=1)
    channel.basic_consume(queue, lambda *_: None)
    eventually(lambda: rabbit.count(queue) == 2, what="nothing was delivered")

    row, *_ = cli("queues")

    assert (row["queue"], row["ready"], row["consumers"], row["dead"]) == (queue, 2, 1, 1)
    assert row["unacked"] is None  # AMQP does not tell


def test_delayed_tasks_are_a_line_of_their_own(rabbit: Broker, app: AmqTask, queue: str, cli: Cli) -> None:
    def delayed() -> int:
        found = [row["ready"] for row in cli("queues") if row["queue"] == "amqtask.delay.*"]
        return found[0] if found else 0

    app.send_task("add", (1, 2))
    before = delayed()
    for _ in range(3):
        app.send_task("add", (1, 2), countdown=40 * 86400)

    eventually(lambda: delayed() >= before + 3)
    assert [row["queue"] for row in cli("queues", "-Q", queue)] == [queue]
    assert cli("purge", "-f") == {"purged": {queue: 1}, "delayed": {queue: 3}}
    assert delayed() >= before + 3


def bodies_of(rabbit: Broker, name: str) -> list[bytes]:
    """The bodies of what waits in a queue, in order; they stay there."""
    channel = rabbit.channel()
    bodies = []
    while (found := channel.basic_get(name))[0] is not None:
        bodies.append(found[2])
    channel.close()
    return bodies


def test_delayed_tasks_for_the_queues_named_are_purged_and_no_others(
    rabbit: Broker, app: AmqTask, queue: str, cli: Cli, own_delays: OwnDelays
) -> None:
    own_delays(app)
    other = rabbit.queue()
    for number in range(120):
        app.send_task("add", (number, 0), countdown=40 * 86400, queue=other if number % 3 else queue)
    app.send_task("add", (1, 2), countdown=300)
    app.send_task("add", (1, 2))

    def waiting() -> dict[str, int]:
        names = [name for _, name in app.delays.queue_names(())]
        return {name: found for name in names if (found := rabbit.count(name))}

    eventually(lambda: sum(waiting().values()) == 121, what=lambda: str(waiting()))
    (far,) = [name for name, number in waiting().items() if number == 120]

    assert cli("purge", "-f", "-Q", queue) == {"purged": {queue: 1}, "delayed": {queue: 41}}
    settled(rabbit, far, 120)
    assert cli("purge", "-f", "-Q", queue, "--delayed") == {"purged": {queue: 0}, "purged_delayed": {queue: 41}}
    eventually(lambda: waiting() == {far: 80}, what=lambda: str(waiting()))

    left = [json.loads(body)[0][0] for body in bodies_of(rabbit, far)]
    assert left == [number for number in range(120) if number % 3]
    settled(rabbit, far, 80)
    assert cli("purge", "-f", "-Q", queue) == {"purged": {queue: 0}, "delayed": {queue: 0}}


def test_a_look_at_a_queue_that_is_ended_has_deleted_nothing(rabbit: Broker, app: AmqTask, queue: str) -> None:
    for number in range(40):
        app.send_task("add", (number, 0))
    eventually(lambda: rabbit.count(queue) == 40, what="not all is there")

    def ends_at_the_last(delivery: Delivery) -> bool:
        if json.loads(delivery.body)[0][0] == 39:
            raise KeyboardInterrupt
        return True

    with QueueAdmin(app.broker_addresses) as admin, pytest.raises(KeyboardInterrupt):
        admin.sift(queue, ends_at_the_last, delete=True)

    settled(rabbit, queue, 40)
    assert [json.loads(body)[0][0] for body in bodies_of(rabbit, queue)] == list(range(40))


def test_delayed_tasks_that_workers_hold_are_purged(
    rabbit: Broker, app: AmqTask, queue: str, cli: Cli, own_delays: OwnDelays
) -> None:
    own_delays(app)
    other = rabbit.queue()
    node = f"holds-{uuid.uuid4().hex[:8]}@here"
    environment = {"SAMPLE_DELAYS": app.conf.task_delay_prefix}
    for number in range(10):
        app.send_task("add", (number, 0), countdown=600, queue=other if number % 2 else queue)
    with WorkerProcess(
        "integration.apps.sample", "-P", "solo", "-Q", rabbit.queue(), "-n", node, environment=environment
    ):

        def held() -> list[str]:
            answer = app.control.ask("scheduled", {}, destination=[node], timeout=90)[node]
            return [task["request"]["delivery_info"]["routing_key"] for task in answer]

        eventually(lambda: len(held()) == 10, what=lambda: str(held()))

        assert cli("purge", "-f", "-Q", queue) == {"purged": {queue: 0}, "delayed": {queue: 5}}
        assert cli("purge", "-f", "-Q", queue, "--delayed") == {"purged": {queue: 0}, "purged_delayed": {queue: 5}}
        assert held() == [other] * 5


def test_delayed_tasks_are_sent_now_and_revoked_wherever_they_wait(
    rabbit: Broker, app: AmqTask, queue: str, own_delays: OwnDelays
) -> None:
    own_delays(app)
    near = [app.send_task("add", (n, 1), countdown=600) for n in range(3)]
    far = [app.send_task("add", (n, 1), countdown=86_400) for n in range(3)]
    which, environment = Which(queue=queue), {"SAMPLE_DELAYS": app.conf.task_delay_prefix}

    def has_come(number: int, released: Which, *, revoked: bool = False) -> None:
        # A worker that is slow to answer has done it all the same.
        eventually(lambda: rabbit.count(queue) == number or not release(app, released, revoked=revoked))
        eventually(lambda: rabbit.count(queue) == number)

    with WorkerProcess("integration.apps.sample", "-P", "solo", "-Q", rabbit.queue(), environment=environment):
        eventually(lambda: sum(task.held_by is not None for task in look(app, which).tasks) == 3)
        assert [task.id for task in look(app, which).tasks] == [result.id for result in near + far]

        has_come(1, Which(id=near[0].id))
        has_come(2, Which(id=far[0].id))
        has_come(6, which, revoked=True)
        assert look(app, which).tasks == []
    headers = [taken[0].headers for _ in range(6) if (taken := rabbit.take(queue)) is not None]
    assert {one["id"] for one in headers if not one["expires"]} == {near[0].id, far[0].id}
    assert [one["eta"] for one in headers] == [None] * 6


def test_two_looks_tell_how_fast_a_queue_grows(rabbit: Broker, app: AmqTask, queue: str, cli: Cli) -> None:
    app.send_task("add", (1, 2))

    row, *_ = cli("queues", "--interval", "0.2")

    assert (row["ready"], row["change_per_second"]) == (1, 0.0)


def test_a_queue_that_is_not_there_is_said_with_exit_code_1(cli: Cli) -> None:
    (row,) = cli("queues", "-Q", "nosuchqueue", code=1)

    assert (row["queue"], row["ready"]) == ("nosuchqueue", None)


def test_the_oldest_message_s_age_by_its_timestamp(rabbit: Broker, app: AmqTask, queue: str, cli: Cli) -> None:
    app.send_task("add", (1, 2), timestamp=1_000_000_000)

    row, *_ = cli("queues", "--oldest")

    assert row["oldest_seconds"] > 700_000_000
    assert row["ready"] == 1


def test_purge_tells_how_many_it_deleted(rabbit: Broker, app: AmqTask, queue: str, cli: Cli) -> None:
    for _ in range(3):
        app.send_task("add", (1, 2))

    assert cli("purge", "-f") == {"purged": {queue: 3}, "delayed": {queue: 0}}
    assert rabbit.count(queue) == 0


def test_purge_asks_first(rabbit: Broker, app: AmqTask, queue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    app.send_task("add", (1, 2))
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))

    assert run(["purge"], app) == 1
    assert rabbit.count(queue) == 1


# -- call, result, graph


def test_a_call_is_published_as_told(
    rabbit: Broker, app: AmqTask, queue: str, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    other = rabbit.queue()
    options = ("--queue", other, "--expires", "60", "--priority", "3", "--task-id", "my-id")

    assert cli("call", "mul", "-a", "[1, 2]", "-k", '{"z": 3}', *options) == {"id": "my-id", "task": "mul"}

    taken = rabbit.take(other)
    assert taken is not None
    properties, body = taken
    assert (properties.headers["task"], properties.headers["id"], properties.priority) == ("mul", "my-id", 3)
    assert properties.headers["expires"]
    assert json.loads(body)[:2] == [[1, 2], {"z": 3}]
    assert run(["call", "mul", "-a", "{}"], app) == 2
    assert "JSON array" in capsys.readouterr().err
    assert run(["call", "mul", "--exchange", "amq.direct", "--routing-key", "nobody"], app) == 1
    assert "nobody" in capsys.readouterr().err


def test_a_result_that_another_process_stored(
    rabbit: Broker, queue: str, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = {"SAMPLE_QUEUE": queue, "SAMPLE_BACKEND": redis_url}
    client = AmqTask(
        "client", broker=rabbit.url, backend=redis_url, **PATIENT, task_default_queue=queue, set_as_current=False
    )
    node = f"w{uuid.uuid4().hex[:8]}@here"
    with WorkerProcess("integration.apps.sample", "-P", "solo", "-n", node, environment=environment):
        good, bad = client.send_task("sample.add", (1, 2)).id, client.send_task("sample.add", (1, None)).id

        assert run(["result", good, "--wait", "60", "--json"], client) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["id"], found["state"], found["result"]) == (good, "SUCCESS", 3)
        assert run(["result", bad, "--wait", "60", "--traceback"], client) == 0
        assert "TypeError" in capsys.readouterr().out
        assert run(["graph", "workers", "-d", node, "-t", "60"], client) == 0
        assert f'"queue {queue}" -> "worker {node}' in capsys.readouterr().out
    client.close()


def test_a_drawing_of_nobody_is_an_error(app: AmqTask, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["graph", "workers", "-t", "0.1", "-d", "nobody@nowhere"], app) == 69
    assert "No nodes replied" in capsys.readouterr().err


# -- dead


def test_dead_letters_are_listed_shown_and_counted(rabbit: Broker, app: AmqTask, queue: str, cli: Cli) -> None:
    cli("topology", "declare")
    first, second = bury(rabbit, queue), bury(rabbit, queue)
    third = bury(rabbit, queue, task="mul", **{"x-amqtask-reason": "unknown task"})

    listed = cli("dead", "list")
    assert listed["queues"] == {f"{queue}.dead": 3}
    assert [(found["id"], found["reason"], found["attempts"]) for found in listed["messages"]] == [
        (first, "crashed", 5),
        (second, "crashed", 5),
        (third, "unknown task", 5),
    ]
    settled(rabbit, f"{queue}.dead", 3)
    assert [found["id"] for found in cli("dead", "list", "-t", "mul")["messages"]] == [third]
    settled(rabbit, f"{queue}.dead", 3)
    assert [(row["count"], row["reason"]) for row in cli("dead", "list", "--by-reason")["reasons"]] == [
        (2, "crashed"),
        (1, "unknown task"),
    ]
    settled(rabbit, f"{queue}.dead", 3)
    (whole,) = cli("dead", "show", third)
    assert (whole["task"], whole["body"], whole["headers"]["id"]) == ("mul", "[[1, 2], {}, {}]", third)
    settled(rabbit, f"{queue}.dead", 3)


def test_a_retried_message_is_in_its_queue_as_it_was_published(
    rabbit: Broker, app: AmqTask, queue: str, cli: Cli
) -> None:
    cli("topology", "declare")
    chosen, other = bury(rabbit, queue), bury(rabbit, queue)

    assert cli("dead", "retry", chosen)["retried"] == {f"{queue}.dead": 1}

    taken = rabbit.take(queue)
    assert taken is not None
    properties, body = taken
    assert (properties.headers["id"], body) == (chosen, b"[[1, 2], {}, {}]")
    assert not [name for name, value in properties.headers.items() if name.startswith("x-") and value]
    settled(rabbit, f"{queue}.dead", 1)
    assert [found["id"] for found in cli("dead", "list")["messages"]] == [other]
    settled(rabbit, f"{queue}.dead", 1)
    assert cli("dead", "retry", "--all")["retried"] == {f"{queue}.dead": 1}
    assert cli("dead", "retry", "no-such-id", code=1)["retried"] == {f"{queue}.dead": 0}


def test_what_the_work_queue_refuses_stays_dead(rabbit: Broker, app: AmqTask, queue: str, cli: Cli) -> None:
    cli("topology", "declare")
    bury(rabbit, queue, **{"x-amqtask-queue": "no-such-queue"})

    answer = cli("dead", "retry", "--all", code=1)

    assert "no-such-queue" in answer["error"]
    settled(rabbit, f"{queue}.dead", 1)
    assert cli("dead", "retry", "--all", "--to", queue)["retried"] == {f"{queue}.dead": 1}
    assert rabbit.count(queue) == 1


def test_an_expired_task_is_not_sent_to_be_dropped(rabbit: Broker, app: AmqTask, queue: str, cli: Cli) -> None:
    cli("topology", "declare")
    task_id = bury(rabbit, queue, expires="2020-01-01T00:00:00+00:00")

    assert cli("dead", "retry", "--all")["expired"] == [task_id]
    settled(rabbit, f"{queue}.dead", 1)
    assert cli("dead", "retry", "--all", "--drop-expiry")["retried"] == {f"{queue}.dead": 1}


def test_all_dead_letter_queues_at_once(rabbit: Broker, app: AmqTask, queue: str, cli: Cli) -> None:
    other = rabbit.queue()
    app.conf.task_routes = {"add": {"queue": other}}
    app.conf.task_queues = [Queue(queue)]
    cli("topology", "declare")
    bury(rabbit, queue)
    bury(rabbit, other)

    assert cli("dead", "list", "--all-queues")["queues"] == {f"{queue}.dead": 1, f"{other}.dead": 1}
    settled(rabbit, f"{queue}.dead", 1)
    settled(rabbit, f"{other}.dead", 1)
    assert cli("dead", "purge", "--all-queues", "-f") == {"purged": {f"{queue}.dead": 1, f"{other}.dead": 1}}
    assert rabbit.count(f"{other}.dead") == 0


STRANGE: list[dict[str, Any]] = [
    {"task": ["a", "list"], "id": {"a": "table"}, "x-death": "no deaths", "x-amqtask-queue": 5},
    {"x-death": [1, {"queue": ["q"]}], "x-amqtask-reason": b"\xff", "expires": [1]},
    {"task": "\x1b[2Jadd\nforged", "x-amqtask-reason": "\x1b]0;title\x07"},
    {"large": "x" * 130_000},
    {"x-amqtask-queue": "no-such-queue"},
]


def test_strange_messages_do_not_keep_the_others_from_being_seen_and_retried(
    rabbit: Broker, app: AmqTask, queue: str, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    cli("topology", "declare")
    good = []
    for strange in STRANGE:
        bury(rabbit, queue, **strange)
        good.append(bury(rabbit, queue))

    listed = cli("dead", "list")["messages"]
    assert len(listed) == 2 * len(STRANGE)
    assert {entry["id"] for entry in listed} >= set(good)
    settled(rabbit, f"{queue}.dead", 2 * len(STRANGE))
    assert sum(row["count"] for row in cli("dead", "list", "--by-reason")["reasons"]) == 2 * len(STRANGE)
    settled(rabbit, f"{queue}.dead", 2 * len(STRANGE))
    assert run(["dead", "list"], app) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert len(said.splitlines()) == 2 * len(STRANGE) + 1
    settled(rabbit, f"{queue}.dead", 2 * len(STRANGE))

    answer = cli("dead", "retry", "--all", code=1)

    assert answer["failed"] == 1
    assert "no-such-queue" in answer["error"]
    assert rabbit.count(queue) == 2 * len(STRANGE) - 1
    settled(rabbit, f"{queue}.dead", 1)


def test_no_dead_letter_queue_is_an_error_that_names_it(
    app: AmqTask, queue: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["dead", "list"], app) == 1
    assert f"'{queue}.dead'" in capsys.readouterr().err


def test_a_user_without_rights_is_told_so(hurt_node: RabbitNode, cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    hurt_node.ctl("add_user", "onlooker", "secret")
    hurt_node.ctl("set_permissions", "-p", "/", "onlooker", "^$", "^$", ".*")
    url = hurt_node.url.replace("guest:guest", "onlooker:secret")
    onlooker = AmqTask("onlooker", broker=url, **PATIENT, task_default_queue="unseen", set_as_current=False)
    try:
        findings = cli("topology", "declare", app=onlooker, code=1)
        # Exchanges of delays may be there from earlier tests, and are used as found.
        assert {found["status"] for found in findings if found["name"].startswith("unseen")} == {"refused"}
        assert "may not" in findings[0]["detail"]
        assert run(["-b", hurt_node.url.replace("guest:guest", "guest:wrong"), "queues"], onlooker) == 1
        assert "refused the login" in capsys.readouterr().err
    finally:
        hurt_node.ctl("delete_user", "onlooker")


# -- topology


def test_check_finds_nothing_after_declare(rabbit: Broker, app: AmqTask, queue: str, cli: Cli) -> None:
    missing = cli("topology", "check", code=1)
    assert [(found["name"], found["status"]) for found in missing[:2]] == [
        (f"{queue}.dead", "missing"),
        (queue, "missing"),
    ]

    created = cli("topology", "declare")
    assert [(found["kind"], found["name"], found["status"]) for found in created[:2]] == [
        ("queue", f"{queue}.dead", "created"),
        ("queue", queue, "created"),
    ]
    assert {"amqtask.delay.0s", "amqtask.delay.3072000s", "amqtask.delay.to"} < {found["name"] for found in created}
    assert {found["status"] for found in cli("topology", "check")} == {"ok"}
    assert {found["status"] for found in cli("topology", "declare")} == {"ok"}


def test_check_names_what_differs_and_changes_nothing(rabbit: Broker, app: AmqTask, queue: str, cli: Cli) -> None:
    channel = rabbit.channel()
    channel.queue_declare(queue, durable=True, arguments={"x-max-length": 1000})

    by_name = {found["name"]: found for found in cli("topology", "check", code=1)}

    assert by_name[queue]["status"] == "differs"
    assert "wanted" in by_name[queue]["detail"]
    assert by_name[f"{queue}.dead"]["status"] == "missing"
    assert cli("topology", "check", code=1) == list(by_name.values())  # nothing was made meanwhile


# -- with the management plugin


@pytest.fixture(scope="module")
def managed() -> Iterator[tuple[RabbitNode, str]]:
    """A node with the management plugin, and the plugin's URL."""
    if not rabbitmq_installed():
        pytest.skip("rabbitmq-server is not installed")
    node, port = RabbitNode("managed"), free_port()
    (node.folder / "plugins").write_text("[rabbitmq_management].\n")
    node.configure(f"management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {port}")
    try:
        yield node.start(), f"http://127.0.0.1:{port}"
    finally:
        node.remove()


@pytest.fixture
def elsewhere(managed: tuple[RabbitNode, str]) -> Iterator[AmqTask]:
    """An application on the node with the plugin, with a topic exchange."""
    made = AmqTask("managed", broker=managed[0].url, **PATIENT, set_as_current=False)
    media = Exchange("media", type="topic")
    made.conf.task_queues = [Queue("images", exchange=media, routing_key="image.*")]
    yield made
    made.close()


def test_the_management_plugin_tells_bindings_too(
    managed: tuple[RabbitNode, str], elsewhere: AmqTask, cli: Cli
) -> None:
    _, api = managed
    cli("topology", "declare", app=elsewhere)
    assert {found["status"] for found in cli("topology", "check", "--api", api, app=elsewhere)} == {"ok"}

    media = Exchange("media", type="topic")
    elsewhere.conf.task_queues = [
        Queue("images", exchange=media, routing_key="other.*", arguments=(("x-max-length", 7),))
    ]

    found = {entry["kind"]: entry for entry in cli("topology", "check", "--api", api, app=elsewhere, code=1)[2:4]}
    assert found["binding"]["status"] == "missing"
    assert found["queue"]["detail"] == "x-max-length is not set, wanted 7"


def test_the_management_plugin_tells_what_is_unacknowledged(
    managed: tuple[RabbitNode, str], elsewhere: AmqTask, cli: Cli
) -> None:
    _, api = managed
    elsewhere.send_task("resize", queue="images")
    seen = Broker(managed[0].url)
    channel = seen.channel()
    assert channel.basic_get("images")[0] is not None

    def unacked() -> Any:
        (row,) = cli("queues", "-Q", "images", "--api", api, app=elsewhere)
        return row["unacked"]

    # The plugin's figures are some seconds old.
    eventually(lambda: unacked() == 1, every=0.5, what="the plugin never counted the message")
    seen.close()


def test_a_refused_login_to_the_plugin_is_named(
    managed: tuple[RabbitNode, str], elsewhere: AmqTask, capsys: pytest.CaptureFixture[str]
) -> None:
    url = managed[1].replace("http://", "http://guest:wrong@")

    assert run(["topology", "check", "--api", url], elsewhere) == 1
    assert "401" in capsys.readouterr().err


def test_no_plugin_there_is_named(rabbit: Broker, app: AmqTask, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["queues", "--api", f"http://127.0.0.1:{free_port()}"], app) == 1
    assert "rabbitmq-plugins enable" in capsys.readouterr().err


@pytest.fixture
def ill(managed: tuple[RabbitNode, str]) -> Iterator[tuple[AmqTask, Callable[[], list[str]]]]:
    """An application on the node with the plugin, and what the doctor says of both that matters."""
    node, api = managed
    made = AmqTask("ill", broker=node.url, **PATIENT, task_default_queue="ill", set_as_current=False)
    made.task(name="bill")(lambda: None)

    def examined() -> list[str]:
        found = subprocess.run(
            [sys.executable, "-m", "amqtask", "-A", "integration.apps.sample", "doctor", "--api", api, "--json"],
            env={**os.environ, "AMQTASK_BROKER_URL": made.broker.urls[0], "SAMPLE_QUEUE": "ill"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        findings = json.loads(found.stdout)
        assert found.returncode == int(any(one["severity"] == "error" for one in findings))
        return [f"{one['severity']} {one['subject']} {one['what']}" for one in findings if one["severity"] != "info"]

    yield made, examined
    made.close()


def test_the_doctor_finds_what_was_put_there_and_nothing_before(
    managed: tuple[RabbitNode, str], ill: tuple[AmqTask, Callable[[], list[str]]]
) -> None:
    node, _ = managed
    app, examined = ill
    app.publisher.declare([app.queues["ill"]])
    assert examined() == []

    app.send_task("bill")
    app.send_task("bill", queue="ill.dead")
    node.ctl("set_policy", "shortens", "^ill$", '{"message-ttl": 3600000}', "--apply-to", "queues")
    node.ctl("set_policy", "drops", "^ill.dead$", '{"max-length": 1000}', "--apply-to", "queues")
    expected = {
        "error policy shortens sets message-ttl = 3600000 on ill",
        "error policy drops limits the length of ill.dead and drops the oldest",
        "warning queue ill has 1 message and no consumer",
        "warning queue ill.dead has 1 dead letter",
    }
    eventually(lambda: set(examined()) == expected, what="four findings")
    for name in ("shortens", "drops"):
        node.ctl("clear_policy", name)

    with app.broker.admin() as admin:
        admin.delete("ill")
        admin.delete("ill.dead")
    with contextlib.closing(pika.BlockingConnection(pika.URLParameters(node.url))) as connection:
        connection.channel().queue_declare("ill", durable=True)
    assert [line for line in examined() if line.startswith("error queue ill")] != []


def test_the_doctor_finds_exchanges_that_are_not_there_and_a_host_that_refuses(rabbit: Broker, queue: str) -> None:
    other = rabbit.url.replace("guest:guest", "guest:wrong")
    quarantine = Queue(queue, queue_arguments={"x-dead-letter-exchange": f"{queue}.nowhere"})
    app = AmqTask("ill", broker=[rabbit.url, other], task_queues=[quarantine], set_as_current=False)
    app.task(name="bill")(lambda: None)

    facts, failed = read_facts(app, None)
    app.close()

    assert facts.missing_exchanges == {f"{queue}.nowhere": [f"queue {queue}"]}
    assert [(finding.severity, finding.subject.partition(" ")[0]) for finding in failed] == [("warning", "broker")]
    assert "refused the login" in failed[0].what


def test_the_doctor_says_which_rights_are_missing(
    managed: tuple[RabbitNode, str], ill: tuple[AmqTask, Callable[[], list[str]]]
) -> None:
    node, _ = managed
    app, examined = ill
    node.ctl("add_user", "narrow", "secret")
    node.ctl("set_user_tags", "narrow", "administrator")
    node.ctl("set_permissions", "narrow", "^$", "^other$", ".*")
    app.conf.broker_url = node.url.replace("guest:guest", "narrow:secret")

    lines = examined()
    assert any(line.startswith("error user narrow may not write 'amq.default'") for line in lines), lines

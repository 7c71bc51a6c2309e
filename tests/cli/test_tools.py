"""The commands that look at queues and messages, as far as they go without a broker."""

from __future__ import annotations

import json
import re
from datetime import datetime, timezone
from typing import Any

import pytest

from amqtask import AmqTask, Exchange, Queue
from amqtask.cli.base import print_json, print_table
from amqtask.cli.dead import line_of
from amqtask.cli.main import COMMANDS, run
from amqtask.cli.migrate import open_told
from amqtask.cli.queues import age
from amqtask.exceptions import ConfigurationError
from amqtask.protocol.message import Delivery, Properties
from amqtask.services.rerunning import as_entry, back_to_work, has_expired, reason, work_queue_of
from amqtask.transport.inventory import ManagementApi
from amqtask.transport.url import BrokerAddress


def make_app(broker: str = "amqp://nowhere//", **settings: Any) -> AmqTask:
    return AmqTask("tools", broker=broker, set_as_current=False, **settings)


def act() -> None:
    """A task's function."""


def dead_letter(headers: dict[str, Any], **properties: Any) -> Delivery:
    """A message in `work.dead`."""
    found = Properties(content_type="application/json", headers=headers, correlation_id="1", **properties)
    return Delivery(b"[[], {}, {}]", found, "", "work.dead", False, "work.dead", 1, 0)


BROKERLESS = [
    ["purge", "-f"],
    ["queues"],
    ["dead", "list"],
    ["dead", "retry", "--all"],
    ["topology", "declare"],
    ["topology", "check"],
    ["topology", "check", "--api", "http://localhost:15672"],
    ["call", "add"],
]


@pytest.mark.parametrize("argv", BROKERLESS, ids=" ".join)
def test_the_in_memory_broker_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(argv, make_app("memory://")) == 1

    assert "memory://" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["tools.ad"], "no task 'tools.ad' is registered. Did you mean 'tools.add'?"),
        (["tools.add", "-a", "[1]"], "task tools.add cannot be called like that: missing a required argument: 'y'"),
        (["tools.add", "-k", '{"z": 1}'], "task tools.add cannot be called like that"),
    ],
)
def test_a_call_that_the_application_knows_to_be_wrong_is_not_sent(
    argv: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    app = make_app()

    @app.task(name="tools.add")
    def add(x: int, y: int) -> int:
        return x + y

    assert run(["call", *argv], app) == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_a_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"], make_app()) == 0

    assert f"Usage: amqtask {name}" in capsys.readouterr().out


def test_the_plan_names_exchanges_queues_bindings_and_delays(capsys: pytest.CaptureFixture[str]) -> None:
    app = make_app(
        task_queues=[Queue("images", exchange=Exchange("media", type="topic"), routing_key="image.*")],
        task_routes={"reports.*": {"queue": "reports"}},
        task_default_queue="images",
    )
    app.task(name="reports.monthly")(act)

    assert run(["topology", "show", "--json"], app) == 0

    plan = json.loads(capsys.readouterr().out)
    assert [(found["name"], found["type"]) for found in plan["exchanges"]] == [("media", "topic")]
    assert [(found["name"], found["role"]) for found in plan["queues"]] == [
        ("images.dead", "dead-letter"),
        ("images", "work"),
        ("reports.dead", "dead-letter"),
        ("reports", "work"),
    ]
    assert plan["queues"][1]["arguments"]["x-delivery-limit"] == 20
    assert [(found["source"], found["destination"], found["routing_key"]) for found in plan["bindings"]] == [
        ("media", "images", "image.*")
    ]
    delays = plan["delays"]
    assert delays["prefix"] == "amqtask.delay"
    assert {(found["name"], found["role"]) for found in delays["queues"]} > {("amqtask.delay.0s", "delay")}
    assert ("amqtask.delay.out", "media") in {(found["source"], found["destination"]) for found in delays["bindings"]}


def test_the_plan_as_objects_of_the_topology_operator(capsys: pytest.CaptureFixture[str]) -> None:
    app = make_app(
        "amqp://user:secret@nowhere/shop",
        task_queues=[Queue("Images_1", exchange=Exchange("media", type="topic"), routing_key="image.*")],
        task_default_queue="Images_1",
    )

    assert run(["topology", "show", "--kubernetes", "rabbit"], app) == 0

    shown = capsys.readouterr().out
    plan = json.loads(shown)
    objects = {(found["kind"], found["spec"].get("name")): found for found in plan["items"]}
    queue = objects["Queue", "Images_1"]
    assert queue["apiVersion"] == "rabbitmq.com/v1beta1"
    assert queue["metadata"]["name"].startswith("images-1-")
    assert queue["spec"]["vhost"] == "shop"
    assert queue["spec"]["rabbitmqClusterReference"] == {"name": "rabbit"}
    assert (queue["spec"]["type"], queue["spec"]["durable"], queue["spec"]["autoDelete"]) == ("quorum", True, False)
    assert queue["spec"]["arguments"]["x-delivery-limit"] > 0
    assert "x-queue-type" not in queue["spec"]["arguments"]
    assert objects["Exchange", "media"]["spec"]["type"] == "topic"
    assert ("Queue", "amqtask.delay.0s") in objects
    bindings = [found["spec"] for found in plan["items"] if found["kind"] == "Binding"]
    assert {
        "source": "media",
        "destination": "Images_1",
        "destinationType": "queue",
        "routingKey": "image.*",
    }.items() <= (bindings[0].items())
    names = [(found["kind"], found["metadata"]["name"]) for found in plan["items"]]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", name) and len(name) < 254 for _, name in names)
    assert "secret" not in shown


def test_objects_of_the_operator_are_for_rabbitmq(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["topology", "show", "--kubernetes", "rabbit"], make_app("redis://nowhere")) != 0

    assert "RabbitMQ" in capsys.readouterr().err


def test_the_plan_for_people_names_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["topology", "show", "-Q", "cma_queue"], make_app()) == 0

    shown = capsys.readouterr().out
    assert "  cma_queue.dead  dead letters" in shown
    assert "      x-queue-type = 'quorum'" in shown
    assert "amqtask.delay.0s amqtask.delay.4s" in shown


def test_a_route_that_needs_arguments_is_said_not_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    def by_customer(name: str, args: Any, kwargs: Any, options: Any, task: Any = None, **_: Any) -> str:
        return f"customer-{args[0]}"

    app = make_app(task_routes=[by_customer])
    app.task(name="bill")(act)

    assert run(["topology", "show", "--json"], app) == 0

    answer = capsys.readouterr()
    assert "bill" in answer.err
    assert [found["name"] for found in json.loads(answer.out)["queues"]] == ["amqtask.dead", "amqtask"]


def test_why_a_message_died() -> None:
    assert reason({"x-amqtask-reason": "unknown task"}) == "unknown task"
    assert reason({"x-death": [{"reason": "delivery_limit", "queue": "work", "count": 1}]}) == (
        "delivery_limit in work (1×)"
    )
    assert reason({}) == "unknown"


@pytest.mark.parametrize(
    ("headers", "told", "shown"),
    [
        ({"x-amqtask-died-at": "2026-11-29T06:00:00+00:00"}, "2026-11-29T06:00:00+00:00", "2026-11-29 "),
        ({"x-death": [{"time": datetime(2026, 11, 29, 12, tzinfo=timezone.utc)}]}, "2026-11-29T12:00:00+00:00", "2026-11-29 "),
        ({"x-amqtask-died-at": "0001-01-01T00:00:00+14:00"}, "0001-01-01T00:00:00+14:00", "-  "),
        ({"x-amqtask-died-at": True}, "True", "-  "),
        ({}, None, "-  "),
    ],
)  # fmt: skip
def test_when_a_message_died(headers: dict[str, Any], told: str | None, shown: str) -> None:
    entry = as_entry(dead_letter({"task": "add", "id": "1", **headers}))

    assert entry["died_at"] == told
    assert line_of(entry).startswith(shown)


def test_a_retried_message_carries_nothing_of_its_death() -> None:
    delivery = dead_letter(
        {
            "task": "add",
            "id": "1",
            "retries": 2,
            "origin": "gen1@host",
            "x-amqtask-reason": "crash",
            "x-amqtask-queue": "work",
            "x-amqtask-attempts": 5,
            "x-death": [{"queue": "work"}],
            "x-first-death-queue": "work",
            "x-delivery-count": 7,
            "amqtask-delay-0": "3",
            "CC": ["elsewhere"],
        },
        priority=3,
        reply_to="replies",
        expiration="1000",
        user_id="guest",
    )

    message = back_to_work(delivery, work_queue_of(delivery, ".dead"))

    assert (message.exchange, message.routing_key, message.body) == ("", "work", b"[[], {}, {}]")
    assert message.properties.headers == {"task": "add", "id": "1", "retries": 2, "origin": "gen1@host"}
    assert (message.properties.priority, message.properties.reply_to) == (3, "replies")
    assert (message.properties.correlation_id, message.properties.delivery_mode) == ("1", 2)
    assert message.properties.expiration is None
    assert message.properties.user_id is None


@pytest.mark.parametrize(
    ("headers", "queue"),
    [
        ({"x-amqtask-queue": "told"}, "told"),
        ({"x-amqtask-queue": "w@h.celery.pidbox"}, "work"),
        ({"x-amqtask-queue": "amqtask.cancel"}, "work"),
        ({"x-amqtask-queue": "amqtask.beat.shop"}, "work"),
        ({"x-amqtask-queue": "7c1fd0b6-2d3d-4e0b-a7a5-7f4b6a6a1c11"}, "work"),
        ({"x-death": [{"queue": "w@h.celery.pidbox"}]}, "work"),
        ({"x-death": [{"queue": "died-in"}, {"queue": "earlier"}]}, "died-in"),
        ({}, "work"),
    ],
)
def test_where_a_message_died(headers: dict[str, Any], queue: str) -> None:
    assert work_queue_of(dead_letter(headers), ".dead") == queue


def test_expired_messages_are_known_and_can_live_on() -> None:
    past, future = "2026-01-01T00:00:00Z", "2026-01-01T00:00:20+00:00"
    now = datetime(2026, 1, 1, 0, 0, 10, tzinfo=timezone.utc).timestamp()

    assert has_expired({"expires": past}, now)
    assert not has_expired({"expires": future}, now)
    assert not has_expired({"expires": None}, now)
    revived = back_to_work(dead_letter({"expires": past}), "work", without_expiry=True)
    assert revived.properties.headers == {"expires": None}


def test_age_by_the_message_s_timestamp() -> None:
    assert age(100, {}, 130.0) == 30.0
    assert age(datetime.fromtimestamp(100, timezone.utc), {}, 130.0) == 30.0
    assert age(100, {"timestamp_in_ms": 100_500}, 130.0) == 29.5
    assert age(None, {}, 130.0) is None
    assert age(140, {}, 130.0) == 0.0


def test_a_table_has_columns_as_wide_as_their_cells(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["QUEUE", "READY"], [["images", 12], ["a", None]])

    assert capsys.readouterr().out.splitlines() == ["QUEUE   READY", "images     12", "a           -"]


def test_json_has_a_form_for_everything(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"body": b"abc", "at": datetime(2026, 1, 1, tzinfo=timezone.utc), "odd": {1}})

    assert json.loads(capsys.readouterr().out) == {"body": "abc", "at": "2026-01-01T00:00:00+00:00", "odd": "{1}"}


@pytest.mark.parametrize("url", ["localhost:15672", "amqp://localhost", "http://"])
def test_a_wrong_management_url_is_named(url: str) -> None:
    with pytest.raises(ConfigurationError, match="--api"):
        ManagementApi(url, BrokerAddress())


def test_a_management_url_is_shown_without_its_password() -> None:
    assert ManagementApi("https://me:secret@box:15671/rabbit/", BrokerAddress()).safe_url == "https://box:15671/rabbit"


def test_a_result_over_rpc_cannot_be_looked_up_by_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["result", "1"], make_app(result_backend="rpc://")) == 1
    assert "rpc://" in capsys.readouterr().err


def test_a_result_is_printed_or_its_state_told(capsys: pytest.CaptureFixture[str]) -> None:
    app = make_app(result_backend="cache+memory://")

    assert run(["result", "1"], app) == 1
    assert "PENDING" in capsys.readouterr().err
    assert run(["result", "1", "--json"], app) == 1
    assert json.loads(capsys.readouterr().out)["state"] == "PENDING"


def test_a_report_as_json_has_no_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    app = make_app("amqp://me:secret@box//", result_backend="redis://:secret@box/0")

    assert run(["report", "--json"], app) == 0

    text = capsys.readouterr().out
    report = json.loads(text)
    assert report["broker"] == "amqp://me:**@box:5672//"
    assert report["packages"]["pika"]
    assert "secret" not in text


@pytest.mark.parametrize(
    ("url", "setting", "has_tls"),
    [
        ("redis://h:1/0", True, False),
        ("rediss://h:1/0", None, True),
        ("sentinel://h:1/0", True, True),
        ("sentinel://h:1/0", None, False),
    ],
)
def test_brokers_that_migrate_is_told_have_tls_where_their_url_or_the_settings_say_so(
    url: str, setting: bool | None, has_tls: bool
) -> None:
    settings: dict[str, Any] = {"broker_use_ssl": setting, "broker_transport_options": {"master_name": "m"}}
    app = AmqTask("moves", broker="memory://", set_as_current=False, **settings)

    assert open_told(app, url).info()["ssl"] is has_tls

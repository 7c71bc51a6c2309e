"""Remote control: Celery's commands in, Celery's replies out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from amqtask.clock import LamportClock
from amqtask.entities import Queue
from amqtask.message import Delivery
from amqtask.protocol.control import Command, command_message
from amqtask.services.autoscale import Autoscale
from amqtask.services.commands import Control, masked
from amqtask.services.events import EventSender
from amqtask.services.panel import Panel
from tests.worker.bench import Bench
from tests.worker.fakes import HandPublisher, ToldConsumer

ACCEPT = frozenset({"application/json"})


class Remote:
    """A worker, its panel, and the caller's end."""

    def __init__(self, *, slots: int = 2, autoscale: bool = False) -> None:
        self.bench = Bench(slots=slots)
        self.publisher = HandPublisher()
        self.consumers: list[ToldConsumer] = []
        worker, orders = self.bench.worker, self.bench.orders
        self.told = HandPublisher()
        clock = LamportClock()
        control = Control(
            worker=worker,
            orders=orders,
            autoscale=Autoscale(worker, orders, most=4, least=1) if autoscale else None,
            settings=lambda with_defaults: {"broker_url": "amqp://u:secret@h//", "result_expires": 60},
            make_queue=lambda arguments: (Queue(str(arguments["queue"])), None),
            broker_info={"url": "amqp://h"},
            events=EventSender(
                worker,
                clock=clock,
                make_publisher=lambda: self.told,
                exchange="celeryev",
                serializer="json",
                task_events=False,
            ),
            lamport=clock,
        )
        self.panel = Panel(
            control,
            loop=self.bench.loop,
            make_consumer=self.make_consumer,
            make_publisher=lambda: self.publisher,
            accept=ACCEPT,
            wall_clock=lambda: 1000.0,
        )
        self.panel.start()

    def make_consumer(self, listener: Any) -> ToldConsumer:
        self.consumers.append(ToldConsumer())
        return self.consumers[-1]

    def tell(self, command: Command, body: bytes | None = None) -> list[Any]:
        """Deliver a command; the payloads of the replies to it."""
        before = len(self.publisher.sent)
        message = command_message(command)
        self.panel.on_delivery(
            Delivery(body or message.body, message.properties, message.exchange, "", False, "mailbox", 1, 1)
        )
        self.bench.loop.turn()
        replies = [json.loads(reply.body) for reply in self.publisher.sent[before:]]
        return [reply["w@h"] for reply in replies]

    def ask(self, method: str, **arguments: Any) -> Any:
        (payload,) = self.tell(Command(method, arguments, ticket="t", reply_key="caller"))
        return payload


def test_ping_is_answered_to_the_callers_own_queue() -> None:
    remote = Remote()

    assert remote.ask("ping") == {"ok": "pong"}
    (reply,) = remote.publisher.sent
    assert (reply.exchange, reply.routing_key) == ("reply.celery.pidbox", "caller")
    assert reply.properties.headers["ticket"] == "t"


@pytest.mark.parametrize(
    "command",
    [
        Command("ping"),
        Command("ping", ticket="t", destination=("other@h",)),
        Command("ping", ticket="t", pattern="other*"),
        Command("ping", ticket="t", expires=999.0),
    ],
)
def test_no_reply_when_none_is_wanted_or_another_is_meant_or_it_is_too_late(command: Command) -> None:
    assert Remote().tell(command) == []


@pytest.mark.parametrize("destination", [("w@h",), ("other@h", "w@h")])
def test_a_command_for_this_node_is_answered(destination: tuple[str, ...]) -> None:
    assert Remote().tell(Command("ping", ticket="t", destination=destination)) == [{"ok": "pong"}]


def test_what_runs_and_what_waits_is_told() -> None:
    remote = Remote(slots=1)
    remote.bench.deliver("a", "b", argsrepr="(1,)")

    (active,), (reserved,) = remote.ask("active"), remote.ask("reserved")

    assert (active["id"], active["name"], active["args"]) == ("a", "t", "(1,)")
    assert reserved["id"] == "b"
    assert remote.ask("scheduled") == []
    found = remote.ask("query_task", ids=["a", "b", "c"])
    assert {task_id: state for task_id, (state, _) in found.items()} == {"a": "active", "b": "reserved"}


def test_stats_count_what_ran() -> None:
    remote = Remote()
    remote.bench.deliver("a", "b")
    remote.bench.end("a")

    stats = remote.ask("stats")

    assert stats["total"] == {"t": 1}
    assert stats["pool"]["max-concurrency"] == 2
    assert stats["prefetch_count"] == 2


def test_registered_tasks_and_active_queues() -> None:
    remote = Remote()

    assert remote.ask("registered") == ["early", "t"]
    assert [queue["name"] for queue in remote.ask("active_queues")] == ["q"]


def test_the_configuration_is_told_without_its_passwords() -> None:
    assert Remote().ask("conf") == {"broker_url": "amqp://u:********@h//", "result_expires": 60}


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("redis_password", "x", "********"),
        ("security_key", "x", "********"),
        ("broker_url", ["amqp://u:p@a//", "amqp://b"], ["amqp://u:********@a//", "amqp://b"]),
        ("broker_transport_options", {"client_secret": "x", "n": 1}, {"client_secret": "********", "n": 1}),
        ("result_expires", 60, 60),
        ("result_backend", None, None),
    ],
)
def test_secrets_are_starred_out(name: str, value: Any, shown: Any) -> None:
    assert masked(name, value) == shown


def test_revoke_flags_one_or_many_ids() -> None:
    remote = Remote()
    assert "a" in remote.ask("revoke", task_id="a")["ok"]
    remote.ask("revoke", task_id=["b", "c"])

    assert remote.ask("revoked") == ["a", "b", "c"]
    remote.bench.deliver("a", "d")
    assert remote.bench.started == ["d"]


def test_hello_exchanges_revoked_ids() -> None:
    remote = Remote()
    remote.ask("revoke", task_id="a")

    answer = remote.ask("hello", from_node="other@h", revoked={"b": 5.0})

    assert set(answer["revoked"]) >= {"a"}
    assert remote.tell(Command("hello", {"from_node": "w@h"}, ticket="t")) == []


def test_rate_limits_and_time_limits_are_set_or_refused() -> None:
    remote = Remote()

    assert "ok" in remote.ask("rate_limit", task_name="t", rate_limit="1/m")
    assert "error" in remote.ask("rate_limit", task_name="nobody", rate_limit="1/m")
    assert "error" in remote.ask("rate_limit", task_name="t", rate_limit="often")
    assert "no hard time limits" in remote.ask("time_limit", task_name="t", hard=5.0)["error"]


def test_the_pool_grows_and_shrinks_but_keeps_one_slot() -> None:
    remote = Remote(slots=2)
    assert remote.ask("pool_grow", n=3) == {"ok": "pool will grow"}
    assert remote.bench.pool.slots == 5

    remote.ask("pool_shrink", n=99)

    assert remote.bench.pool.slots == 1


def test_autoscale_bounds_are_changed_where_it_is_on() -> None:
    assert "error" in Remote().ask("autoscale", max=9)
    assert Remote(autoscale=True).ask("autoscale", max=9, min=2) == {"ok": "autoscale now max=9 min=2"}


def test_queues_are_added_and_cancelled() -> None:
    remote = Remote()
    assert remote.ask("add_consumer", queue="more") == {"ok": "add consumer more"}
    assert remote.bench.consumer.windows["more"] == 2
    assert [queue["name"] for queue in remote.ask("active_queues")] == ["q", "more"]

    assert remote.ask("cancel_consumer", queue="more") == {"ok": "no longer consuming from more"}

    assert [queue["name"] for queue in remote.ask("active_queues")] == ["q"]
    assert "was not consuming" in remote.ask("cancel_consumer", queue="never")["ok"]
    remote.ask("add_consumer", queue="more")
    assert [queue["name"] for queue in remote.ask("active_queues")] == ["q", "more"]


def test_shutdown_is_warm_and_says_nothing() -> None:
    remote = Remote()

    assert remote.tell(Command("shutdown", ticket="t")) == []
    assert remote.bench.loop.stopped
    assert remote.bench.worker.lifecycle.shutdown.exit_code == 0


def test_task_events_are_switched_on_and_off() -> None:
    remote = Remote()

    assert remote.ask("enable_events") == {"ok": "task events enabled"}
    assert remote.ask("enable_events") == {"ok": "task events already enabled"}
    remote.bench.deliver("a")
    remote.bench.loop.advance(1.0)
    assert [event["type"] for event in json.loads(remote.told.sent[0].body)] == ["task-received", "task-started"]
    assert remote.ask("disable_events") == {"ok": "task events disabled"}
    assert remote.ask("disable_events") == {"ok": "task events already disabled"}
    remote.bench.deliver("b")
    remote.bench.loop.advance(1.0)
    assert len(remote.told.sent) == 1


def test_a_heartbeat_comes_when_asked_for_and_nothing_is_replied() -> None:
    remote = Remote()

    assert remote.tell(Command("heartbeat", ticket="t")) == []
    (beat,) = (json.loads(message.body) for message in remote.told.sent)
    assert (beat["type"], beat["hostname"], beat["freq"]) == ("worker-heartbeat", "w@h", 5)


def test_commands_and_events_share_one_clock() -> None:
    remote = Remote()
    message = command_message(Command("heartbeat"), clock=41)

    remote.panel.on_delivery(Delivery(message.body, message.properties, "", "", False, "mailbox", 1, 1))

    (beat,) = (json.loads(message.body) for message in remote.told.sent)
    assert beat["clock"] == 43
    assert remote.ask("clock")["clock"] > 43


def test_an_unknown_command_or_bad_arguments_get_an_error_and_do_no_harm() -> None:
    remote = Remote()

    assert "no such command" in remote.ask("make_coffee")["error"]
    assert "error" in remote.ask("pool_grow", n="many")
    assert remote.tell(Command("ping"), body=b"\xff") == []
    assert remote.ask("ping") == {"ok": "pong"}


def test_a_second_worker_of_the_same_name_is_warned_once_and_tries_again(caplog: pytest.LogCaptureFixture) -> None:
    remote = Remote()
    remote.panel.on_fatal(RuntimeError("RESOURCE_LOCKED"))
    remote.bench.loop.advance(31.0)
    remote.panel.on_fatal(RuntimeError("RESOURCE_LOCKED"))
    remote.bench.loop.advance(31.0)

    assert caplog.text.count("another worker named w@h is running") == 1
    assert len(remote.consumers) == 3
    remote.panel.stop()
    remote.bench.loop.advance(100.0)
    assert len(remote.consumers) == 3

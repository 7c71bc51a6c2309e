"""A worker that starts asks its neighbours what was revoked, and begins nothing before they had the time to say it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.exceptions import AccessRefused, PublishError, Unroutable
from amqtask.protocol.control import Command, control_exchange, read_command, reply_message
from amqtask.protocol.message import Delivery, Message, Properties
from amqtask.testing.worker import start_worker
from tests.services.test_panel import ACCEPT, Remote


class Starting(Remote):
    """A worker that has just started, and its neighbours."""

    def __init__(self, *, has_looked: bool = True) -> None:
        super().__init__(mingles=True)
        if has_looked:
            self.finds(None)

    @property
    def asked(self) -> list[Command]:
        """The hellos that it sent."""
        to_all = [self.read(message) for message in self.publisher.sent if message.exchange == "celery.pidbox"]
        return [command for command in to_all if command.method == "hello"]

    def finds(self, error: PublishError | None) -> None:
        """The broker has passed on what it sent to see whether anybody is there (None), or says why it has not."""
        self.publisher.confirm(error)
        self.bench.loop.turn()

    def read(self, message: Message) -> Command:
        properties = message.properties
        return read_command(
            message.body, properties.content_type, properties.content_encoding, properties.headers, ACCEPT
        )

    def consumes(self) -> Command:
        """The broker says that mailbox and queue for answers are consumed."""
        self.panel.on_consuming(1)
        return self.asked[-1]

    def hear(self, hello: Command) -> None:
        """Its own hello comes round."""
        self.tell(hello)

    def answer(self, hello: Command, nodename: str = "other@h", **payload: Any) -> None:
        """A neighbour answers."""
        reply = reply_message(hello, nodename, payload)
        self.panel.on_delivery(Delivery(reply.body, reply.properties, reply.exchange, "", False, self.replies, 1, 1))
        self.bench.loop.turn()

    @property
    def replies(self) -> str:
        (name,) = [name for name in self.consumers[-1].windows if ".reply." in name]
        return name


def test_a_worker_that_is_ready_takes_commands() -> None:
    app = AmqTask("ready", broker="memory://", set_as_current=False)

    with start_worker(app, hostname="ready@here"):
        assert app.control.ping(timeout=20, limit=1) == [{"ready@here": {"ok": "pong"}}]


def test_tasks_wait_for_the_neighbours_answers() -> None:
    worker = Starting()
    worker.bench.deliver("a", "b")
    hello = worker.consumes()

    worker.hear(hello)
    worker.bench.loop.advance(0.02)
    worker.answer(hello, revoked=["a"], clock=40)
    worker.bench.loop.advance(0.02)
    assert worker.bench.started == []
    worker.bench.loop.advance(0.02)

    assert worker.bench.started == ["b"]
    assert worker.ask("revoked") == ["a"]
    assert worker.ask("clock")["clock"] > 40


def test_a_worker_without_neighbours_begins_at_once_and_asks_all_the_same() -> None:
    worker = Starting(has_looked=False)
    worker.bench.deliver("a")
    assert (worker.bench.started, worker.consumers) == ([], [])

    worker.finds(Unroutable("no queue"))
    assert worker.bench.started == ["a"]

    hello = worker.consumes()  # of one that started in the same moment
    worker.answer(hello, revoked=["b"])
    worker.bench.deliver("b", "c")
    worker.bench.end("a")
    assert worker.bench.started == ["a", "c"]


def test_the_look_for_neighbours_comes_back_when_there_are_none_and_is_for_none_of_them() -> None:
    worker = Starting(has_looked=False)
    (message,) = worker.publisher.sent

    assert message.mandatory
    assert message.declare == (control_exchange(),)
    assert not worker.read(message).is_for("other@h")


def test_neighbours_that_say_nothing_are_waited_for() -> None:
    worker = Starting()
    worker.bench.deliver("a")

    worker.hear(worker.consumes())
    worker.bench.loop.advance(0.02)
    assert worker.bench.started == []
    worker.bench.loop.advance(0.02)

    assert worker.bench.started == ["a"]


@pytest.mark.parametrize("error", [None, AccessRefused("may not publish")])
def test_a_look_that_found_nothing_out_holds_the_mailbox_up_for_moments(error: PublishError | None) -> None:
    worker = Starting(has_looked=False)
    worker.bench.deliver("a")

    worker.bench.loop.advance(0.31)
    assert worker.bench.started == ["a"]
    assert worker.consumers[-1].words == ["start"]
    worker.finds(error)

    assert len(worker.consumers) == 1


def test_neighbours_that_may_not_be_asked_for_are_taken_to_be_there() -> None:
    worker = Starting(has_looked=False)
    worker.bench.deliver("a")

    worker.finds(AccessRefused("may not publish"))

    assert worker.bench.started == []
    assert worker.consumers[-1].words == ["start"]


def test_a_worker_that_stops_waits_for_no_answer_of_the_look() -> None:
    worker = Starting(has_looked=False)

    assert worker.bench.publisher.outstanding == 0


def test_a_worker_that_stops_at_once_takes_no_mailbox() -> None:
    worker = Starting(has_looked=False)
    worker.panel.stop()

    worker.finds(None)

    assert worker.consumers == []


@pytest.mark.parametrize("is_first", [True, False])
def test_workers_of_one_name_are_told_of_each_other(is_first: bool, caplog: pytest.LogCaptureFixture) -> None:
    worker = Starting()
    hello = worker.consumes()
    worker.hear(hello)
    assert "another worker" not in caplog.text

    if is_first:  # the other one starts now
        answer = worker.ask("hello", **{**hello.arguments, "from_node": "w@h"})
        assert answer["revoked"] == []
        worker.tell(hello._replace(ticket="theirs", reply_key="theirs"))
    else:
        worker.answer(hello, nodename="w@h", revoked=[])

    assert "another worker named w@h is running" in caplog.text


def test_a_mailbox_that_cannot_be_had_does_not_hold_the_worker_up() -> None:
    worker = Starting()
    worker.bench.deliver("a")
    worker.panel.on_fatal(RuntimeError("RESOURCE_LOCKED"))

    worker.bench.loop.advance(0.31)

    assert worker.bench.started == ["a"]


def test_another_worker_s_hello_is_not_taken_for_one_s_own() -> None:
    worker = Starting()
    worker.bench.deliver("a")
    worker.consumes()

    worker.tell(Command("hello", {"from_node": "other@h"}, ticket="another", reply_key="caller"))
    worker.bench.loop.advance(0.06)

    assert worker.bench.started == []


def test_an_answer_that_comes_late_counts_for_what_has_not_begun() -> None:
    worker = Starting()
    hello = worker.consumes()
    worker.bench.loop.advance(1.0)
    worker.bench.deliver("runs", "too", "waits")

    worker.answer(hello, revoked=["runs", "waits"])
    worker.bench.end("runs")

    assert worker.bench.started == ["runs", "too"]


def test_after_a_while_the_queue_for_answers_goes_and_after_a_lost_connection_it_comes_again() -> None:
    worker = Starting()
    worker.consumes()
    name = worker.replies
    worker.bench.loop.advance(6.0)
    assert worker.consumers[-1].words == ["start", f"cancel {name}"]

    worker.consumers[-1].windows.clear()
    worker.panel.on_connection_lost(ConnectionError("cut"))
    assert worker.replies == name
    worker.consumes()

    assert len({hello.ticket for hello in worker.asked}) == 2
    assert [bool(hello.arguments["revoked_after"]) for hello in worker.asked] == [False, True]
    worker.bench.deliver("a")
    assert worker.bench.started == ["a"]


def test_a_broker_that_is_away_for_long_does_not_take_the_queue_for_answers_away() -> None:
    worker = Starting()
    worker.consumes()
    worker.panel.on_connection_lost(ConnectionError("cut"))

    worker.bench.loop.advance(60.0)

    assert not [word for word in worker.consumers[-1].words if word.startswith("cancel")]


def test_what_is_known_is_told_in_a_form_that_celery_reads() -> None:
    worker = Starting()
    worker.ask("revoke", task_id=["a", "b"])

    hello = worker.consumes()

    assert (hello.method, hello.arguments["from_node"], hello.arguments["revoked"]) == ("hello", "w@h", ["a", "b"])


def test_answers_that_make_no_sense_do_no_harm() -> None:
    worker = Starting()
    hello = worker.consumes()
    for payload in ({"revoked": 5}, {"revoked": ["a"], "revoked_at": ["noon"]}, {"error": "no"}, {"revoked": None}):
        worker.answer(hello, **payload)
    properties = Properties(content_type="application/json", content_encoding="utf-8", headers={})
    for body in (b"\xff", b"[]", json.dumps({"other@h": {"revoked": ["not asked for"]}}).encode()):
        worker.panel.on_delivery(Delivery(body, properties, "", "", False, worker.replies, 1, 1))

    assert worker.ask("revoked") == []

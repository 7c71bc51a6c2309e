"""task-sent: what a producer tells of its calls, and that telling harms none of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from amqtask import AmqTask, Exchange, Queue, chain
from amqtask.events.dispatcher import LamportClock, SentEvents, following, sent_fields
from amqtask.exceptions import Unroutable
from amqtask.protocol.entities import Queue as Entity
from amqtask.protocol.event import event_exchange, read_events
from amqtask.protocol.message import Message, Properties
from amqtask.topology.declarations import consumption

JSON = frozenset({"application/json"})


class Told:
    """An app that tells, and what came to a queue of events."""

    def __init__(self, **settings: Any) -> None:
        self.app = AmqTask(
            "telling", broker="memory://", task_default_queue="work", set_as_current=False,
            **{"task_send_sent_event": True, **settings},
        )  # fmt: skip
        self.app.task(name="add")(lambda x, y: x + y)
        self.app.publisher.declare((event_exchange(),))
        queue = Entity("seen", exchange=event_exchange(), routing_key="#")
        broker = self.app.memory_broker
        assert broker is not None
        self.broker = broker
        self.app.publisher.declare(consumption(queue))

    @property
    def messages(self) -> list[list[dict[str, Any]]]:
        return [
            read_events(body, properties.content_type, properties.content_encoding, JSON)
            for properties, body in self.broker.messages("seen")
        ]

    @property
    def events(self) -> list[dict[str, Any]]:
        return [event for message in self.messages for event in message]


@pytest.fixture
def told() -> Iterator[Told]:
    made = Told()
    yield made
    made.app.close()


def test_a_call_is_told_once_the_broker_has_it(told: Told) -> None:
    result = told.app.send_task("add", (1, 2), retries=1)

    (event,) = told.events
    assert {name: event[name] for name in ("type", "uuid", "name", "args", "kwargs", "retries")} == {
        "type": "task-sent",
        "uuid": result.id,
        "name": "add",
        "args": "(1, 2)",
        "kwargs": "{}",
        "retries": 1,
    }
    assert (event["queue"], event["exchange"], event["routing_key"]) == ("work", "", "work")
    assert event["hostname"].startswith("gen")
    assert event["root_id"] == result.id


def test_of_a_delayed_call_it_is_told_where_it_will_go(told: Told) -> None:
    told.app.send_task("add", (1, 2), countdown=60)

    (event,) = told.events
    assert (event["queue"], event["exchange"], event["routing_key"]) == ("work", "", "work")
    assert event["eta"]


def test_of_a_call_through_an_exchange_the_queue_is_not_known() -> None:
    told = Told(task_queues=[Queue("media", exchange=Exchange("files"), routing_key="file.new")])
    told.app.publisher.declare(consumption(told.app.queues["media"]))
    told.app.send_task("add", (1, 2), exchange="files", routing_key="file.new")

    (event,) = told.events
    assert (event["queue"], event["exchange"], event["routing_key"]) == (None, "files", "file.new")


def in_a_pipeline(app: AmqTask) -> None:
    with app.pipeline():
        for number in range(250):
            app.send_task("add", (number, 1))


def many(app: AmqTask) -> None:
    app.publish_many(app.signature("add", (number, 1)) for number in range(250))


def many_awaited(app: AmqTask) -> None:
    asyncio.run(app.apublish_many(app.signature("add", (number, 1)) for number in range(250)))


@pytest.mark.parametrize("publish", [in_a_pipeline, many, many_awaited])
def test_calls_that_leave_together_are_told_together(told: Told, publish: Callable[[AmqTask], None]) -> None:
    publish(told.app)

    assert [len(message) for message in told.messages] == [100, 100, 50]
    assert [event["args"] for event in told.events] == [f"({number}, 1)" for number in range(250)]


def test_awaited_calls_and_compositions_are_told(told: Told) -> None:
    one = asyncio.run(told.app.asend_task("add", (1, 2)))
    workflow: Any = chain(told.app.signature("add", (1, 2)), told.app.signature("add", (3,))).apply_async()

    assert [event["uuid"] for event in told.events] == [one.id, workflow.parent.id]


def test_what_the_broker_did_not_take_is_not_told(told: Told) -> None:
    with pytest.raises(Unroutable):
        told.app.send_task("add", (1, 2), exchange="amq.direct", routing_key="nowhere")

    assert told.events == []


def test_nothing_is_told_unless_it_is_asked_for() -> None:
    told = Told(task_send_sent_event=False)
    told.app.send_task("add", (1, 2))
    assert told.events == []

    told.app.conf.task_send_sent_event = True
    told.app.send_task("add", (1, 2))
    assert len(told.events) == 1


def test_a_broker_that_blocks_events_costs_no_call(told: Told) -> None:
    sent = SentEvents(told.app.event_publisher.publish, exchange="celeryev", serializer="json", clock=LamportClock())
    message = Message(b"", Properties(headers={"id": "a", "task": "add"}), "", "work")
    later = Message(b"", Properties(headers={"id": "b", "task": "add"}), "", "work")
    told.broker.block("memory alarm")

    # The first one makes the broker say that it takes none; it comes when the alarm is over.
    sent.sent((message,))
    sent.sent((later,))

    told.broker.unblock()
    assert [event["uuid"] for event in told.events] == ["a"]


def test_a_message_of_little_is_told_with_what_there_is() -> None:
    fields = sent_fields(Message(b"", Properties(headers={"id": "a", "task": "add"}), "files", "key"))

    assert (fields["uuid"], fields["queue"], fields["exchange"], fields["retries"]) == ("a", None, "files", 0)


@pytest.mark.parametrize("header", [{"kwargs": 5}, {"kwargs": None}, {"kwargs": {"tasks": 5}}, 5, None])
def test_a_header_that_is_none_keeps_nobody_from_telling_of_its_task(header: object) -> None:
    signature = {"task": "celery.chord", "kwargs": {"header": header}}
    body = json.dumps([[], {}, {"callbacks": [signature]}]).encode()

    assert [entry["task"] for entry in following(body, "application/json", "utf-8")] == ["celery.chord"]

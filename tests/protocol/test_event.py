"""Events: one or many in a message, under the routing keys that receivers bind."""

from __future__ import annotations

from typing import Any

import pytest

from amqtask.exceptions import Undecodable
from amqtask.protocol.event import (
    EventTexts,
    event,
    event_message,
    events_message,
    fields_text,
    read_events,
    receiver_queue,
    texts_message,
)
from amqtask.protocol.serialization import content_types

JSON = content_types(["json"])


def test_one_event_is_routed_by_its_type() -> None:
    told = event("task-succeeded", "a@host", timestamp=1.5, clock=7, pid=3, uuid="1", runtime=0.1)

    message = event_message(told)

    assert (message.exchange, message.routing_key) == ("celeryev", "task.succeeded")
    assert message.properties.headers == {"hostname": "a@host"}
    assert message.properties.delivery_mode == 1
    assert not message.mandatory
    assert read_events(message.body, "application/json", "utf-8", JSON) == [told]


def test_many_events_are_one_message() -> None:
    told = [event("task-started", "a@host", timestamp=1.5, clock=n, pid=3, uuid="1") for n in range(3)]

    message = events_message(told)

    assert message.routing_key == "task.multi"
    assert read_events(message.body, "application/json", "utf-8", JSON) == told


@pytest.mark.parametrize("serializer", ["json", "msgpack"])
def test_events_written_one_by_one_are_the_same(serializer: str) -> None:
    fields: dict[str, Any] = {"args": "('ü\n\"',)", "retries": 2, "eta": None, "requeue": True, "runtime": 0.125}
    told = [
        event("task-started", "a@host", timestamp=1763714012.5, clock=n, pid=3, uuid="1", **fields) for n in range(2)
    ]
    texts = EventTexts("a@host", pid=3, utcoffset=0)

    message = texts_message(
        [texts.text("task-started", "1", fields_text(fields), clock=n, timestamp=1763714012.5) for n in range(2)],
        hostname="a@host",
        serializer=serializer,
    )

    assert message.routing_key == "task.multi"
    assert message.properties.headers == {"hostname": "a@host"}
    content = content_types([serializer])
    assert read_events(message.body, message.properties.content_type, "", content) == told


@pytest.mark.parametrize("body", [b"1", b"[1]", b"{}", b'[{"type": 1}]'])
def test_other_bodies_are_no_events(body: bytes) -> None:
    with pytest.raises(Undecodable):
        read_events(body, "application/json", "utf-8", JSON)


def test_a_receiver_keeps_nothing_when_it_is_gone() -> None:
    queue = receiver_queue("celeryev.r-1")

    assert queue.name == "celeryev.r-1"
    assert queue.exclusive
    assert queue.argument_map == {"x-message-ttl": 5000, "x-expires": 60_000}

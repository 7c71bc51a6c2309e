"""What is written as a row is the same message when it is read, on its way for as long as it still has to wait."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amqtask import AmqTask
from amqtask.exceptions import EncodeError, PublishError
from amqtask.outbox.contract import RowUnreadable, as_message, as_row
from amqtask.protocol.entities import Binding, Exchange, Queue, arguments
from amqtask.protocol.message import Message, Properties
from amqtask.topology.delays import DelayPlan

DELAYS = DelayPlan()
NOW = 1_800_000_000.0
EVENTS = Exchange("events", type="topic", arguments=arguments({"alternate-exchange": "else"}))
WORK = Queue(
    "work",
    EVENTS,
    "a.#",
    arguments=arguments({"x-queue-type": "quorum", "x-delivery-limit": 5}),
    bindings=(Binding(EVENTS, "work", "b.*", arguments({"x-match": "all"})),),
)


def moment(seconds: float) -> str:
    return datetime.fromtimestamp(NOW + seconds, timezone.utc).isoformat()


def call(**headers: Any) -> Message:
    properties = Properties("application/json", "utf-8", {"id": "1", "task": "t", **headers}, priority=3)
    return Message(b"[[], {}, {}]", properties, "events", "a.b", (EVENTS, WORK))


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.binary()
    | st.decimals(-(10**6), 10**6, places=3)
    | st.datetimes(datetime(1970, 1, 2), timezones=st.just(timezone.utc))
)
names = st.text(max_size=60)
headers = st.dictionaries(
    names, st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(names, inner)), max_size=4
)


@given(headers, st.binary())
def test_every_header_comes_back_as_it_was(found: dict[str, Any], body: bytes) -> None:
    message = Message(body, Properties(headers={**found, "eta": None, "expires": None}))
    row = as_row(message, DELAYS)

    assert as_message(row.message, row.body, DELAYS) == message


def test_a_row_says_where_its_message_goes_and_what_must_exist() -> None:
    message = replace(call(), mandatory=False)
    row = as_row(message, DELAYS)

    assert as_message(row.message, row.body, DELAYS) == message
    assert (row.task_id, row.task) == ("1", "t")


def test_names_that_look_like_ours_are_only_names() -> None:
    message = call(**{"mine": {"$time": "not one"}, "$bytes": "x"})
    row = as_row(message, DELAYS)

    assert as_message(row.message, row.body, DELAYS).properties.headers == message.properties.headers


def test_a_header_that_amqp_has_no_form_for_is_refused_at_the_call() -> None:
    with pytest.raises(EncodeError, match="headers hold text"):
        as_row(call(mine=object()), DELAYS)


@pytest.mark.parametrize("value", [math.nan, 2**70, Decimal("1e20"), "x" * 200_000])
def test_a_header_that_the_broker_does_not_take_is_refused_at_the_call(value: Any) -> None:
    with pytest.raises(PublishError):
        as_row(call(mine=value), DELAYS)


@pytest.mark.parametrize("seconds", [0.1, 3.0, 100.0, 90_000.0])
def test_the_row_of_a_delayed_message_is_the_message_itself(seconds: float) -> None:
    message = call(eta=moment(seconds))

    assert as_row(DELAYS.delayed(message, seconds), DELAYS) == as_row(message, DELAYS)


def test_a_late_row_waits_only_for_what_is_left() -> None:
    message = call(eta=moment(100))
    row = as_row(DELAYS.delayed(message, 100), DELAYS)

    later = as_message(row.message, row.body, DELAYS, now=NOW + 90)
    too_late = as_message(row.message, row.body, DELAYS, now=NOW + 101)

    assert later == DELAYS.delayed(message, 10, now=NOW + 90)
    assert too_late == message


def test_what_expires_has_the_rest_of_its_time() -> None:
    message = call(expires=moment(60))
    message.properties.expiration = "60000"
    row = as_row(message, DELAYS)

    assert as_message(row.message, row.body, DELAYS, now=NOW + 20).properties.expiration == "40000"
    # A worker tells that it has expired; the broker would only drop it.
    assert as_message(row.message, row.body, DELAYS, now=NOW + 61).properties.expiration is None


def test_the_time_of_publishing_is_the_relays() -> None:
    row = as_row(call(timestamp_in_ms=1), DELAYS)

    assert as_message(row.message, row.body, DELAYS, now=NOW).properties.headers["timestamp_in_ms"] == NOW * 1000


def test_a_format_of_tomorrow_is_named() -> None:
    row = as_row(call(), DELAYS)
    newer = json.dumps({**json.loads(row.message), "v": 2})

    with pytest.raises(RowUnreadable, match=r"format 2.*Update the relay"):
        as_message(newer, row.body, DELAYS)


@pytest.mark.parametrize("name", ["exchange", "routing_key"])
def test_a_row_must_say_where_its_message_goes(name: str) -> None:
    row = as_row(call(), DELAYS)
    nowhere = json.dumps({**json.loads(row.message), name: None})

    with pytest.raises(RowUnreadable, match=name):
        as_message(nowhere, row.body, DELAYS)


NO_ROWS = ["", "{}", "[]", '{"v": 1}', '{"v": 1, "properties": {"colour": 1}}', "null", '{"v":' * 10_000]


@pytest.mark.parametrize("text", NO_ROWS)
def test_what_is_no_row_is_said_to_be_none(text: str) -> None:
    with pytest.raises(RowUnreadable):
        as_message(text, b"", DELAYS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        | st.dictionaries(st.sampled_from(["$time", "$bytes", "$decimal", "$table", "$what"]), inner, max_size=1)
    ),
    max_leaves=5,
)


def places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a document, as its container and the name or index in it."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for name, value in list(items):
        yield document, name
        yield from places(value)


@settings(deadline=None)
@given(st.data())
def test_a_row_with_anything_anywhere_is_a_message_or_no_message(data: st.DataObject) -> None:
    document = json.loads(as_row(call(eta=moment(60), list=[1, {"a": Decimal("1.5")}]), DELAYS).message)
    container, name = data.draw(st.sampled_from(list(places(document))))
    container[name] = data.draw(JSON)

    try:
        message = as_message(json.dumps(document), b"", DELAYS, now=NOW)
    except RowUnreadable:
        return
    assert isinstance(message.properties.headers, dict)
    assert isinstance(message.exchange, str)
    assert isinstance(message.routing_key, str)
    hash(message.declare)


def test_a_call_with_an_eta_goes_to_its_queue_when_that_is_over() -> None:
    app = AmqTask("t", broker="memory://", set_as_current=False)
    eta = datetime.now(timezone.utc) + timedelta(hours=1)
    message = app.calls.compose("t", (), {}, {"eta": eta, "expires": eta + timedelta(hours=1)})
    row = as_row(message, app.delays)

    late = as_message(row.message, row.body, app.delays, now=eta.timestamp() + 1)

    assert (late.exchange, late.routing_key, late.properties.headers["eta"]) == ("", "amqtask", eta.isoformat())
    assert not [name for name in late.properties.headers if name.startswith("amqtask-delay")]

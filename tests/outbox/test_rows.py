"""What is written as a row is the same message when it is read, on its way for as long as it still has to wait."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amqtask import AmqTask
from amqtask.entities import Binding, Exchange, Queue, arguments
from amqtask.exceptions import EncodeError
from amqtask.message import Message, Properties
from amqtask.outbox.rows import RowUnreadable, as_message, as_row
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
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.decimals(allow_nan=False, allow_infinity=False)
    | st.datetimes(timezones=st.just(timezone.utc))
)
headers = st.dictionaries(
    st.text(), st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)), max_size=4
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


@pytest.mark.parametrize("seconds", [0.1, 3.0, 100.0, 90_000.0])
def test_the_row_of_a_delayed_message_is_the_message_itself(seconds: float) -> None:
    message = call(eta=moment(seconds))

    assert as_row(DELAYS.delayed(message, seconds), DELAYS) == as_row(message, DELAYS)


def test_a_late_row_waits_only_for_what_is_left() -> None:
    message = call(eta=moment(100))
    row = as_row(DELAYS.delayed(message, 100), DELAYS)

    later = as_message(row.message, row.body, DELAYS, now=NOW + 90)
    too_late = as_message(row.message, row.body, DELAYS, now=NOW + 101)

    assert later == DELAYS.delayed(message, 10)
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


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"v": 1}', '{"v": 1, "properties": {"colour": 1}}', "null"])
def test_what_is_no_row_is_said_to_be_none(text: str) -> None:
    with pytest.raises(RowUnreadable):
        as_message(text, b"", DELAYS)


def test_a_call_with_an_eta_goes_to_its_queue_when_that_is_over() -> None:
    app = AmqTask("t", broker="memory://", set_as_current=False)
    eta = datetime.now(timezone.utc) + timedelta(hours=1)
    message = app.calls.compose("t", (), {}, {"eta": eta, "expires": eta + timedelta(hours=1)})
    row = as_row(message, app.delays)

    late = as_message(row.message, row.body, app.delays, now=eta.timestamp() + 1)

    assert (late.exchange, late.routing_key, late.properties.headers["eta"]) == ("", "amqtask", eta.isoformat())
    assert not [name for name in late.properties.headers if name.startswith("amqtask-delay")]

"""Deliveries are read as pika reads them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pika import spec

from amqtask.transport.content import install
from amqtask.transport.wire import read_deliver, read_properties

short = st.text(max_size=60)
octet = st.integers(0, 255)
USUAL = {
    "content_type": short,
    "content_encoding": short,
    "headers": st.dictionaries(short, st.none() | st.text() | st.integers(-(2**31), 2**31 - 1), max_size=5),
    "delivery_mode": st.sampled_from([1, 2]),
    "priority": octet,
    "correlation_id": short,
}
REPLY = {"reply_to": short}
RARE = {"expiration": short, "message_id": short, "timestamp": st.integers(0, 2**40), "type": short, "app_id": short}


def encoded(method: Any) -> bytes:
    install()
    return b"".join(method.encode())


def fields_of(properties: Any) -> dict[str, Any]:
    return {name: getattr(properties, name) for name in (*USUAL, *REPLY, *RARE)}


@given(
    st.fixed_dictionaries(USUAL)
    | st.fixed_dictionaries(USUAL, optional={**REPLY, "message_id": short})
    | st.fixed_dictionaries({}, optional={**USUAL, **REPLY, **RARE}),
    st.binary(max_size=5),
)
def test_properties_are_read_as_they_were_written(properties: dict[str, Any], before: bytes) -> None:
    raw = encoded(spec.BasicProperties(**properties))

    read = read_properties(before + raw + b"the body", len(before))

    assert fields_of(read) == fields_of(spec.BasicProperties(**properties))


@pytest.mark.parametrize("damaged", [b"text/", b"utf-", b"id"])
def test_a_property_that_is_no_utf_8_does_not_end_the_connection(damaged: bytes) -> None:
    properties = spec.BasicProperties("text/x", "utf-8", {"a": 1}, 2, 0, "id-1", "reply")
    raw = encoded(properties).replace(damaged, b"\xff" * len(damaged))

    read = read_properties(raw, 0)

    assert (read.headers, read.reply_to) == ({"a": 1}, "reply")
    assert "\\xff" in f"{read.content_type}{read.content_encoding}{read.correlation_id}"


@given(short, st.integers(0, 2**64 - 1), st.booleans(), short, short)
def test_a_delivery_s_method_is_read_as_it_was_written(
    consumer_tag: str, delivery_tag: int, redelivered: bool, exchange: str, routing_key: str
) -> None:
    sent = spec.Basic.Deliver(consumer_tag, delivery_tag, redelivered, exchange, routing_key)

    for _ in range(2):
        assert vars(read_deliver(encoded(sent))) == vars(sent)

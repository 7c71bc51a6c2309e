"""Field tables: every value AMQP knows comes back, and pika's own coding is kept where it was right."""

from __future__ import annotations

import math
import pickle
import struct
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any

import pika.data
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pika.exceptions import ShortStringTooLong, UnsupportedAMQPFieldException

from amqtask.protocol.message import LARGEST_HEADERS, OddHeaders
from amqtask.transport.content import decode_short_string, decode_table, encode_short_string, encode_table

pikas_decode_table = pika.data.decode_table
pikas_encode_table = pika.data.encode_table

names = st.text(max_size=40)
pikas_leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.text(max_size=30)
    | st.datetimes(datetime(1970, 1, 2), datetime(2100, 1, 1)).map(
        lambda when: when.replace(microsecond=0, tzinfo=timezone.utc)
    )
    | st.decimals(-(10**6), 10**6, places=3)
)


def tables(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    values = st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=10
    )
    return st.dictionaries(names, values, max_size=8)


def written(table: dict[str, Any]) -> bytes:
    pieces: list[bytes] = []
    size = encode_table(pieces, table)
    raw = b"".join(pieces)
    assert size == len(raw)
    return raw


@given(tables(pikas_leaves | st.floats(allow_nan=False, allow_infinity=False) | st.binary(max_size=20)))
def test_every_value_comes_back(table: dict[str, Any]) -> None:
    raw = written(table)

    assert decode_table(b"before" + raw + b"after", 6) == (table, 6 + len(raw))


@given(tables(pikas_leaves))
def test_what_pika_writes_is_written_the_same(table: dict[str, Any]) -> None:
    pieces: list[bytes] = []
    pikas_encode_table(pieces, table)

    assert written(table) == b"".join(pieces)


@given(tables(pikas_leaves))
def test_what_pika_reads_is_read_the_same(table: dict[str, Any]) -> None:
    raw = written(table)

    assert decode_table(raw, 0) == pikas_decode_table(raw, 0)


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b"t\x01", True),
        (b"b\xff", -1),
        (b"B\xff", 255),
        (b"s\xff\xff", -1),
        (b"U\xff\xff", -1),
        (b"u\xff\xff", 65535),
        (b"I\xff\xff\xff\xff", -1),
        (b"i\xff\xff\xff\xff", 2**32 - 1),
        (b"l" + b"\xff" * 8, -1),
        (b"L" + b"\xff" * 8, -1),
        (b"f" + struct.pack(">f", 0.5), 0.5),
        (b"d" + struct.pack(">d", 20.5), 20.5),
        (b"D\x02\x00\x00\x00\x7b", Decimal("1.23")),
        (b"S\x00\x00\x00\x02\xff\xfe", b"\xff\xfe"),
        (b"x\x00\x00\x00\x01a", b"a"),
        (b"V", None),
    ],
)
def test_each_kind_is_read(raw: bytes, value: Any) -> None:
    table = b"\x01k" + raw

    found, _ = decode_table(struct.pack(">I", len(table)) + table, 0)

    assert found == {"k": value}
    assert type(found["k"]) is type(value)


def test_a_tuple_is_an_array() -> None:
    assert decode_table(written({"timelimit": (30.5, None)}), 0)[0] == {"timelimit": [30.5, None]}


@pytest.mark.parametrize("value", [object(), {1}, 2**63, [object()], math.nan, math.inf])
def test_what_amqp_cannot_say_is_refused(value: Any) -> None:
    with pytest.raises(UnsupportedAMQPFieldException):
        written({"k": value})


def test_a_name_that_is_too_long_is_refused() -> None:
    with pytest.raises(UnsupportedAMQPFieldException):
        written({"k" * 256: 1})


def table(*fields: bytes) -> bytes:
    inner = b"".join(fields)
    return struct.pack(">I", len(inner)) + inner


def nested(kind: bytes, levels: int) -> bytes:
    inner = b""
    for _ in range(levels):
        name = b"\x01n" if kind == b"F" else b""
        inner = name + kind + struct.pack(">I", len(inner)) + inner
    return inner if kind == b"F" else b"\x01n" + inner


SEVEN = b"\x05afterI\x00\x00\x00\x07"


@pytest.mark.parametrize(
    ("field", "problem"),
    [
        (b"\x01wT" + struct.pack(">Q", 253402300800), "beyond the calendar"),
        (b"\x01wT" + b"\xff" * 8, "beyond the calendar"),
        (b"\x02\xff\xfeV", "no UTF-8"),
        (nested(b"F", 500), "within each other"),
        (nested(b"A", 500), "within each other"),
        (nested(b"F", 15_000), "within each other"),
        (b"\x01wA" + struct.pack(">I", 5) + b"S\x00\x00\x00\xff", "longer than its array"),
    ],
)
def test_what_cannot_be_taken_is_told_and_the_rest_is_read(field: bytes, problem: str) -> None:
    raw = table(field, SEVEN)

    found, end = decode_table(raw + b"more", 0)

    assert isinstance(found, OddHeaders)
    assert problem in found.problem
    assert found["after"] == 7
    assert end == len(raw)
    pickle.dumps(dict(found))


@pytest.mark.parametrize(
    "raw", [b"", b"\x00", table(b"\x01k?", SEVEN), table(b"\x01kS\x00\x00\xff\xff"), table(SEVEN)[:-2], table(b"\xff")]
)
def test_a_table_that_makes_no_sense_is_an_odd_one(raw: bytes) -> None:
    found, _ = decode_table(raw, 0)

    assert isinstance(found, OddHeaders)
    assert found.problem


@given(st.binary(max_size=60))
def test_reading_a_table_never_raises(raw: bytes) -> None:
    found, _ = decode_table(table(raw), 0)

    assert isinstance(found, dict)


def test_headers_of_more_bytes_than_are_taken_are_odd() -> None:
    found, end = decode_table(written({"k": "x" * LARGEST_HEADERS}), 0)

    assert isinstance(found, OddHeaders)
    assert (len(found["k"]), end) == (LARGEST_HEADERS, LARGEST_HEADERS + 11)


def test_a_property_that_is_no_utf_8_can_be_written_again() -> None:
    text, end = decode_short_string(b"\xff" + b"\xfe" * 255, 0)

    assert text.startswith("\\xfe")
    assert (len(text.encode()) <= 255, end) == (True, 256)


def test_a_short_string_is_its_length_and_its_bytes_255_at_most() -> None:
    pieces = list[bytes]()

    sizes = [encode_short_string(pieces, value) for value in ("", "straße", b"mail", "é" * 127)]

    assert (sizes, b"".join(pieces)) == ([1, 8, 5, 255], b"\x00\x07stra\xc3\x9fe\x04mail\xfe" + "é".encode() * 127)
    with pytest.raises(ShortStringTooLong):
        encode_short_string(pieces, "é" * 128)


@pytest.mark.parametrize("value", [math.nan, math.inf, [-math.inf]])
def test_numbers_that_the_broker_does_not_know_are_refused(value: Any) -> None:
    with pytest.raises(UnsupportedAMQPFieldException):
        written({"k": value})


def test_a_table_without_an_end_is_refused() -> None:
    value: Any = []
    for _ in range(100_000):
        value = [value]

    with pytest.raises(UnsupportedAMQPFieldException):
        written({"k": value})

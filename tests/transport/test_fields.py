"""Field tables: every value AMQP knows comes back, and pika's own coding is kept where it was right."""

from __future__ import annotations

import math
import struct
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any

import pika.data
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pika.exceptions import InvalidFieldTypeException, UnsupportedAMQPFieldException

from amqtask.transport.fields import decode_table, encode_table

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


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InvalidFieldTypeException):
        decode_table(b"\x00\x00\x00\x03\x01k?", 0)

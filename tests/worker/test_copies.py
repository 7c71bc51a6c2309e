"""Copies of messages that cannot be run: they fit, whatever the original was."""

from __future__ import annotations

import math
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amqtask.execution.request import Request
from amqtask.protocol.message import Delivery, Message, Properties
from amqtask.transport.content import decode_table, encode_table
from amqtask.worker.finisher import CUT_HEADER, dead_letter, fitted

FRAME = 131_072


def buried(headers: Any, reason: str = "why", **properties: Any) -> Message:
    delivery = Delivery(b"body", Properties(headers=headers, **properties), "", "q", False, "q", 1, 1)
    request = Request(number=1, id="i", task="t", queue="q", delivery=delivery)
    return dead_letter(request, to="q.dead", reason=reason, exception=reason, hostname="w@h", died_at="now")


def encoded(headers: dict[str, Any]) -> bytes:
    pieces: list[bytes] = []
    encode_table(pieces, headers)
    return b"".join(pieces)


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"n": value}
    return value


@pytest.mark.parametrize(
    "headers",
    [
        {"task": "t" * 131_000},
        {"task": "t", "id": "i", "argsrepr": "x" * 70_000, "kwargsrepr": "y" * 60_000},
        {f"h{n}": n for n in range(12_000)},
        {"h" * 250 + str(n): "x" for n in range(500)},
        {"k": math.nan, "task": "t"},
        {"k": nested(5_000), "task": "t"},
        {"k": 2**70, "task": "t"},
        {"k": "\ud800", "task": "t"},
        {"k": Decimal("1e400"), "task": "t"},
        {"k": datetime(1, 1, 1, tzinfo=timezone.utc), "task": "t"},
        {"k": object(), "task": "t"},
        None,
    ],
)
def test_a_dead_letter_fits_into_a_frame_and_names_what_was_cut(headers: Any) -> None:
    dead = buried(headers, reason="because " * 100_000)

    assert len(encoded(dead.properties.headers)) < FRAME - 4096
    assert dead.body == b"body"
    assert dead.properties.headers["x-amqtask-reason"].startswith("because ")
    assert (CUT_HEADER in dead.properties.headers) == (headers is not None)
    assert len(dead.properties.headers.get(CUT_HEADER, "")) < 1100


def test_a_reason_is_one_line() -> None:
    dead = buried({"task": "t"}, reason="a\nb\x1b[2J")

    assert dead.properties.headers["x-amqtask-reason"] == r"a\nb\x1b[2J"


def test_headers_that_fit_are_what_they_were() -> None:
    headers = {"task": "t", "id": "i", "x": b"\xff", "n": {"a": [1, None]}}

    assert fitted(headers) == headers


@given(st.binary(max_size=80))
def test_whatever_was_read_can_be_written_again(raw: bytes) -> None:
    found, _ = decode_table(len(raw).to_bytes(4, "big") + raw, 0)

    encoded(fitted(found))

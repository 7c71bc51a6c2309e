"""Frames: bytes are cut where the broker cut them, however they come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some
from pika import spec

from amqtask.protocol.message import Message, Properties
from amqtask.transport.content import FRAME_MAX, FrameTooLarge
from amqtask.transport.stream import (
    HEARTBEAT,
    Frames,
    Unreadable,
    content_size,
    decode_method,
    decode_properties,
    encode_method,
    encode_publish,
)


@given(some.binary(max_size=3000), some.lists(some.integers(1, 500), max_size=40))
def test_a_message_is_read_as_it_was_written_however_it_is_cut(body: bytes, cuts: list[int]) -> None:
    said = HEARTBEAT + encode_publish(Message(body, Properties(headers={"a": [1, "b"]}), "e", "k"), 1000)
    frames, found = Frames(), []

    for size in [*cuts, len(said)]:
        found += frames.feed(said[:size])
        said = said[size:]

    assert [kind for kind, _, _ in found[:3]] == [spec.FRAME_HEARTBEAT, spec.FRAME_METHOD, spec.FRAME_HEADER]
    method, header = found[1][2], found[2][2]
    assert (decode_method(method).exchange, decode_method(method).routing_key) == ("e", "k")
    assert decode_properties(header)[0].headers == {"a": [1, "b"]}
    assert content_size(header) == len(body)
    assert b"".join(payload for _, _, payload in found[3:]) == body


@pytest.mark.parametrize(
    "said", [b"HTTP/1.1 400 Bad Request\r\n", b"AMQP\x00\x00\x09\x01", b"\x01\x00\x01\xff\xff\xff\xff"]
)
def test_what_is_no_frame_is_said_to_be_none(said: bytes) -> None:
    with pytest.raises(Unreadable):
        Frames().feed(said)


def test_a_frame_without_its_end_is_none() -> None:
    said = bytearray(encode_method(spec.Channel.OpenOk()))
    said[-1] = 0

    with pytest.raises(Unreadable):
        Frames().feed(bytes(said))


def test_headers_that_no_frame_holds_are_not_written() -> None:
    with pytest.raises(FrameTooLarge):
        encode_publish(Message(b"", Properties(headers={"a": "x" * FRAME_MAX})), FRAME_MAX)

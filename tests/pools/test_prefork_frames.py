"""Packets between parent and child."""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import socket
import struct
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amqtask import states
from amqtask.exceptions import PublishError
from amqtask.execution.request import HELD, Answer, Outcome
from amqtask.protocol.chord import ChordPart
from amqtask.protocol.entities import Binding, Exchange, Queue, arguments
from amqtask.protocol.message import Delivery, Message, Properties
from amqtask.protocol.serialization import JSON, PICKLE
from amqtask.testing.tasks import request
from amqtask.transport.content import encode_properties
from amqtask_pools.prefork import frames
from amqtask_pools.prefork.frames import (
    LAST,
    OUTCOMES,
    PIECE,
    REQUEST,
    SUCCESSES,
    BrokenFrame,
    FrameReader,
    cut,
    decode_outcomes,
    decode_request,
    encode_outcomes,
    encode_request,
    number_of,
    socket_pair,
)

ACCEPT = frozenset({JSON})
EVENTS = Exchange("events", type="topic", arguments=arguments({"alternate-exchange": "else"}))
WORK = Queue("work", EVENTS, "a.#", arguments=arguments({"x-delivery-limit": 5}))
MESSAGE = Message(
    b"\x00\xffbody",
    Properties(
        "application/json",
        "utf-8",
        {
            "id": "1", "task": "t", "limits": [1.5, None], "when": datetime(2030, 1, 1, tzinfo=timezone.utc), "raw": b"\xff",
            "price": Decimal("1.50"), "deep": {"text": "\ud800ü"}, "yes": True,
        },
        priority=3,
        message_id="m",
        timestamp=5,
    ),
    "events",
    "a.b",
    (EVENTS, WORK, Binding(EVENTS, "work", "b.*")),
    mandatory=False,
)  # fmt: skip


def test_a_request_travels_without_its_delivery() -> None:
    delivery = Delivery(b"", Properties(), "", "q", False, "q", 1, 1)
    sent = request(7, "add", 1, 2, queue="q", soft_limit=1.5, delivery=delivery)
    received = decode_request(encode_request(sent))

    assert received.to_frame() == sent.to_frame()
    assert received.delivery is None
    assert number_of(encode_request(sent)) == 7


def test_what_a_request_tells_of_its_message_s_properties_travels() -> None:
    properties = Properties(app_id="a", message_id="m", timestamp=5, type="t", user_id="u")
    sent = request(7, "add", delivery=Delivery(b"", properties, "", "q", False, "q", 1, 1))
    received = decode_request(encode_request(sent))
    again = decode_request(encode_request(received))

    assert sent.properties == received.properties == again.properties
    assert (
        sent.properties.items()
        >= {"app_id": "a", "message_id": "m", "timestamp": 5, "type": "t", "user_id": "u"}.items()
    )


def travelled(*sent: Outcome, accept: frozenset[str] = ACCEPT) -> list[Outcome]:
    return decode_outcomes(encode_outcomes(sent, accept), accept)


def test_outcomes_travel_in_batches() -> None:
    part = ChordPart("g", "t", 2, {"task": "body", "args": [1]}, MESSAGE)
    sent = [
        Outcome(1, runtime=0.5),
        Outcome(
            2, states.REJECTED, Answer.REQUEUE, "lost", pause=5.0, summary="ü\ud800", traceback="t" * 9, expected=True
        ),
        Outcome(3, publish=(MESSAGE, MESSAGE), result=MESSAGE, parts=(part,), is_step=True),
        Outcome(4, HELD, Answer.REQUEUE, "waits", pause=0.1, tickets={"concurrency by ü": 7}, places=["key"]),
    ]

    assert travelled(*sent) == sent


def test_successes_without_a_message_travel_column_by_column() -> None:
    sent = [Outcome(2**40 + number, runtime=number / 3) for number in range(16)]
    told = [outcome._replace(summary="ü\ud800\0time" * (outcome.number % 3)) for outcome in sent]

    assert travelled(*sent) == sent
    assert len(encode_outcomes(sent, ACCEPT)) == 5 + 16 * 16
    assert travelled(*told) == told


def test_the_steps_of_a_worker_that_has_had_two_billion_tasks_travel() -> None:
    step = Outcome(-(2**31 << 32) - 1, runtime=0.5)

    assert travelled(Outcome(2**31), step) == [Outcome(2**31), step]


@pytest.mark.parametrize("accepted", ["application/data", "application/x-amqtask-encrypted"])
def test_the_body_of_a_chord_goes_as_json_where_only_protected_messages_are_accepted(accepted: str) -> None:
    part = ChordPart("g", "t", 2, {"task": "body", "args": [1]}, MESSAGE)

    (outcome,) = travelled(Outcome(1, parts=(part,)), accept=frozenset({accepted}))

    assert outcome.parts[0].body == part.body


def test_the_body_of_a_chord_keeps_what_the_accepted_serializers_can_say() -> None:
    part = ChordPart("g", "t", 2, {"task": "body", "args": ({1: {2}},)}, MESSAGE)

    (outcome,) = travelled(Outcome(1, parts=(part,)), accept=frozenset({JSON, PICKLE}))

    assert outcome.parts == (part,)


@pytest.mark.parametrize("headers", [{"odd": object()}, {(1, 2): 3}, {"n": 2**70}], ids=["object", "name", "number"])
def test_headers_that_cannot_be_published_do_not_keep_outcomes_back(headers: dict[Any, Any]) -> None:
    odd = Message(b"", Properties(headers=headers))

    first, second = travelled(Outcome(1), Outcome(2, result=odd))

    assert (first.number, second.number) == (1, 2)
    assert second.result is not None
    with pytest.raises(PublishError):
        encode_properties(second.result)


def test_a_whole_message_is_told_from_pieces_and_words_by_its_first_byte() -> None:
    assert encode_request(request(1, "add"))[0] == REQUEST
    assert encode_outcomes([Outcome(1)], ACCEPT)[0] == SUCCESSES
    assert encode_outcomes([Outcome(1), Outcome(2, result=MESSAGE)], ACCEPT)[0] == OUTCOMES


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return EXECUTED.append, (1,)


EXECUTED: list[int] = []
ROW = json.loads(encode_outcomes([Outcome(1, reason="long")], ACCEPT)[5:])[0]


def row(**fields: Any) -> bytes:
    return text([[fields.get(name, value) for name, value in zip(Outcome._fields, ROW, strict=True)]])


def text(document: Any) -> bytes:
    raw = json.dumps(document).encode()
    return struct.pack(">BI", OUTCOMES, len(raw)) + raw


RUBBISH = {
    "nothing": b"",
    "noise": b"rubbish",
    "a pickle": pickle.dumps(Evil()),
    "a length without an end": struct.pack(">BI", OUTCOMES, 2**32 - 1),
    "no list": text({"number": 1}),
    "no rows": text([1, 2]),
    "too few fields": text([[1, "SUCCESS"]]),
    "a number that is text": row(number="1"),
    "a state of its own": row(state="HACKED"),
    "no answer": row(answer=9),
    "no runtime": row(runtime=math.nan),
    "endless": row(runtime=math.inf),
    "a pause before": row(pause=-1.0),
    "a ticket that is none": row(tickets={"concurrency": "1"}),
    "a place that is none": row(places=[1]),
    "no message": row(result=[0]),
    "a body elsewhere": row(result=[99, "", "", "", True, *[None] * 2, {}, *[None] * 10]),
    "a body before": row(result=[-5, "", "", "", True, *[None] * 2, {}, *[None] * 10]),
    "headers that are none": row(result=[0, "", "", "", True, *[None] * 13]),
    "an entity of its own": row(result=[0, "", "", '[{"is": "os.system"}]', True, *[None] * 2, {}, *[None] * 10]),
    "a chord that is pickled": row(parts=[["g", "t", 1, [0, "application/x-python-serialize", "binary"], []]]),
    "successes that end too early": struct.pack(">BIq", SUCCESSES, 1, 1),
    "endless successes": struct.pack(">BI", SUCCESSES, 2**32 - 1),
    "a success that took no time that there is": struct.pack(">BIqd", SUCCESSES, 1, 1, math.nan),
    "a success before it began": struct.pack(">BI2q2d", SUCCESSES, 2, 1, 2, 0.0, -1.0),
    "a summary too many": struct.pack(">BIqd", SUCCESSES, 1, 1, 0.5) + b'["", ""]',
    "a summary that is none": struct.pack(">BIqd", SUCCESSES, 1, 1, 0.5) + b"[1]",
    "a text as summaries": struct.pack(">BIqd", SUCCESSES, 1, 1, 0.5) + b'"x"',
    "nested without end": struct.pack(">BI", OUTCOMES, 100_000) + b"[" * 100_000,
}


@pytest.mark.parametrize("message", RUBBISH.values(), ids=RUBBISH)
def test_what_is_no_outcome_is_a_broken_frame_and_executes_nothing(message: bytes) -> None:
    with pytest.raises(BrokenFrame):
        decode_outcomes(message, ACCEPT)
    assert EXECUTED == []


@settings(deadline=None)
@given(st.data())
def test_outcomes_with_anything_anywhere_are_outcomes_or_a_broken_frame(data: st.DataObject) -> None:
    raw = bytearray(encode_outcomes([Outcome(1), Outcome(2, publish=(MESSAGE,), result=MESSAGE)], ACCEPT))
    if data.draw(st.booleans()):
        raw = bytearray(encode_outcomes([Outcome(1, runtime=0.1), Outcome(2, summary="x")], ACCEPT))
    for _ in range(data.draw(st.integers(1, 5))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))

    with contextlib.suppress(BrokenFrame):
        for outcome in decode_outcomes(bytes(raw), ACCEPT):
            assert isinstance(outcome.answer, Answer)


def test_pieces_that_never_end_are_a_broken_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "LONGEST", 3 * PIECE)
    frame_reader = FrameReader()
    piece = memoryview(b"\x01" + b"x" * PIECE)
    for _ in range(3):
        frame_reader.feed(piece)

    with pytest.raises(BrokenFrame):
        frame_reader.feed(piece)


@pytest.mark.parametrize("size", [PIECE + 1, 2 * PIECE, 2 * PIECE + 1, 1_000_000])
def test_a_long_message_is_cut_and_joined(size: int) -> None:
    message = bytes(range(256)) * (size // 256) + b"!" * (size % 256)
    packets = cut(message)
    frame_reader = FrameReader()
    joined = [frame_reader.feed(memoryview(packet)) for packet in packets]

    assert max(map(len, packets)) <= PIECE + 1
    assert [packet[0] == LAST for packet in packets] == [False] * (len(packets) - 1) + [True]
    assert joined == [None] * (len(packets) - 1) + [message]


@pytest.mark.parametrize("kind", [None, socket.SOCK_DGRAM])
def test_either_holder_of_the_reading_end_gets_whole_packets(kind: int | None) -> None:
    ours, theirs = socket_pair(kind)
    for packet in (b"1", b"22", b"3" * PIECE):
        ours.send(packet)
    twin = theirs.dup()

    assert [theirs.recv(PIECE), twin.recv(PIECE), theirs.recv(PIECE)] == [b"1", b"22", b"3" * PIECE]
    with pytest.raises(BlockingIOError):
        twin.recv(PIECE, socket.MSG_DONTWAIT)
    for end in (ours, theirs, twin):
        end.close()

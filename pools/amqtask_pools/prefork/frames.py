"""Packets between parent and child: a request each, or a batch of outcomes; large messages are cut into pieces.

SOCK_SEQPACKET keeps packet borders and gives each packet to exactly one reader, the first process with the reading end that
reads: so the parent can take back packets that a child has not read yet (see children.py).

The first byte is the packet's type. A pickle begins with REQUEST (the opcode PROTO), so a complete message needs no frame.

Requests are pickles: only the parent writes them. Any code in a child can write to its socket, which the parent reads: outcomes
are therefore in a format whose reading executes no code (see below), and every other packet is a BrokenFrame.
"""

from __future__ import annotations

import base64
import contextlib
import json
import pickle
import socket
import struct
from collections.abc import Callable, Sequence
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from math import isfinite
from typing import TYPE_CHECKING, Any

from amqtask import states
from amqtask.exceptions import EncodeError, InvalidTaskError
from amqtask.execution.request import HELD, Answer, Outcome, Request, of_success
from amqtask.ground.printable import described
from amqtask.protocol.chord import ChordPart
from amqtask.protocol.entities import Declaration, as_document, from_document
from amqtask.protocol.message import Message, Properties
from amqtask.protocol.serialization import JSON, MSGPACK, PICKLE, YAML, Encoded, dumps, loads
from amqtask.protocol.task import saferepr

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonObject

REQUEST, PART, LAST, READY, STOP, OUTCOMES, SUCCESSES = 0x80, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06
IS_READY, GO = bytes([READY]), bytes([STOP])
# A complete packet must fit into the socket's send buffer.
PIECE = 60 * 1024
BUFFER = 1024 * 1024
# The longest message that is joined from pieces: no broker takes half as much (its `max_message_size`).
LONGEST = 1 << 30
# Datagram sockets do not notice the parent's end: with them children look for the parent after so many seconds.
LOOK_FOR_PARENT = 1
_PROTOCOL = pickle.HIGHEST_PROTOCOL


def encode_request(request: Request) -> bytes:
    """One message; cut it when it is longer than PIECE. Raises: InvalidTaskError for headers that cannot be pickled."""
    try:
        return pickle.dumps(request.to_frame(), _PROTOCOL)
    except (RecursionError, pickle.PicklingError, TypeError, ValueError, AttributeError) as error:
        raise InvalidTaskError(
            f"the message cannot be handed to a child process: {type(error).__name__}: {error}"
        ) from error


def decode_request(message: bytes | memoryview) -> Request:
    """The request that `encode_request` wrote."""
    return Request.from_frame(pickle.loads(message))


def number_of(message: bytes | memoryview) -> int:
    """The number of an encoded request."""
    number: int = pickle.loads(message)[0]
    return number


def cut(message: bytes) -> list[bytes]:
    """The packets of a long message."""
    pieces = [message[start : start + PIECE] for start in range(0, len(message), PIECE)]
    packet_types = [PART] * (len(pieces) - 1) + [LAST]
    return [bytes([packet_type]) + piece for packet_type, piece in zip(packet_types, pieces, strict=True)]


class BrokenFrame(Exception):
    """A packet that the other end would never write."""


class FrameReader:
    """ChordJoiner the pieces of messages of one direction."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0

    def feed(self, packet: memoryview) -> bytes | None:
        """The message, when this packet was its last piece. Raises: BrokenFrame."""
        if len(packet) == 0 or packet[0] not in (PART, LAST):
            raise BrokenFrame(f"a packet that begins with {bytes(packet[:20])!r}")
        self._size += len(packet) - 1
        if self._size > LONGEST:
            raise BrokenFrame(f"a message of more than {LONGEST:,} bytes")
        self._pieces.append(bytes(packet[1:]))
        if packet[0] == PART:
            return None
        message = b"".join(self._pieces)
        self._pieces.clear()
        self._size = 0
        return message


def socket_pair(socket_type: int | None = None) -> tuple[socket.socket, socket.socket]:
    """(parent's end, child's end). Datagram sockets where there is no SOCK_SEQPACKET (macOS): the same, but without hang-ups."""
    if socket_type is None:
        try:
            return socket_pair(socket.SOCK_SEQPACKET)
        except OSError:
            socket_type = socket.SOCK_DGRAM
    ends = socket.socketpair(socket.AF_UNIX, socket_type)
    for end in ends:
        end.settimeout(None)  # whatever a user's module has set with socket.setdefaulttimeout
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, BUFFER)
    if socket_type == socket.SOCK_DGRAM:
        # A timeout by the kernel: with Python's every read would wait, even with MSG_DONTWAIT.
        ends[1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", LOOK_FOR_PARENT, 0))
    return ends


# -- Outcomes as bytes, from a child to its parent: JSON for texts and numbers, followed by the bodies of messages.
#
# The parent reads bytes that any code in the child may have written. So reading makes only plain data and our own
# dataclasses, each field of which is checked, and raises BrokenFrame for anything else. Only the signature of a chord's body
# has values of a task; it is written by a serializer that the application accepts from its producers, too (`accept`), or as JSON.
#
#     OUTCOMES, the length of the text, the text: a list of rows, then the bodies of their messages, one after the other
#
# A row is an outcome's fields in their order, with `publish`, `result`, `parts` and `going_on` written as documents, and `calls`
# as rows. The row of a successful task has three fields, number, runtime and summary, a fourth if there is a result to publish,
# and a fifth if there are parts of chords.
#
# Where all have succeeded, without a message to publish, only those three fields are sent, column by column:
#
#     SUCCESSES, how many, the numbers (64 bits each), the runtimes (floats), the summaries as a JSON list, or nothing where
# all are     empty (neither a log nor an event needs them)

_HEAD = struct.Struct(">BI")
# A value that JSON does not have becomes a table with one of these names; no header begins like that.
_TIME, _BYTES, _DECIMAL, _NONE = "\0time", "\0bytes", "\0decimal", "\0none"
_STATES = states.ALL_STATES | {states.REJECTED, states.IGNORED, HELD}
_FIELDS = Outcome._fields
_PUBLISH, _RESULT, _PARTS, _GOING_ON, _CALLS = (
    _FIELDS.index(name) for name in ("publish", "result", "parts", "going_on", "calls")
)
# The types of the other fields, by their defaults; an Answer is written as its number.
_FIELD_TYPES = tuple(
    (index, int if name in ("number", "answer") else type(Outcome._field_defaults[name]))
    for index, name in enumerate(_FIELDS)
    if index not in (_PUBLISH, _RESULT, _PARTS, _GOING_ON, _CALLS)
)
_ANSWER, _STATE, _RUNTIME, _PAUSE, _TICKETS, _PLACES = (
    _FIELDS.index(name) for name in ("answer", "state", "runtime", "pause", "tickets", "places")
)
# Fields that are not in a short row begin here: all but the number, the result, runtime and summary.
_REST = _RUNTIME + 2
_BARE = Outcome(0)
_BEFORE, _BEHIND = _BARE[1:_RESULT], _BARE[_REST:]
_BEFORE_PARTS, _BEHIND_PARTS = _BARE[_REST:_PARTS], _BARE[_PARTS + 1 :]
# The same where the result is none, too.
_BEFORE_RUNTIME = _BARE[1:_RUNTIME]
assert _FIELDS[_RESULT:_REST] == ("result", "runtime", "summary")
_SUCCESS_SIZE = struct.calcsize(">qd")
_TEXT, _NUMBER = frozenset({str}), frozenset({int})
# Bytes: the body of a chord that is longer is read anew for each part, and not kept.
_REMEMBERED = 4096
# Longer than any task runs, or any outcome waits (seconds).
_FOR_EVER = 1e10
# Serializers for a part's body; the first ones keep types best.
_SERIALIZERS = ((PICKLE, "pickle"), (MSGPACK, "msgpack"), (YAML, "yaml"), (JSON, "json"))


# The types that a property may have; whether a value is valid, the publisher checks.
_SCALARS = frozenset({type(None), str, int, float, bool, datetime, Decimal, bytes})


class _Formless:
    """A header's value that AMQP cannot encode: the publisher refuses it, and shows its repr."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


# -- writing


def encode_outcomes(outcomes: Sequence[Outcome], accept: frozenset[str]) -> bytes:
    """One message; cut it when it is longer than PIECE. `accept` are the content types that the application reads."""
    for outcome in outcomes:
        if outcome[1:_RUNTIME] != _BEFORE_RUNTIME or outcome[_REST:] != _BEHIND:
            break
    else:
        # A step of a chain in a worker that has had billions of tasks has a number of more than 64 bits.
        with contextlib.suppress(struct.error):
            return _successes(outcomes)
    writer = _Writer(accept)
    rows = [writer.row(outcome) for outcome in outcomes]
    try:
        text = _dump(rows).encode()
    except (TypeError, ValueError, RecursionError):
        writer = _Writer(accept, headers=_writable)
        text = _dump([writer.row(outcome) for outcome in outcomes]).encode()
    return b"".join((_HEAD.pack(OUTCOMES, len(text)), text, *writer.bodies))


def _successes(outcomes: Sequence[Outcome]) -> bytes:
    count = len(outcomes)
    numbers, runtimes = [outcome.number for outcome in outcomes], [outcome.runtime for outcome in outcomes]
    summaries = [outcome.summary for outcome in outcomes]
    columns = struct.pack(f">BI{count}q{count}d", SUCCESSES, count, *numbers, *runtimes)
    return columns + _dump(summaries).encode() if any(summaries) else columns


def _special(value: object) -> object:
    if isinstance(value, datetime):
        return {_TIME: value.isoformat()}
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {_BYTES: base64.b64encode(bytes(value)).decode()}
    if isinstance(value, Decimal):
        return {_DECIMAL: str(value)}
    return {_NONE: saferepr(value)}


_dump = json.JSONEncoder(default=_special, separators=(",", ":")).encode


class _Writer:
    def __init__(self, accept: frozenset[str], headers: Callable[[Any], object] = lambda table: table) -> None:
        self.bodies: list[bytes] = []
        self._accept = accept
        self._headers = headers

    def row(self, outcome: Outcome) -> Sequence[object]:
        if (
            outcome[1:_RESULT] == _BEFORE
            and outcome[_REST:_PARTS] == _BEFORE_PARTS
            and outcome[_PARTS + 1 :] == _BEHIND_PARTS
        ):
            return self._short_row(outcome)
        row: list[object] = [*outcome]
        row[_PUBLISH] = [self._message(message) for message in outcome.publish]
        if outcome.result is not None:
            row[_RESULT] = self._message(outcome.result)
        row[_PARTS] = [self._part(part) for part in outcome.parts]
        if outcome.going_on is not None:
            row[_GOING_ON] = outcome.going_on.until
        row[_CALLS] = [self.row(call) for call in outcome.calls]
        return row

    def _short_row(self, outcome: Outcome) -> Sequence[object]:
        result = None if outcome.result is None else self._message(outcome.result)
        if outcome.parts:
            parts = [self._part(part) for part in outcome.parts]
            return outcome.number, outcome.runtime, outcome.summary, result, parts
        if result is not None:
            return outcome.number, outcome.runtime, outcome.summary, result
        return outcome.number, outcome.runtime, outcome.summary

    def _message(self, message: Message) -> list[object]:
        _, properties = message.properties.__reduce__()
        self.bodies.append(message.body)
        return [
            len(message.body),
            str(message.exchange),
            str(message.routing_key),
            _declare_text(message.declare) if message.declare else "",
            bool(message.mandatory),
            *properties[:2],
            self._headers(properties[2]),
            *properties[3:],
        ]

    def _part(self, part: ChordPart) -> list[object]:
        body = _body_of(part, self._accept)
        self.bodies.append(body.body)
        document = [len(body.body), body.content_type, body.content_encoding]
        return [part.group_id, part.task_id, part.size, document, self._message(part.message), part.is_broken]


# The body that was written last, by the queue of its chord (whose name nobody can guess): all its parts have the same.
_last_body: dict[tuple[str, frozenset[str]], Encoded] = {}


def _body_of(part: ChordPart, accept: frozenset[str]) -> Encoded:
    key = part.queue, accept
    body = _last_body.get(key)
    if body is None:
        body = _write_body(part, accept)
        _last_body.clear()
        if len(body.body) <= _REMEMBERED:
            _last_body[key] = body
    return body


def _write_body(part: ChordPart, accept: frozenset[str]) -> Encoded:
    for content_type, name in _SERIALIZERS:
        if content_type in accept or content_type == JSON:
            with contextlib.suppress(EncodeError):
                return dumps(part.body, name)
    raise EncodeError(
        f"the body of chord {part.group_id} cannot be written by any serializer of accept_content, nor as JSON"
    )


def _writable(headers: object) -> object:
    """Headers that JSON can write. Other values have no AMQP form either: their publisher refuses them."""
    try:
        _dump(headers)
    except (TypeError, ValueError, RecursionError) as error:
        return {"headers": _Formless(f"{saferepr(headers)} ({error})")}
    return headers


@lru_cache(maxsize=256)
def _declare_text(declare: tuple[Declaration, ...]) -> str:
    return _dump([as_document(entity) for entity in declare])


# -- reading


def decode_outcomes(message: bytes | memoryview, accept: frozenset[str]) -> list[Outcome]:
    """The outcomes that `encode_outcomes` wrote; `going_on` is only the step's `until`. Raises: BrokenFrame."""
    try:
        if message[0] == SUCCESSES:
            return _read_successes(message)
        _, size = _HEAD.unpack_from(message)
        text = str(message[_HEAD.size : _HEAD.size + size], "ascii")
        reader = _Reader(memoryview(message)[_HEAD.size + size :], accept)
        return [reader.outcome(row) for row in _load(text)]
    except BrokenFrame:
        raise
    except Exception as error:  # bytes of any shape
        raise BrokenFrame(f"{type(error).__name__}: {error}"[:200]) from error


def _read_successes(message: bytes | memoryview) -> list[Outcome]:
    _, count = _HEAD.unpack_from(message)
    values = struct.unpack_from(f">{count}q{count}d", message, _HEAD.size)
    numbers, runtimes = values[:count], values[count:]
    for runtime in runtimes:
        if not 0 <= runtime < _FOR_EVER:
            raise BrokenFrame(f"an outcome of {runtime!r} s")
    text = str(message[_HEAD.size + count * _SUCCESS_SIZE :], "ascii")
    if not text:
        return [*map(of_success, numbers, runtimes)]
    summaries = _load_plain(text)
    if type(summaries) is not list or len(summaries) != count or not _TEXT.issuperset(map(type, summaries)):
        raise BrokenFrame(f"{count} outcomes with other summaries")
    return [*map(of_success, numbers, runtimes, summaries)]


def _rich(table: JsonObject) -> object:
    if len(table) == 1:
        ((name, value),) = table.items()
        match name:
            case "\0time":
                return datetime.fromisoformat(value)
            case "\0bytes":
                return base64.b64decode(value)
            case "\0decimal":
                return Decimal(value)
            case "\0none":
                return _Formless(str(value))
    return table


_load_plain = json.JSONDecoder().decode
_load_rich = json.JSONDecoder(object_hook=_rich).decode


def _load(text: str) -> Any:
    return _load_rich(text) if "\\u0000" in text else _load_plain(text)


class _Reader:
    def __init__(self, bodies: memoryview, accept: frozenset[str]) -> None:
        self._bodies = bodies
        self._offset = 0
        self._accept = accept

    def outcome(self, row: list[Any]) -> Outcome:
        if len(row) <= 5:
            number, runtime, summary, *more = row
            if type(number) is int and type(runtime) is float and 0 <= runtime < _FOR_EVER and type(summary) is str:
                result = self._message(more[0]) if more and more[0] is not None else None
                parts = tuple([self._part(document) for document in more[1]]) if len(more) > 1 else ()
                return of_success(number, runtime, summary, result=result, parts=parts)
        if len(row) != len(_FIELDS):
            raise BrokenFrame(f"an outcome of {len(row)} fields")
        for index, field_type in _FIELD_TYPES:
            if type(row[index]) is not field_type:
                _check(_FIELDS[index], row[index], field_type)
        if row[_STATE] not in _STATES or not (0 <= row[_RUNTIME] < _FOR_EVER and 0 <= row[_PAUSE] < _FOR_EVER):
            raise BrokenFrame(f"an outcome {row[_STATE]!r} of {row[_RUNTIME]!r} s, with a pause of {row[_PAUSE]!r} s")
        if not (_NUMBER.issuperset(map(type, row[_TICKETS].values())) and _TEXT.issuperset(map(type, row[_PLACES]))):
            raise BrokenFrame("tickets or places that are none")
        row[_ANSWER] = Answer(row[_ANSWER])
        row[_PUBLISH] = tuple([self._message(document) for document in row[_PUBLISH]]) if row[_PUBLISH] else ()
        if row[_RESULT] is not None:
            row[_RESULT] = self._message(row[_RESULT])
        row[_PARTS] = tuple([self._part(document) for document in row[_PARTS]]) if row[_PARTS] else ()
        until = row[_GOING_ON]
        if until is not None and not (isinstance(until, float) and isfinite(until)):
            raise BrokenFrame(f"a step until {until!r}")
        row[_CALLS] = tuple([self.outcome(call) for call in row[_CALLS]]) if row[_CALLS] else ()
        return Outcome._make(row)

    def _message(self, document: list[Any]) -> Message:
        size, exchange, routing_key, declare, mandatory, content_type, content_encoding, headers, *scalars = document
        if not type(exchange) is type(routing_key) is str or type(mandatory) is not bool or type(headers) is not dict:
            raise BrokenFrame("a message that goes nowhere")
        if not _SCALARS.issuperset(map(type, scalars)):
            scalars = [value if type(value) in _SCALARS else _Formless(saferepr(value)) for value in scalars]
        return Message(
            self._body(size),
            Properties(content_type, content_encoding, headers, *scalars),
            exchange,
            routing_key,
            _declare(declare) if declare else (),
            mandatory,
        )

    def _part(self, document: list[Any]) -> ChordPart:
        group_id, task_id, size, (length, content_type, content_encoding), message, is_broken = document
        content = self._body(length)
        read = _read_body if length > _REMEMBERED else _read_body_once
        body = read(content, content_type, content_encoding, self._accept)
        if not type(group_id) is type(task_id) is str or type(size) is not int or type(is_broken) is not bool:
            raise BrokenFrame("a part of no chord")
        return ChordPart(group_id, task_id, size, body, self._message(message), is_broken)

    def _body(self, size: int) -> bytes:
        offset = self._offset
        if type(size) is not int or not 0 <= size <= len(self._bodies) - offset:
            raise BrokenFrame("a body that is not there")
        self._offset = end = offset + size
        return bytes(self._bodies[offset:end])


def _read_body(content: bytes, content_type: str, content_encoding: str, accept: frozenset[str]) -> dict[str, Any]:
    body = loads(content, content_type, content_encoding, accept | {JSON})
    _check("the body of a chord", body, dict)
    return body  # type: ignore[no-any-return] # checked


# All parts of a chord have the same, which nobody changes in place.
_read_body_once = lru_cache(maxsize=16)(_read_body)


def _check(name: str, value: object, expected_type: type | tuple[type, ...]) -> None:
    if expected_type is float and type(value) is int:
        return
    if not isinstance(value, expected_type) or (type(value) is bool and expected_type is not bool):
        raise BrokenFrame(f"{name} is {described(value)}")


@lru_cache(maxsize=256)
def _declare(text: str) -> tuple[Declaration, ...]:
    return tuple(from_document(document) for document in _load(text))

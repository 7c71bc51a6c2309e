"""An AMQP 0-9-1 client that writes what no library writes: raw properties, raw tables, any field type, any bytes.

Frames and classes: https://www.rabbitmq.com/amqp-0-9-1-reference; field types: https://www.rabbitmq.com/amqp-0-9-1-errata.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from typing_extensions import Self

FRAME_MAX = 131_072
# What a frame has room for, beside its own eight bytes.
ROOM = FRAME_MAX - 8
_METHOD, _HEADER, _BODY, _END = 1, 2, 3, b"\xce"


class Field(NamedTuple):
    """One field value as it goes over the wire: its type and its bytes."""

    kind: bytes
    payload: bytes


class Pairs(tuple[tuple[bytes, Any], ...]):
    """A table that may name a field twice, and in any bytes."""


def encode_value(value: Any) -> bytes:
    """A field value with its type in front."""
    match value:
        case Field():
            return value.kind + value.payload
        case None:
            return b"V"
        case bool():
            return b"t" + bytes([value])
        case int():
            short = -(2**31) <= value < 2**31
            return struct.pack(">ci", b"I", value) if short else struct.pack(">cq", b"l", value)
        case float():
            return struct.pack(">cd", b"d", value)
        case str():
            return b"S" + long_string(value.encode("utf-8", "surrogatepass"))
        case bytes():
            return b"S" + long_string(value)
        case Mapping() | Pairs():
            return b"F" + encode_table(value)
        case list() | tuple():
            return b"A" + long_string(b"".join(encode_value(item) for item in value))
    raise TypeError(f"no field type for {value!r}")


def encode_table(table: Mapping[str, Any] | Pairs) -> bytes:
    """A field table."""
    items: Iterable[tuple[Any, Any]] = table.items() if isinstance(table, Mapping) else table
    return long_string(b"".join(short_string(name) + encode_value(value) for name, value in items))


def short_string(text: str | bytes) -> bytes:
    """At most 255 bytes; what is beyond is cut off."""
    raw = (text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)[:255]
    return bytes([len(raw)]) + raw


def long_string(raw: bytes) -> bytes:
    """A length of four bytes, and the bytes."""
    return struct.pack(">I", len(raw)) + raw


# The properties of a basic message in the order of their flags, each with its form: a string, a table, an octet, a time.
PROPERTIES = {
    "content_type": "s", "content_encoding": "s", "headers": "F", "delivery_mode": "o", "priority": "o",
    "correlation_id": "s", "reply_to": "s", "expiration": "s", "message_id": "s", "timestamp": "T", "type": "s",
    "user_id": "s", "app_id": "s", "cluster_id": "s",
}  # fmt: skip


def encode_properties(properties: Mapping[str, Any]) -> bytes:
    """The property flags and list of a content header."""
    flags, pieces = 0, []
    for place, (name, form) in enumerate(PROPERTIES.items()):
        if name not in properties:
            continue
        flags |= 1 << (15 - place)
        value = properties[name]
        match form:
            case "s":
                pieces.append(short_string(value))
            case "F":
                pieces.append(encode_table(value))
            case "o":
                pieces.append(bytes([value]))
            case _:
                pieces.append(struct.pack(">Q", value))
    return struct.pack(">H", flags) + b"".join(pieces)


def decode_properties(raw: bytes) -> dict[str, bytes]:
    """The properties as bytes; the table of headers is left as it is."""
    (flags,), offset = struct.unpack_from(">H", raw), 2
    found: dict[str, bytes] = {}
    for place, (name, form) in enumerate(PROPERTIES.items()):
        if not flags & 1 << (15 - place):
            continue
        match form:
            case "s":
                offset, size = offset + 1, raw[offset]
            case "F":
                offset, size = offset + 4, struct.unpack_from(">I", raw, offset)[0]
            case "o":
                size = 1
            case _:
                size = 8
        found[name] = raw[offset : offset + size]
        offset += size
    return found


@dataclass(slots=True)
class RawMessage:
    """What is published: where to, a content header's properties, a body."""

    properties: dict[str, Any]
    body: bytes
    exchange: str = ""
    routing_key: str = ""

    def frames(self, channel: int = 1) -> bytes:
        """Method, header and body frames. Raises: ValueError where the header does not fit a frame."""
        head = struct.pack(">HHQ", 60, 0, len(self.body)) + encode_properties(self.properties)
        if len(head) > ROOM:
            raise ValueError(f"a content header of {len(head)} bytes")
        method = struct.pack(">HHH", 60, 40, 0) + short_string(self.exchange) + short_string(self.routing_key) + b"\0"
        frames = [frame(_METHOD, channel, method), frame(_HEADER, channel, head)]
        frames += [frame(_BODY, channel, self.body[at : at + ROOM]) for at in range(0, len(self.body), ROOM)]
        return b"".join(frames)


def frame(kind: int, channel: int, payload: bytes) -> bytes:
    """One frame."""
    return struct.pack(">BHI", kind, channel, len(payload)) + payload + _END


class Refused(Exception):
    """The broker closed the channel or the connection; the text is its own."""


@dataclass(slots=True)
class RawConnection:
    """One connection with one channel that confirms; it is of no use after `Refused`."""

    url: str
    name: str = "fuzz"
    timeout: float = 60.0
    _socket: socket.socket = field(init=False)
    _unread: bytearray = field(default_factory=bytearray)
    # Publishes as confirms count them: how many, and the numbers of those that have none yet.
    _published: int = 0
    _unconfirmed: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        address = urlsplit(self.url)
        self._socket = socket.create_connection((address.hostname or "", address.port or 5672), self.timeout)
        self._socket.sendall(b"AMQP\x00\x00\x09\x01")
        self._await(10, 10)
        login = f"\0{unquote(address.username or '')}\0{unquote(address.password or '')}".encode()
        client = encode_table({"connection_name": self.name, "capabilities": {"basic.nack": True}})
        self._method(0, 10, 11, client + short_string("PLAIN") + long_string(login) + short_string("en_US"))
        self._await(10, 30)
        self._method(0, 10, 31, struct.pack(">HIH", 16, FRAME_MAX, 0))
        self._method(0, 10, 40, short_string(unquote(address.path[1:]) or "/") + b"\0\0")
        self._await(10, 41)
        self._method(1, 20, 10, b"\0")
        self._await(20, 11)
        self._method(1, 85, 10, b"\0")
        self._await(85, 11)

    def publish(self, messages: Sequence[RawMessage]) -> None:
        """Publish and wait for all confirms. Raises: Refused (what was confirmed before is unknown)."""
        frames = b"".join(message.frames() for message in messages)
        self._unconfirmed.update(range(self._published + 1, self._published + len(messages) + 1))
        self._published += len(messages)
        self._send(frames)
        while self._unconfirmed:
            self._next()

    def declare(self, queue: str, arguments: Mapping[str, Any] | None = None) -> None:
        """A durable queue."""
        self._method(1, 50, 10, b"\0\0" + short_string(queue) + b"\x02" + encode_table(arguments or {}))
        self._await(50, 11)

    def ready(self, queue: str) -> int:
        """How many messages wait there that nobody has."""
        self._method(1, 50, 10, b"\0\0" + short_string(queue) + b"\x01" + encode_table({}))
        told = self._await(50, 11)
        (count,) = struct.unpack_from(">I", told, 1 + told[0])
        return int(count)

    def drain(self, queue: str) -> Iterator[tuple[dict[str, bytes], bytes]]:
        """Take all messages out of a queue: raw properties and body each."""
        while True:
            self._method(1, 60, 70, b"\0\0" + short_string(queue) + b"\1")
            while True:
                kind, payload = self._next()
                if payload[:4] in (b"\x00\x3c\x00\x47", b"\x00\x3c\x00\x48") and kind == _METHOD:
                    break
            if payload[3] == 0x48:
                return
            _, head = self._next()
            (size,) = struct.unpack_from(">Q", head, 4)
            body = bytearray()
            while len(body) < size:
                body += self._next()[1]
            yield decode_properties(head[12:]), bytes(body)

    def close(self) -> None:
        """Drop the connection."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _method(self, channel: int, class_id: int, method_id: int, arguments: bytes) -> None:
        self._send(frame(_METHOD, channel, struct.pack(">HH", class_id, method_id) + arguments))

    def _await(self, class_id: int, method_id: int) -> bytes:
        while True:
            kind, payload = self._next()
            if kind == _METHOD and struct.unpack_from(">HH", payload) == (class_id, method_id):
                return payload[4:]

    def _next(self) -> tuple[int, bytes]:
        """One frame; confirms are noted, a close is raised."""
        head = self._read(7)
        kind, _, size = struct.unpack(">BHI", head)
        payload = self._read(size + 1)[:-1]
        if kind == _METHOD:
            self._note(payload)
        return kind, payload

    def _note(self, payload: bytes) -> None:
        match struct.unpack_from(">HH", payload):
            case (60, 80) | (60, 120):
                tag, several = struct.unpack_from(">QB", payload, 4)
                ended = {number for number in self._unconfirmed if number <= tag} if several else {tag}
                self._unconfirmed -= ended
            case (20, 40) | (10, 50):
                code, length = struct.unpack_from(">HB", payload, 4)
                self.close()
                raise Refused(f"{code} {payload[7 : 7 + length].decode(errors='replace')}")

    def _send(self, frames: bytes) -> None:
        try:
            self._socket.sendall(frames)
        except OSError as error:
            raise Refused(f"connection lost: {error}") from error

    def _read(self, size: int) -> bytes:
        while len(self._unread) < size:
            try:
                more = self._socket.recv(1 << 16)
            except OSError as error:
                raise Refused(f"connection lost: {error}") from error
            if not more:
                raise Refused("connection closed")
            self._unread += more
        found = bytes(self._unread[:size])
        del self._unread[:size]
        return found

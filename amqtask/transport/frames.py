"""AMQP frames: methods to bytes, and bytes to methods; pure functions around pika's encoders and decoders.

A frame is its type, channel and size, the payload, and a mark for its end (AMQP 0-9-1, sections 2.3.5 and 4.2).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from pika import frame, spec

from amqtask.ground.interrupts import is_own
from amqtask.protocol.message import Message
from amqtask.transport.content import FRAME_MAX, FRAMING, basic_properties, check_frame

if TYPE_CHECKING:
    from amqtask.protocol.message import PropertiesLike

T = TypeVar("T")
# The one channel that a link speaks on.
CHANNEL = 1
GREETING = frame.ProtocolHeader().marshal()
HEARTBEAT = frame.Heartbeat().marshal()
_HEAD, _END = 7, 1
_head = struct.Struct(">BHL").unpack_from
_content_head = struct.Struct(">HHQ").unpack_from


class Unreadable(Exception):
    """Bytes that are no AMQP 0-9-1 frame."""


class Frames:
    """Cuts the bytes that come into frames."""

    def __init__(self) -> None:
        self._buffer = b""
        self.frame_max = FRAME_MAX

    def feed(self, data: bytes) -> list[tuple[int, int, bytes]]:
        """The frames that are complete: type, channel, payload. Raises: Unreadable."""
        buffer = self._buffer + data if self._buffer else data
        frames = []
        offset = 0
        while len(buffer) - offset >= _HEAD:
            frame_type, channel, size = _head(buffer, offset)
            if not spec.FRAME_METHOD <= frame_type <= spec.FRAME_HEARTBEAT or size > self.frame_max:
                raise Unreadable(f"this is not AMQP 0-9-1: {buffer[offset : offset + 16]!r}")
            begin = offset + _HEAD
            end = begin + size
            if len(buffer) <= end:
                break
            if buffer[end] != spec.FRAME_END:
                raise Unreadable(f"a frame has no end: {buffer[end : end + 16]!r}")
            frames.append((frame_type, channel, buffer[begin:end]))
            offset = end + _END
        self._buffer = buffer[offset:]
        return frames


# -- from the broker


def decode_method(payload: bytes) -> Any:
    """pika's object of a method. Raises: Unreadable."""

    def decode() -> object:
        return spec.methods[struct.unpack_from(">I", payload)[0]]().decode(payload, 4)

    method, error = attempt(decode)
    if error is not None:
        raise Unreadable(f"a method cannot be read: {error!r}") from error
    return method


def content_size(payload: bytes) -> int:
    """How long the body will be."""
    size: int = _content_head(payload)[2]
    return size


def decode_properties(payload: bytes) -> tuple[PropertiesLike, Exception | None]:
    """The properties of a message, and the error when they cannot be read."""
    properties, error = attempt(lambda: spec.BasicProperties().decode(payload, _content_head_size))
    return (spec.BasicProperties() if properties is None else properties), error


_content_head_size = struct.calcsize(">HHQ")


# -- to the broker


def encode_method(method: Any, channel: int = CHANNEL) -> bytes:
    """A method's frame. Raises: pika's errors for a value that AMQP cannot encode."""
    encoded: bytes = frame.Method(channel, method).marshal()
    return encoded


def encode_publish(message: Message, frame_max: int) -> bytes:
    """The frames of basic.publish. Raises: FrameTooLarge, and pika's errors for a value that AMQP cannot encode."""
    body = message.body
    method = spec.Basic.Publish(exchange=message.exchange, routing_key=message.routing_key, mandatory=message.mandatory)
    header = frame.Header(CHANNEL, len(body), basic_properties(message.properties)).marshal()
    check_frame(len(header), frame_max)
    pieces = [frame.Method(CHANNEL, method).marshal(), header]
    piece = frame_max - FRAMING
    pieces += [frame.Body(CHANNEL, body[at : at + piece]).marshal() for at in range(0, len(body), piece)]
    return b"".join(pieces)


def attempt(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The result of a pure function, or its error.

    An exception that was raised into it from outside (by a signal handler, another thread) passes through."""
    try:
        return function(), None
    except Exception as error:
        if not is_own(error, function):
            raise
        return None, error

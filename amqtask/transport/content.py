"""A message's properties as AMQP writes them, and what AMQP does not write.

The broker answers a frame that it cannot read, or that is larger than `frame_max`, by closing the connection, with all messages
under way on it, and does so each time the message is sent again. So such a message has to fail here, alone, before any of it is
written:

- pika's connections check each encoded frame before it is written (see Wire);
- all other publishers call `encode_properties`, which returns the bytes that pika would write.
"""

from __future__ import annotations

import struct
from datetime import datetime

import pika
from pika.exceptions import AMQPError, UnsupportedAMQPFieldException

from amqtask.exceptions import MessageTooLarge, PublishError
from amqtask.protocol.message import Message, Properties
from amqtask.protocol.task import saferepr
from amqtask.transport.fields import install

# The frame_max in use when neither end asks for less; RabbitMQ's default.
FRAME_MAX = 131_072
# Bytes of a frame besides its payload: type, channel, size, and a mark for its end.
FRAMING = 8
# Characters of a value, or of pika's text about one, that an error shows.
SHOWN = 100
# Bytes of a content header besides the properties: class, weight, and the body's size.
_HEADER_HEAD = 12
# Errors that pika raises for a message that AMQP cannot encode; pika encodes all of it before it writes anything.
UNWRITABLE = (
    AMQPError,
    struct.error,
    TypeError,
    ValueError,
    AssertionError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class FrameTooLarge(AMQPError):  # type: ignore[misc]  # pika is untyped here
    """The broker would close the connection for this frame; nothing of it was written."""

    def __init__(self, size: int, frame_max: int) -> None:
        super().__init__(f"a frame of {size:,} bytes, and frame_max is {frame_max:,}")
        self.size = size
        self.frame_max = frame_max


def check_frame(size: int, frame_max: int) -> None:
    """Raises: FrameTooLarge when `size` (bytes, framing included) is above `frame_max`; a `frame_max` of 0 is no limit."""
    if size > frame_max > 0:
        raise FrameTooLarge(size, frame_max)


def basic_properties(properties: Properties) -> pika.BasicProperties:
    """pika's form of our properties."""
    timestamp = properties.timestamp
    return pika.BasicProperties(
        content_type=properties.content_type,
        content_encoding=properties.content_encoding,
        headers=properties.headers,
        delivery_mode=properties.delivery_mode,
        priority=properties.priority,
        correlation_id=properties.correlation_id,
        reply_to=properties.reply_to,
        expiration=properties.expiration,
        message_id=properties.message_id,
        timestamp=int(timestamp.timestamp()) if isinstance(timestamp, datetime) else timestamp,
        type=properties.type,
        user_id=properties.user_id,
        app_id=properties.app_id,
    )


def encode_properties(message: Message, frame_max: int = FRAME_MAX) -> bytes:
    """The properties as on the wire. Raises: PublishError for values that AMQP cannot encode, MessageTooLarge for headers that
    do not fit into a frame; nothing was sent."""
    install()
    try:
        encoded = b"".join(basic_properties(message.properties).encode())
        check_frame(FRAMING + _HEADER_HEAD + len(encoded), frame_max)
        for name in (message.exchange, message.routing_key):
            if len(name.encode()) > 255:
                raise ValueError(f"{name[:20]!r}… is longer than 255 bytes")
    except UNWRITABLE as error:
        raise unwritable(message, error) from error
    return encoded


def unwritable(message: Message, error: BaseException) -> PublishError:
    """The error for headers or properties that AMQP cannot encode; nothing was sent."""
    to = f"the message for routing key {message.routing_key[:255]!r}"
    if isinstance(error, FrameTooLarge):
        return MessageTooLarge(
            f"{to} cannot be sent: its headers take {error.size:,} bytes, and the broker takes at most {error.frame_max:,} "
            "(frame_max). Arguments have no such limit; put large data there, or store it elsewhere and pass where it is."
        )
    return PublishError(
        f"{to} cannot be written as AMQP: {_reason(error)} "
        "(names and routing keys have at most 255 bytes; headers hold text, finite numbers, dates, lists and tables)"
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, UnsupportedAMQPFieldException) and len(error.args) == 2:  # with all that was encoded before it
        return f"{saferepr(error.args[1], SHOWN)} of type {type(error.args[1]).__name__} has no form there"
    return f"{type(error).__name__}: {error}"[:SHOWN]

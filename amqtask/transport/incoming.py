"""The method and the properties of a delivery, from its bytes: the usual ones are read here, all others by pika.

This is most of a consumer's time per message. The layouts are those of AMQP 0-9-1 (Basic.Deliver; section 4.2.6.1: properties).
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pika import spec

from amqtask.protocol.message import Properties
from amqtask.transport.content import decode_short_string, decode_table

if TYPE_CHECKING:
    from amqtask.protocol.message import PropertiesLike

_flags = struct.Struct(">H").unpack_from
_tag = struct.Struct(">Q").unpack_from
_TAG_SIZE = 8
_FLAGS = spec.BasicProperties
# The properties of task messages, and those that only some have: of callers that want a result, of our publishers.
_USUAL = (
    _FLAGS.FLAG_CONTENT_TYPE
    | _FLAGS.FLAG_CONTENT_ENCODING
    | _FLAGS.FLAG_HEADERS
    | _FLAGS.FLAG_DELIVERY_MODE
    | _FLAGS.FLAG_PRIORITY
    | _FLAGS.FLAG_CORRELATION_ID
)
_REPLY_TO, _MESSAGE_ID = _FLAGS.FLAG_REPLY_TO, _FLAGS.FLAG_MESSAGE_ID
_MANDATORY = ~(_REPLY_TO | _MESSAGE_ID)


def read_deliver(arguments: bytes) -> Any:
    """pika's Basic.Deliver. All but the delivery tag is the same for many messages."""
    tag_begin = 1 + arguments[0]
    (tag,) = _tag(arguments, tag_begin)
    tag_end = tag_begin + _TAG_SIZE
    consumer_tag, redelivered, exchange, routing_key = _without_tag(arguments[:tag_begin] + arguments[tag_end:])
    return spec.Basic.Deliver(consumer_tag, tag, redelivered, exchange, routing_key)


@lru_cache(maxsize=256)
def _without_tag(arguments: bytes) -> tuple[str, bool, str, str]:
    consumer_tag, offset = decode_short_string(arguments, 0)
    redelivered = bool(arguments[offset] & 1)
    exchange, offset = decode_short_string(arguments, offset + 1)
    routing_key, _ = decode_short_string(arguments, offset)
    return consumer_tag, redelivered, exchange, routing_key


def read_properties(encoded: bytes, offset: int) -> PropertiesLike:
    """The properties that begin at `offset`."""
    (flags,) = _flags(encoded, offset)
    if flags & _MANDATORY == _USUAL:
        try:
            return _read_usual(encoded, offset + 2, flags)
        except UnicodeDecodeError:
            pass
    properties: PropertiesLike = spec.BasicProperties().decode(encoded, offset)
    return properties


def _read_usual(encoded: bytes, end: int, flags: int) -> Properties:
    # A short string is its length in one byte, and its bytes.
    begin = end + 1
    end = begin + encoded[end]
    content_type = encoded[begin:end].decode()
    begin = end + 1
    end = begin + encoded[end]
    content_encoding = encoded[begin:end].decode()
    headers, end = decode_table(encoded, end)
    delivery_mode, priority = encoded[end], encoded[end + 1]
    begin = end + 3
    end = begin + encoded[end + 2]
    correlation_id = encoded[begin:end].decode()
    reply_to = message_id = None
    if flags & _REPLY_TO:
        begin = end + 1
        end = begin + encoded[end]
        reply_to = encoded[begin:end].decode()
    if flags & _MESSAGE_ID:
        begin = end + 1
        message_id = encoded[begin : begin + encoded[end]].decode()
    return Properties(
        content_type, content_encoding, headers, delivery_mode, priority, correlation_id, reply_to, None, message_id
    )

"""A message as it lies in Redis: kombu's envelope, JSON around a body in base64 (kombu/transport/virtual/base.py)."""

from __future__ import annotations

import uuid
from base64 import b64decode, b64encode
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from amqtask.protocol.message import LARGEST_HEADERS, Delivery, Message, OddHeaders, Properties
from amqtask.protocol.serialization import content_types, dumps, loads
from amqtask.topology.delays import DelayPlan, due_at
from amqtask.transport.content import encode_properties
from amqtask.transport.redis.layout import check_separator, step_of

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonObject


# What kombu has elsewhere in the envelope.
_ELSEWHERE = frozenset({"content_type", "content_encoding", "headers"})
_NUMBERS = ("delivery_mode", "priority", "timestamp")
_OTHERS = tuple(name for name in Properties.__dataclass_fields__ if name not in _ELSEWHERE)
_TEXTS = tuple(name for name in _OTHERS if name not in _NUMBERS)
_DELAYS = DelayPlan()


class Outgoing(NamedTuple):
    """A message as a script takes it. `due` is Unix time in milliseconds, None: now."""

    message: Message
    exchange: str
    routing_key: str
    step: int
    envelope: bytes
    due: int | None


def outgoing(message: Message) -> Outgoing:
    """The message as Redis gets it; a delayed one without what RabbitMQ needs for it.

    Raises: PublishError for what AMQP cannot write, so that every queue can be moved to RabbitMQ; MessageTooLarge.
    """
    for name in (message.exchange, message.routing_key):
        check_separator(name)
    due = due_at(message.properties.headers or {})
    plain = _DELAYS.undelayed(message)
    encode_properties(plain)
    return Outgoing(
        plain,
        plain.exchange,
        plain.routing_key,
        step_of(plain.properties.priority),
        envelope(plain.body, plain.properties, plain.exchange, plain.routing_key),
        None if due is None or plain is message else int(due * 1000),
    )


def envelope(body: bytes, properties: Properties, exchange: str, routing_key: str) -> bytes:
    """The envelope's text. Raises: EncodeError."""
    fields: JsonObject = {name: value for name in _OTHERS if (value := getattr(properties, name)) is not None}
    if isinstance(properties.timestamp, datetime):
        fields["timestamp"] = int(properties.timestamp.timestamp())
    fields["delivery_info"] = {"exchange": exchange, "routing_key": routing_key}
    fields["priority"] = properties.priority or 0
    fields["body_encoding"] = "base64"
    fields["delivery_tag"] = str(uuid.uuid4())
    document = {
        "body": b64encode(body).decode(),
        "content-encoding": properties.content_encoding,
        "content-type": properties.content_type,
        "headers": properties.headers or {},
        "properties": fields,
    }
    return dumps(document, "json").body


class Incoming(NamedTuple):
    """A message as it was found."""

    body: bytes
    properties: Properties
    exchange: str
    routing_key: str
    redelivered: bool

    def delivery(
        self, queue: str, tag: int, *, failures: int = 0, is_again: bool | None = None, epoch: int = 0
    ) -> Delivery:
        """It as a delivery. `failures`: of its deliveries before. `is_again`: whether it is a redelivery; None: if it says so."""
        return Delivery(
            self.body,
            with_failures(self.properties, failures),
            self.exchange,
            self.routing_key,
            self.redelivered if is_again is None else is_again,
            queue,
            tag,
            epoch,
        )


class _Address(msgspec.Struct):
    exchange: str | None = None
    routing_key: str | None = None
    redelivered: Any = None


class _Fields(msgspec.Struct):
    """AMQP's properties; Celery writes an expiration as a number."""

    body_encoding: str | None = None
    delivery_info: _Address | None = None
    delivery_mode: int | None = None
    priority: int | None = None
    timestamp: int | None = None
    correlation_id: str | None = None
    reply_to: str | None = None
    expiration: str | int | None = None
    message_id: str | None = None
    type: str | None = None
    user_id: str | None = None
    app_id: str | None = None


class _Envelope(msgspec.Struct):
    body: str
    properties: _Fields
    headers: dict[str, Any] | None = None
    content_type: str | None = msgspec.field(name="content-type", default=None)
    content_encoding: str | None = msgspec.field(name="content-encoding", default=None)
    redelivered: Any = None


_JSON = content_types({"json"})
_read_strictly = msgspec.json.Decoder(_Envelope).decode


def _read(text: bytes) -> _Envelope:
    """Python's JSON has more: NaN, halves of surrogate pairs, kombu's types."""
    if b"__type__" not in text:
        try:
            return _read_strictly(text)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            pass
    return msgspec.convert(loads(text, "application/json", "utf-8", _JSON), _Envelope)


def incoming(text: bytes) -> Incoming:
    """Read an envelope; what is none becomes the body of a message whose headers say so, and is dead-lettered like any other."""
    try:
        envelope = _read(text)
        fields, headers = envelope.properties, envelope.headers or {}
        address = fields.delivery_info or _Address()
        size = len(text) - len(envelope.body)
        body = b64decode(envelope.body, validate=True) if fields.body_encoding == "base64" else envelope.body.encode()
        expiration = fields.expiration
        properties = Properties(
            content_type=envelope.content_type,
            content_encoding=envelope.content_encoding,
            headers=headers if size <= LARGEST_HEADERS else _too_large(size),
            delivery_mode=_within(fields.delivery_mode, 256),
            priority=None if fields.priority is None else max(0, min(255, fields.priority)),
            correlation_id=fields.correlation_id,
            reply_to=fields.reply_to,
            expiration=str(expiration) if isinstance(expiration, int) else expiration,
            message_id=fields.message_id,
            timestamp=_within(fields.timestamp, 2**63),
            type=fields.type,
            user_id=fields.user_id,
            app_id=fields.app_id,
        )
        is_again = bool(headers.get("redelivered") or address.redelivered or envelope.redelivered)
        return Incoming(body, properties, address.exchange or "", address.routing_key or "", is_again)
    except Exception as error:  # noqa: BLE001 - anybody can write to a list
        problem = OddHeaders(f"not a message in kombu's envelope: {type(error).__name__}: {str(error)[:200]}")
        return Incoming(text, Properties(headers=problem), "", "", False)


def _within(value: int | None, end: int) -> int | None:
    """As AMQP can carry it: whoever has written the envelope may not have known that."""
    return value if value is not None and 0 <= value < end else None


def _too_large(size: int) -> OddHeaders:
    return OddHeaders(f"the headers have about {size} bytes, and {LARGEST_HEADERS} at most are taken")


def with_failures(properties: Properties, failures: int) -> Properties:
    """The properties as RabbitMQ shows them after so many failed deliveries."""
    return replace(properties, headers={**properties.headers, "x-delivery-count": failures}) if failures else properties

"""A message as kombu's virtual transports write it: JSON around a body in base64 (kombu/transport/virtual/base.py)."""

from __future__ import annotations

import uuid
from base64 import b64decode, b64encode
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from amqtask.protocol.message import LARGEST_HEADERS, Delivery, Message, OddHeaders, Properties
from amqtask.protocol.serialization import content_types, dumps, loads
from amqtask.topology.delays import DelayPlan, due_at
from amqtask.transport.content import encode_properties
from amqtask.transport.redis.keys import step_of

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonObject

# What kombu has elsewhere in the envelope.
_ELSEWHERE = frozenset({"content_type", "content_encoding", "headers"})
_NUMBERS = ("delivery_mode", "priority", "timestamp")
_OTHERS = tuple(name for name in Properties.__dataclass_fields__ if name not in _ELSEWHERE)
_TEXTS = tuple(name for name in _OTHERS if name not in _NUMBERS)
_JSON = content_types({"json"})
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


def incoming(text: bytes) -> Incoming:
    """Read an envelope; what is none becomes the body of a message whose headers say so, and is dead-lettered like any other."""
    try:
        document = loads(text, "application/json", "utf-8", _JSON)
        fields: Any = document["properties"]
        headers: Any = document.get("headers") or {}
        body: Any = document["body"]
        size = len(text) - len(body)
        body = b64decode(body, validate=True) if fields.get("body_encoding") == "base64" else body.encode()
        address: Any = fields.get("delivery_info") or {}
        others: dict[str, Any] = {name: _text(fields, name) for name in _TEXTS}
        others |= {name: _number(fields, name) for name in _NUMBERS}
        properties = Properties(
            content_type=_text(document, "content-type"),
            content_encoding=_text(document, "content-encoding"),
            headers=dict(headers) if size <= LARGEST_HEADERS else _too_large(size),
            **others,
        )
        is_again = bool(headers.get("redelivered") or address.get("redelivered") or document.get("redelivered"))
        return Incoming(
            body, properties, _text(address, "exchange") or "", _text(address, "routing_key") or "", is_again
        )
    except Exception as error:  # noqa: BLE001 - anybody can write to a list
        problem = OddHeaders(f"not a message in kombu's envelope: {type(error).__name__}: {str(error)[:200]}")
        return Incoming(text, Properties(headers=problem), "", "", False)


def _text(fields: Any, name: str) -> str | None:
    value = fields.get(name)
    if value is None or isinstance(value, str):
        return value
    if name == "expiration" and isinstance(value, int):
        return str(value)
    raise TypeError(f"{name} is no text")


def _number(fields: Any, name: str) -> int | None:
    value = fields.get(name)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise TypeError(f"{name} is no number")


def _too_large(size: int) -> OddHeaders:
    return OddHeaders(f"the headers have about {size} bytes, and {LARGEST_HEADERS} at most are taken")


def with_failures(properties: Properties, failures: int) -> Properties:
    """The properties as RabbitMQ shows them after so many failed deliveries."""
    return replace(properties, headers={**properties.headers, "x-delivery-count": failures}) if failures else properties

"""How one Redis is used: keys, fanout channels, declarations as commands, and messages as they lie there.

Keys are kombu's (kombu/transport/redis.py) and ours. All begin with `global_keyprefix`, where that is set.

`<queue>`, `<queue>\\x06\\x163` …  lists, one for each priority step; pushed left, popped right; a lower number goes first
`_kombu.binding.<exchange>`        set: routing key, pattern (topic exchanges only) and queue, joined by \\x06\\x16
`_kombu.binding_permanent.<…>`     the same members, where kombu's sweep may not take them
`unacked`, `unacked_index`         what consumers hold: tag -> [message, exchange, routing key]; tag by time (seconds)
`amqtask.lease`                    tags of ours by the time at which their consumer must have renewed them (seconds)
`amqtask.swept`                    when somebody has looked last for leases that are over; from when on that counts (seconds)
`amqtask.held`                     tag -> queue and step that it came from
`amqtask.tries`                    hash of a message -> how often its delivery failed; there at all: it is redelivered
`amqtask.queues`                   queue -> its arguments, as it was declared first
`amqtask.limits`                   queue -> x-max-length, where such a queue refuses more
`amqtask.exchanges`                exchange -> its type
`amqtask.delay`, `amqtask.delayed` id by due time (milliseconds); id -> exchange, routing key, step and message
`amqtask.config`                   text: which queues are paused (amqtask.remote.kept)
`amqtask.cancel`                   stream: what was revoked (amqtask.remote.kept)
`amqtask.owned`                    queues that go with their last consumer, by the time at which it must have said that it lives
`amqtask.active.<queue>`           which consumer has a queue alone, for as long as it renews that
"""

from __future__ import annotations

import json
import uuid
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from amqtask.exceptions import PublishError
from amqtask.ground.printable import printable
from amqtask.protocol.entities import Binding, Declaration, Exchange, Queue
from amqtask.protocol.message import LARGEST_HEADERS, Delivery, Message, OddHeaders, Properties
from amqtask.protocol.serialization import content_types, dumps, loads
from amqtask.topology.declarations import describe_difference
from amqtask.topology.delays import DelayPlan, due_at
from amqtask.transport.content import encode_properties
from amqtask.transport.declare import check_name
from amqtask.transport.redis.wire import Argument, ignore_reply

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonObject


SEPARATOR = "\x06\x16"
STEPS = (0, 3, 6, 9)


def check_separator(name: object) -> None:
    """Raises: PublishError for a name that would be two in a key or an entry, or that is no text: a message has said it."""
    if not isinstance(name, str):
        raise PublishError(
            f"the name of a queue or exchange, or a routing key, is a text, and not {printable(repr(name), 100)}"
        )
    if SEPARATOR in name:
        raise PublishError(
            f"{name!r} cannot be the name of a queue or exchange on Redis: {SEPARATOR!r} stands between names"
        )


def owner(queue: str, consumer: str, declared: Sequence[Declaration]) -> str:
    """A queue of a consumer's own, with the exchanges that it is bound to, as scripts take it."""
    sources = [entity.source.name for entity in declared if isinstance(entity, Binding)]
    return SEPARATOR.join((queue, consumer, *(sources or [""])))


def step_of(priority: object) -> int:
    """The priority step of a message: the largest that is not above its priority; 0 without one."""
    number = priority if isinstance(priority, int) and not isinstance(priority, bool) else 0
    return max(step for step in STEPS if step <= max(0, number))


def list_keys(prefix: str, queue: str) -> list[str]:
    """The lists of a queue, in the order in which they are served."""
    return [f"{prefix}{queue}{SEPARATOR}{step}" if step else f"{prefix}{queue}" for step in STEPS]


Command = tuple[Argument, ...]

# A consumer's messages are its own for so long (seconds), and it says so every third of that. Kombu gives them to others after an
# hour, whether the consumer lives or not.
LEASE_SECONDS = 30.0
# That of one that has a queue alone: a leader is to be followed soon.
LEASE_ALONE_SECONDS = 9.0
# So is a queue that goes with its last consumer: it says every ten seconds that it is there.
OWN_SECONDS = 60.0
NO_HEADERS = "Redis has no headers exchanges: bind the queue to a direct or topic exchange, and route by the key, or use RabbitMQ"
NO_CHAINS = "Redis cannot bind an exchange to an exchange: bind the queues to it themselves, or use RabbitMQ"


@dataclass(frozen=True, slots=True)
class Layout:
    """`events` is the exchange of events, which Celery makes a fanout on Redis (celery/events/event.py). `lease`: for so many
    seconds what a consumer has taken is its own, though it says nothing."""

    prefix: str = ""
    db: int = 0
    events: str = "celeryev"
    lease: float = LEASE_SECONDS

    @property
    def channels(self) -> str:
        """What the channels of fanout exchanges begin with, after the prefix."""
        return f"/{self.db}."

    def key(self, name: str) -> str:
        """A key."""
        return self.prefix + name

    def type_of(self, exchange: Exchange) -> str:
        """The type that the exchange has here."""
        return "fanout" if exchange.name == self.events else exchange.type

    def pattern(self, queue: Queue) -> str | None:
        """The channels that a queue listens to which is bound to a fanout exchange; None for a list."""
        exchange = queue.exchange
        if exchange is None or self.type_of(exchange) != "fanout":
            return None
        key = queue.routing_key.replace("#", "*")
        return f"{self.prefix}{self.channels}{exchange.name}" + (f"/{key}" if key else "")

    def declaring(
        self, entity: Declaration, warn: Callable[[str], None]
    ) -> Iterator[tuple[Command, Callable[[Any], None]]]:
        """The commands that declare an entity, each with what is to be done with its reply.

        Raises: PublishError for what Redis does not have.
        """
        check_name(entity)
        check_separator(entity.destination if isinstance(entity, Binding) else entity.name)
        if isinstance(entity, Exchange):
            if entity.type == "headers":
                raise PublishError(f"exchange {entity.name!r} cannot be declared. {NO_HEADERS}")
            yield ("HSET", self.key("amqtask.exchanges"), entity.name, self.type_of(entity)), ignore_reply
        elif isinstance(entity, Queue):
            if self.pattern(entity) is None:
                yield from self._queue(entity, warn)
        else:
            yield from self._binding(entity)

    def _queue(self, queue: Queue, warn: Callable[[str], None]) -> Iterator[tuple[Command, Callable[[Any], None]]]:
        text = json.dumps(queue.argument_map, sort_keys=True, default=str)
        queues, arguments = self.key("amqtask.queues"), queue.argument_map
        if not queue.passive:
            yield ("HSETNX", queues, queue.name, text), ignore_reply
            if arguments.get("x-max-length") is not None and arguments.get("x-overflow") == "reject-publish":
                yield ("HSETNX", self.key("amqtask.limits"), queue.name, arguments["x-max-length"]), ignore_reply

        def compare(reply: Any) -> None:
            if isinstance(reply, bytes) and reply != text.encode() and not queue.passive:
                difference = _difference(_noted(reply), arguments)
                if difference:
                    warn(describe_difference(queue, difference))

        yield ("HGET", queues, queue.name), compare

    def _binding(self, binding: Binding) -> Iterator[tuple[Command, Callable[[Any], None]]]:
        source, name = binding.source, binding.source.name
        refusal = f"the binding of {binding.destination!r} to {name!r} cannot be made"
        if binding.to_exchange:
            raise PublishError(f"{refusal}. {NO_CHAINS}")
        if source.type == "headers":
            raise PublishError(f"{refusal}. {NO_HEADERS}")
        if self.type_of(source) == "fanout":
            return
        pattern = _regular_expression(binding.routing_key) if source.type == "topic" else ""
        member = SEPARATOR.join((binding.routing_key, pattern, binding.destination))
        for table in ("_kombu.binding.", "_kombu.binding_permanent."):
            yield ("SADD", self.key(table + name), member), ignore_reply


def _noted(reply: bytes) -> dict[str, Any]:
    """A queue's arguments as they are noted; anybody may have written there."""
    try:
        noted = json.loads(reply)
    except (ValueError, RecursionError):
        noted = None
    return noted if isinstance(noted, dict) else {"its note": "unreadable"}


def _difference(existing: dict[str, Any], declared: dict[str, Any]) -> str:
    """In RabbitMQ's words, the first argument that differs."""
    for name in sorted({*existing, *declared}):
        if name != "x-queue-type" and existing.get(name) != declared.get(name):
            shown = [
                "none" if value is None else f"the value '{value}'"
                for value in (declared.get(name), existing.get(name))
            ]
            return f"inequivalent arg '{name}': received {shown[0]} but current is {shown[1]}"
    return ""


def _regular_expression(key: str) -> str:
    """kombu's, by which Celery's producers look for queues (kombu/transport/virtual/exchange.py, key_to_pattern)."""
    patterns = {"*": r"[^\.]+", "#": r".*?"}
    escaped = "".join(
        letter if letter.isalnum() or letter in ".#*" else f"\\{letter}" for letter in key.replace("\0", "")
    )
    return "^" + r"\.".join(patterns.get(part, part) for part in escaped.split(".")) + "$"


# -- A message as it lies in Redis: kombu's envelope, JSON around a body in base64 (kombu/transport/virtual/base.py).

# What kombu has elsewhere in the envelope.
_ELSEWHERE = frozenset({"content_type", "content_encoding", "headers"})
_OTHERS = tuple(name for name in Properties.__dataclass_fields__ if name not in _ELSEWHERE)
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

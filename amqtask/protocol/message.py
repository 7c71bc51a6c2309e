"""Messages to publish (Message) and received ones (Delivery)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from amqtask.ground.shapes import HeaderDict, Headers, JsonObject
    from amqtask.protocol.entities import Declaration


REJECTED, EXPIRED, MAXLEN, DELIVERY_LIMIT = "rejected", "expired", "maxlen", "delivery_limit"


class PropertiesLike(Protocol):
    """The AMQP basic properties, as pika's BasicProperties has them too (so deliveries need no copy)."""

    content_type: str | None
    content_encoding: str | None
    headers: HeaderDict
    delivery_mode: int | None
    priority: int | None
    correlation_id: str | None
    reply_to: str | None
    expiration: str | None
    message_id: str | None
    timestamp: Any
    type: str | None
    user_id: str | None
    app_id: str | None


# Messages with headers of more bytes are refused; the frame that holds them may have 131,072 (RabbitMQ's frame_max).
LARGEST_HEADERS = 65_536


class OddHeaders(dict[str, Any]):
    """Headers that cannot be read as they were written; `problem` says why. Unreadable values are replaced by texts."""

    __slots__ = ("problem",)

    def __init__(self, problem: str, values: Mapping[str, object] | None = None) -> None:
        super().__init__(values or {})
        self.problem = problem

    def note(self, problem: str) -> None:
        """Note a problem; the first one is kept."""
        self.problem = self.problem or problem


# Headers that a broker or a delay adds to a message on its way to one queue.
_TRANSIT_HEADERS = (
    "x-death",
    "x-first-death-",
    "x-last-death-",
    "x-delivery-count",
    "x-acquired-count",
    "amqtask-delay-",
)
# RabbitMQ routes a message to the keys in them, too (https://www.rabbitmq.com/docs/sender-selected). Its sender said that of his
# own publish, with his own rights; what a worker publishes again goes to one queue.
_SENDERS_ROUTES = frozenset({"CC", "BCC"})


def strip_transit_headers(headers: Headers) -> HeaderDict:
    """A copy without these headers, for every message that is published again.

    RabbitMQ drops a message that it dead-letters to the same queue twice without a rejection in between (cycle
    detection reads x-death, see celery#9867), and an x-delivery-count of the last queue would count in the next.
    """
    return {
        name: value
        for name, value in headers.items()
        if not name.startswith(_TRANSIT_HEADERS) and name not in _SENDERS_ROUTES
    }


@dataclass(slots=True)
class Properties:
    """AMQP basic properties; None means "not sent". `expiration` is milliseconds as a decimal string."""

    content_type: str | None = None
    content_encoding: str | None = None
    headers: HeaderDict = field(default_factory=dict)
    delivery_mode: int | None = 2
    priority: int | None = None
    correlation_id: str | None = None
    reply_to: str | None = None
    expiration: str | None = None
    message_id: str | None = None
    timestamp: int | datetime | None = None
    type: str | None = None
    user_id: str | None = None
    app_id: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Outcomes carry messages between processes; a dataclass's own way to pickle looks up its fields by name each time."""
        return Properties, (
            self.content_type, self.content_encoding, self.headers, self.delivery_mode, self.priority, self.correlation_id,
            self.reply_to, self.expiration, self.message_id, self.timestamp, self.type, self.user_id, self.app_id,
        )  # fmt: skip


def properties_of_copy(properties: PropertiesLike, headers: HeaderDict) -> Properties:
    """The properties for a message that is published again, with these headers.

    `expiration` is left out (its time in the work queue is over; `expires` in the headers still counts), and so
    is `user_id`, which the broker lets only that user's connections send.
    """
    return Properties(
        content_type=properties.content_type,
        content_encoding=properties.content_encoding,
        headers=headers,
        delivery_mode=2,
        priority=properties.priority,
        correlation_id=properties.correlation_id,
        reply_to=properties.reply_to,
        message_id=properties.message_id,
        timestamp=properties.timestamp,
        type=properties.type,
        app_id=properties.app_id,
    )


@dataclass(slots=True)
class Message:
    """One message to publish, with the entities that must exist before it can be routed.

    The publisher declares the entities of `declare` first (once per connection).
    `mandatory` asks the broker to return the message when no queue takes it.
    """

    body: bytes
    properties: Properties
    exchange: str = ""
    routing_key: str = ""
    declare: tuple[Declaration, ...] = ()
    mandatory: bool = True

    def __reduce__(self) -> tuple[Any, ...]:
        """See Properties."""
        return Message, (
            self.body, self.properties, self.exchange, self.routing_key, self.declare, self.mandatory
        )  # fmt: skip


class Delivery(NamedTuple):
    """One message as the broker delivered it.

    `tag` is the delivery tag, valid only on the channel incarnation `epoch` it came on: answers for an older
    epoch are void (the broker has requeued the message).
    """

    body: bytes
    properties: PropertiesLike
    exchange: str
    routing_key: str
    redelivered: bool
    queue: str
    tag: int
    epoch: int

    @property
    def content(self) -> tuple[bytes, str | None, str | None, Headers | None]:
        """The body, and what is needed to read it: content type, encoding and headers."""
        properties = self.properties
        return self.body, properties.content_type, properties.content_encoding, properties.headers


# -- what dead-lettering adds where the broker is not RabbitMQ, which adds it itself (https://www.rabbitmq.com/docs/dlx)


def dead_headers(
    headers: Headers, queue: str, reason: str, *, exchange: str, routing_key: str, expiration: str | None
) -> HeaderDict:
    """The headers of a message that died in `queue`; `exchange` and `routing_key` are how it had come there."""
    letter, deaths = dict(headers), deaths_in(headers)
    letter["x-death"] = _counted(deaths, queue, reason) or [
        _death(queue, reason, exchange, routing_key, expiration),
        *deaths,
    ]
    for name, value in (("queue", queue), ("reason", reason), ("exchange", exchange)):
        letter.setdefault(f"x-first-death-{name}", value)
        letter[f"x-last-death-{name}"] = value
    return letter


def deaths_in(headers: Headers) -> list[JsonObject]:
    """Copies of the entries of x-death. Publishers may have written anything there: only mappings are taken."""
    deaths = headers.get("x-death")
    return [dict(death) for death in deaths if isinstance(death, Mapping)] if isinstance(deaths, list) else []


def _counted(deaths: list[JsonObject], queue: str, reason: str) -> list[JsonObject] | None:
    """There is one entry per queue and reason, the latest first; None when this is a new one."""
    for entry in deaths:
        if entry.get("queue") == queue and entry.get("reason") == reason:
            deaths.remove(entry)
            count = entry.get("count")
            return [{**entry, "count": count + 1 if isinstance(count, int) else 1}, *deaths]
    return None


def _death(queue: str, reason: str, exchange: str, routing_key: str, expiration: str | None) -> JsonObject:
    entry: JsonObject = {
        "count": 1,
        "reason": reason,
        "queue": queue,
        "time": datetime.now(timezone.utc).replace(microsecond=0),
        "exchange": exchange,
        "routing-keys": [routing_key],
    }
    if expiration is not None:
        entry["original-expiration"] = expiration
    return entry

"""A message as the broker keeps it, and the headers that dead-lettering adds (https://www.rabbitmq.com/docs/dlx)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timezone
from enum import Enum
from typing import TYPE_CHECKING, Any

import pika

from amqtask.transport.memory.refusals import invalid_expiration

if TYPE_CHECKING:
    from amqtask.ground.shapes import HeaderDict, JsonObject

REJECTED, EXPIRED, MAXLEN, DELIVERY_LIMIT = "rejected", "expired", "maxlen", "delivery_limit"


class Verdict(Enum):
    """The broker's answer to a publish."""

    STORED = "ack"
    RETURNED = "basic.return, then ack"
    REFUSED = "nack"


@dataclass(slots=True)
class Stored:
    """One message in one queue. `expires_at` is the broker's clock; `properties` are encoded as on the wire."""

    body: bytes
    properties: bytes
    exchange: str
    routing_key: str
    headers: HeaderDict
    priority: int | None
    expiration: float | None
    is_persistent: bool
    number: int = 0
    expires_at: float | None = None
    deliveries: int = 0
    # How many of them count towards a quorum queue's delivery limit.
    failures: int = 0

    def decoded(self) -> Any:
        """A new properties object for each delivery; the delivery count is in the headers."""
        properties = pika.BasicProperties()
        properties.decode(self.properties)
        if self.failures:
            properties.headers = {**(properties.headers or {}), "x-delivery-count": self.failures}
        return properties

    def encoded(self) -> bytes:
        """The properties of one delivery, as on the wire."""
        return b"".join(self.decoded().encode()) if self.failures else self.properties


def received(body: bytes, encoded: bytes, exchange: str, routing_key: str) -> Stored:
    """A message as the broker receives it; `encoded` are its properties. Raises: Refused for an invalid expiration."""
    properties = pika.BasicProperties()
    properties.decode(encoded)
    return Stored(
        body,
        encoded,
        exchange,
        routing_key,
        properties.headers or {},
        properties.priority,
        _seconds(properties.expiration),
        properties.delivery_mode == 2,
    )


def _seconds(expiration: str | None) -> float | None:
    if expiration is None:
        return None
    if not expiration.isdecimal():
        raise invalid_expiration(expiration)
    return int(expiration) / 1000


def copied(stored: Stored) -> Stored:
    """The same message for another queue."""
    return replace(stored, number=0, expires_at=None, deliveries=0, failures=0)


def dead(stored: Stored, queue: str, reason: str, exchange: str, routing_key: str | None) -> Stored:
    """The message for the dead-letter exchange; it keeps its routing key where the queue sets none."""
    properties = stored.decoded()
    headers = dict(stored.headers)
    headers["x-death"] = _deaths(stored, queue, reason, properties.expiration)
    for name, value in (("queue", queue), ("reason", reason), ("exchange", stored.exchange)):
        headers.setdefault(f"x-first-death-{name}", value)
        headers[f"x-last-death-{name}"] = value
    # Without an expiration, or it would expire in that queue again.
    properties.headers, properties.expiration = headers, None
    key = stored.routing_key if routing_key is None else routing_key
    return received(stored.body, b"".join(properties.encode()), exchange, key)


def _deaths(stored: Stored, queue: str, reason: str, expiration: str | None) -> list[JsonObject]:
    """One entry per queue and reason, the latest first."""
    deaths = [dict(entry) for entry in stored.headers.get("x-death") or []]
    for entry in deaths:
        if entry.get("queue") == queue and entry.get("reason") == reason:
            deaths.remove(entry)
            return [{**entry, "count": entry["count"] + 1}, *deaths]
    entry = {
        "count": 1,
        "reason": reason,
        "queue": queue,
        "time": datetime.now(timezone.utc).replace(microsecond=0),
        "exchange": stored.exchange,
        "routing-keys": [stored.routing_key],
    }
    if expiration is not None:
        entry["original-expiration"] = expiration
    return [entry, *deaths]


def is_cycle(stored: Stored, queue: str) -> bool:
    """Whether the broker drops the message: it comes back to a queue and was not rejected in between."""
    deaths = stored.headers.get("x-death") or []
    names = [entry.get("queue") for entry in deaths]
    if queue not in names:
        return False
    return all(entry.get("reason") != REJECTED for entry in deaths[: names.index(queue) + 1])

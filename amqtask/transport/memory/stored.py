"""A message as the broker keeps it, and the headers that dead-lettering adds (https://www.rabbitmq.com/docs/dlx)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

import pika

from amqtask.transport.deaths import REJECTED, dead_headers
from amqtask.transport.memory.refusals import invalid_expiration

if TYPE_CHECKING:
    from amqtask.ground.shapes import HeaderDict


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
    properties.headers = dead_headers(
        stored.headers,
        queue,
        reason,
        exchange=stored.exchange,
        routing_key=stored.routing_key,
        expiration=properties.expiration,
    )
    # Without an expiration, or it would expire in that queue again.
    properties.expiration = None
    key = stored.routing_key if routing_key is None else routing_key
    return received(stored.body, b"".join(properties.encode()), exchange, key)


def is_cycle(stored: Stored, queue: str) -> bool:
    """Whether the broker drops the message: it comes back to a queue and was not rejected in between."""
    deaths = stored.headers.get("x-death") or []
    names = [entry.get("queue") for entry in deaths]
    if queue not in names:
        return False
    return all(entry.get("reason") != REJECTED for entry in deaths[: names.index(queue) + 1])

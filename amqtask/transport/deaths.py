"""The headers that dead-lettering adds, where the broker is not RabbitMQ, which adds them itself (https://www.rabbitmq.com/docs/dlx)."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amqtask.ground.shapes import HeaderDict, Headers, JsonObject

REJECTED, EXPIRED, MAXLEN, DELIVERY_LIMIT = "rejected", "expired", "maxlen", "delivery_limit"


def dead_headers(
    headers: Headers, queue: str, reason: str, *, exchange: str, routing_key: str, expiration: str | None
) -> HeaderDict:
    """The headers of a message that died in `queue`; `exchange` and `routing_key` are how it had come there."""
    letter = dict(headers)
    deaths = [dict(entry) for entry in headers.get("x-death") or []]
    letter["x-death"] = _counted(deaths, queue, reason) or [
        _death(queue, reason, exchange, routing_key, expiration),
        *deaths,
    ]
    for name, value in (("queue", queue), ("reason", reason), ("exchange", exchange)):
        letter.setdefault(f"x-first-death-{name}", value)
        letter[f"x-last-death-{name}"] = value
    return letter


def _counted(deaths: list[JsonObject], queue: str, reason: str) -> list[JsonObject] | None:
    """There is one entry per queue and reason, the latest first; None when this is a new one."""
    for entry in deaths:
        if entry.get("queue") == queue and entry.get("reason") == reason:
            deaths.remove(entry)
            return [{**entry, "count": entry["count"] + 1}, *deaths]
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

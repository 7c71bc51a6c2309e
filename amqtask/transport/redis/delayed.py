"""RedisDelayed: what waits in Redis for its time, for those who ask a worker."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from amqtask.protocol.message import Delivery
from amqtask.topology.delays import TO_HEADER
from amqtask.transport.redis.envelope import incoming
from amqtask.transport.redis.keys import SEPARATOR
from amqtask.transport.redis.layout import Layout
from amqtask.transport.redis.publisher import FAILURES

if TYPE_CHECKING:
    from amqtask.topology.delays import Address
    from amqtask.transport.redis.servers import Deployment

# How many are looked at, when those for one queue are sought.
MOST = 100_000


class RedisDelayed:
    """Asks Redis while the caller waits: some milliseconds, at most the client's timeout."""

    def __init__(self, deployment: Deployment, layout: Layout) -> None:
        self._client: Any = deployment.client()
        self._due = layout.key("amqtask.delay")
        self._entries = layout.key("amqtask.delayed")

    def soonest(self, limit: int) -> list[tuple[float, Delivery]]:
        """At most `limit` delayed messages with their due times (Unix time), the soonest first; none while Redis is away."""
        try:
            due = self._client.zrange(self._due, 0, limit - 1, withscores=True)
            entries = self._client.hmget(self._entries, [name for name, _ in due]) if due else []
        except FAILURES:
            return []
        return [(at / 1000, _delivery(entry)) for (_, at), entry in zip(due, entries, strict=True) if entry]

    def count(self, address: Address) -> int:
        """How many are to go there."""
        return len(self._found(address))

    def drop(self, address: Address) -> int:
        """Delete those that are to go there; how many that were."""
        names = self._found(address)
        try:
            if names:
                self._client.hdel(self._entries, *names)
                return int(self._client.zrem(self._due, *names))
        except FAILURES:
            pass
        return 0

    def _found(self, address: Address) -> list[bytes]:
        start = (SEPARATOR.join(address) + SEPARATOR).encode()
        try:
            names = self._client.zrange(self._due, 0, MOST - 1)
            entries = self._client.hmget(self._entries, names) if names else []
        except FAILURES:
            return []
        return [name for name, entry in zip(names, entries, strict=True) if entry and entry.startswith(start)]


def _delivery(entry: bytes) -> Delivery:
    exchange, key, _, text = entry.split(SEPARATOR.encode(), 3)
    message = incoming(text)
    headers = {**message.properties.headers, TO_HEADER: exchange.decode()}
    properties = replace(message.properties, headers=headers)
    return Delivery(message.body, properties, exchange.decode(), key.decode(), False, "", 0, 0)

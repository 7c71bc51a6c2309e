"""RedisDelayed: what waits in Redis for its time, for those who ask a worker."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from amqtask.protocol.message import Delivery
from amqtask.topology.delays import TO_HEADER, UNTIL_HEADER
from amqtask.transport.redis.envelope import incoming
from amqtask.transport.redis.keys import SEPARATOR
from amqtask.transport.redis.layout import Layout
from amqtask.transport.redis.publisher import FAILURES

if TYPE_CHECKING:
    from amqtask.topology.delays import Address
    from amqtask.transport.redis.servers import Deployment

# The queue in which delayed messages are for those who look at queues.
DELAYED = "amqtask.delay"


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
        return [(at / 1000, delivery_of(entry, at)) for (_, at), entry in zip(due, entries, strict=True) if entry]

    def count(self, address: Address) -> int:
        """None: workers hold no delayed message."""
        return 0

    def drop(self, address: Address) -> int:
        """None."""
        return 0


def delivery_of(entry: bytes, due: float) -> Delivery:
    """A delayed message with the headers that say where it goes, and when (milliseconds of Unix time)."""
    exchange, key, _, text = entry.split(SEPARATOR.encode(), 3)
    message = incoming(text)
    headers = {**message.properties.headers, TO_HEADER: exchange.decode(), UNTIL_HEADER: int(due)}
    addressed = message._replace(
        properties=replace(message.properties, headers=headers), exchange=exchange.decode(), routing_key=key.decode()
    )
    return addressed.delivery(DELAYED, 0, is_again=False)

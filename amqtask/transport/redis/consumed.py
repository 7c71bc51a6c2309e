"""What a consumer knows of its queues, and of the messages that it holds: bookkeeping without I/O."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from amqtask.protocol.message import Properties, dead_headers
from amqtask.transport.redis.envelope import envelope
from amqtask.transport.redis.keys import step_of

if TYPE_CHECKING:
    from amqtask.protocol.entities import Declaration, Queue
    from amqtask.transport.redis.envelope import Incoming

# A queue without a limit of its own (prefetch 0) gets at most so many at once.
UNLIMITED = 10_000


@dataclass(slots=True)
class Consumed:
    """A queue that is consumed. `pattern`: its channels, where it is bound to a fanout exchange."""

    queue: Queue
    declare: tuple[Declaration, ...]
    prefetch: int
    pattern: str | None
    held: int = 0
    is_set_up: bool = False

    @property
    def room(self) -> int:
        """How many more messages it may have."""
        return max(0, (self.prefetch or UNLIMITED) - self.held)

    @property
    def is_alone(self) -> bool:
        """Whether one consumer has the queue, and others wait for their turn."""
        return bool(self.queue.argument_map.get("x-single-active-consumer"))

    @property
    def is_exclusive(self) -> bool:
        """Whether another consumer of the queue fails; every consumer has channels of its own."""
        return self.queue.exclusive and self.pattern is None

    @property
    def delivery_limit(self) -> int | None:
        """How many failed deliveries a message may have."""
        limit = self.queue.argument_map.get("x-delivery-limit")
        return limit if isinstance(limit, int) else None


class Held(NamedTuple):
    """A delivery that is not answered. `failures`: of its deliveries before. `tag`: its number in Redis; 0 for one off a channel,
    which Redis does not keep."""

    consumed: Consumed
    message: Incoming
    failures: int
    tag: int

    @property
    def is_stored(self) -> bool:
        """Whether Redis keeps it."""
        return self.tag > 0


class Letter(NamedTuple):
    """A dead letter as the script BURY takes it: exchange, routing key, step, message, and the queue for it else."""

    exchange: str
    routing_key: str
    step: int
    envelope: bytes
    otherwise: str


def dead_letter(held: Held, reason: str) -> Letter | None:
    """The dead letter of a message; None where its queue has no dead-letter exchange."""
    queue, message = held.consumed.queue, held.message
    arguments = queue.argument_map
    exchange = arguments.get("x-dead-letter-exchange")
    if exchange is None:
        return None
    headers = dead_headers(
        message.properties.headers,
        queue.name,
        reason,
        exchange=message.exchange,
        routing_key=message.routing_key,
        expiration=message.properties.expiration,
    )
    properties: Properties = replace(message.properties, headers=headers, expiration=None)
    key = arguments.get("x-dead-letter-routing-key", message.routing_key)
    return Letter(
        exchange,
        key,
        step_of(properties.priority),
        envelope(message.body, properties, exchange, key),
        f"{queue.name}.dead",
    )

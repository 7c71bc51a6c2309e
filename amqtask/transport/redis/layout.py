"""Layout: how one Redis is used: key prefix, fanout channels, and what declarations are as commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from amqtask.exceptions import PublishError
from amqtask.protocol.entities import Binding, Declaration, Exchange, Queue
from amqtask.topology.declarations import describe_difference
from amqtask.transport.declare import check_name
from amqtask.transport.redis.keys import SEPARATOR
from amqtask.transport.redis.resp import Argument, ignore_reply

Command = tuple[Argument, ...]

# A consumer's messages are its own for so long (seconds), and it says so every third of that. Kombu gives them to others after an
# hour, whether the consumer lives or not.
LEASE_SECONDS = 30.0
# That of one that has a queue alone: a leader is to be followed soon.
LEASE_ALONE_SECONDS = 9.0
NO_HEADERS = "Redis has no headers exchanges: bind the queue to a direct or topic exchange, and route by the key, or use RabbitMQ"
NO_CHAINS = "Redis cannot bind an exchange to an exchange: bind the queues to it themselves, or use RabbitMQ"


@dataclass(frozen=True, slots=True)
class Layout:
    """`events` is the exchange of events, which Celery makes a fanout on Redis (celery/events/event.py)."""

    prefix: str = ""
    db: int = 0
    events: str = "celeryev"

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
            if isinstance(reply, bytes) and reply.decode() != text and not queue.passive:
                difference = _difference(json.loads(reply), arguments)
                if difference:
                    warn(describe_difference(queue, difference))

        yield ("HGET", queues, queue.name), compare

    def _binding(self, binding: Binding) -> Iterator[tuple[Command, Callable[[Any], None]]]:
        source, name = binding.source, binding.source.name
        what = f"the binding of {binding.destination!r} to {name!r} cannot be made"
        if binding.to_exchange:
            raise PublishError(f"{what}. {NO_CHAINS}")
        if source.type == "headers":
            raise PublishError(f"{what}. {NO_HEADERS}")
        if self.type_of(source) == "fanout":
            return
        pattern = _regular_expression(binding.routing_key) if source.type == "topic" else ""
        member = SEPARATOR.join((binding.routing_key, pattern, binding.destination))
        for table in ("_kombu.binding.", "_kombu.binding_permanent."):
            yield ("SADD", self.key(table + name), member), ignore_reply


def _difference(existing: dict[str, Any], asked: dict[str, Any]) -> str:
    """In RabbitMQ's words, the first argument that differs."""
    for name in sorted({*existing, *asked}):
        if name != "x-queue-type" and existing.get(name) != asked.get(name):
            shown = [
                "none" if value is None else f"the value '{value}'" for value in (asked.get(name), existing.get(name))
            ]
            return f"inequivalent arg '{name}': received {shown[0]} but current is {shown[1]}"
    return ""


def _regular_expression(key: str) -> str:
    """kombu's, by which Celery's producers look for queues (kombu/transport/virtual/exchange.py, key_to_pattern)."""
    words = {"*": r"[^\.]+", "#": r".*?"}
    escaped = "".join(
        letter if letter.isalnum() or letter in ".#*" else f"\\{letter}" for letter in key.replace("\0", "")
    )
    return "^" + r"\.".join(words.get(word, word) for word in escaped.split(".")) + "$"

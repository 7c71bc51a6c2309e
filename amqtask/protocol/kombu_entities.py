"""Queues and exchanges of kombu's, as ours: programs for Celery have them in settings, and give them to calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from amqtask.protocol.entities import Binding, Broadcast, Exchange, Queue

T = TypeVar("T")


def queue_of(entity: Any) -> Queue:
    """The queue that a kombu.Queue, or an object with its attributes, describes. Raises: AttributeError for another object."""
    exchange = exchange_of(entity.exchange) if entity.exchange and entity.exchange.name else None
    if type(entity).__name__ == "Broadcast":
        return Broadcast(entity.alias or entity.name, exchange=exchange)
    bindings = [
        Binding(exchange_of(binding.exchange), entity.name, binding.routing_key or "")
        for binding in getattr(entity, "bindings", None) or ()
    ]
    return Queue(
        entity.name,
        exchange=exchange,
        routing_key=entity.routing_key or entity.name,
        durable=entity.durable,
        exclusive=entity.exclusive,
        auto_delete=entity.auto_delete,
        bindings=tuple(sorted(bindings, key=lambda binding: (binding.source.name, binding.routing_key))),
        queue_arguments=entity.queue_arguments,
        max_priority=getattr(entity, "max_priority", None),
        max_length=getattr(entity, "max_length", None),
        max_length_bytes=getattr(entity, "max_length_bytes", None),
        message_ttl=getattr(entity, "message_ttl", None),
        expires=getattr(entity, "expires", None),
    )


def exchange_of(entity: Any) -> Exchange:
    """The exchange that a kombu.Exchange describes. Raises: AttributeError for another object."""
    return Exchange(entity.name, type=entity.type, durable=entity.durable)


def as_queue(value: object) -> Queue:
    """The same for the value of an option. Raises: TypeError."""
    return _converted(queue_of, value)


def as_exchange(value: object) -> Exchange:
    """The same. Raises: TypeError."""
    return _converted(exchange_of, value)


def _converted(convert: Callable[[Any], T], value: object) -> T:
    try:
        return convert(value)
    except AttributeError as error:
        raise TypeError(str(error)) from error

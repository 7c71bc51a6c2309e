"""How entities are declared over any connection, and which are used as they are found.

A queue or exchange that exists with other arguments, or that exists and that the user may not declare, was made by an operator:
it is used as it is, with a warning. A passive declare asks whether it exists. The bindings of an exchange that was found may be
refused, too: a publish to the exchange shows whether it routes anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pika import spec

from amqtask.protocol.entities import Binding, Declaration, Exchange, Queue
from amqtask.topology.declarations import describe_difference
from amqtask.transport.errors import ACCESS_REFUSED, PRECONDITION_FAILED, ChannelClosing
from amqtask.transport.names import entity_name


def may_exist(entity: Declaration, refusal: ChannelClosing) -> bool:
    """Whether an entity that the broker refused to declare may exist, and is to be asked for."""
    return not isinstance(entity, Binding) and refusal.reply_code in (PRECONDITION_FAILED, ACCESS_REFUSED)


class FoundEntities(set[Declaration]):
    """The entities that are used as they are found."""

    def excuse(self, entity: Declaration, refusal: ChannelClosing) -> bool:
        """Whether this is a binding of such an exchange, which need not be made."""
        return isinstance(entity, Binding) and refusal.reply_code == ACCESS_REFUSED and entity.source in self

    def note(self, entity: Declaration, refusal: ChannelClosing, warn: Callable[[str], None]) -> None:
        """The entity exists, though the broker refused to declare it: use it, and warn."""
        self.add(entity)
        if refusal.reply_code == ACCESS_REFUSED:
            warn(f"the broker's user may not declare {entity_name(entity)}; it exists and is used as found")
        elif not isinstance(entity, Binding):
            warn(describe_difference(entity, refusal.reply_text))


def _details(entity: Declaration, *, passive: bool) -> dict[str, Any]:
    """The arguments that have the same names in all libraries."""
    details: dict[str, Any] = {"arguments": dict(entity.arguments)}
    if isinstance(entity, Binding):
        return {**details, "routing_key": entity.routing_key}
    if isinstance(entity, Queue):
        details["exclusive"] = entity.exclusive
    passive = passive or entity.passive
    return {**details, "passive": passive, "durable": entity.durable, "auto_delete": entity.auto_delete}


def declaring(channel: Any, entity: Declaration, *, passive: bool) -> Callable[..., Any]:
    """The method that declares or binds the entity, of a channel of pika's or aiormq's: they have the same names."""
    details = _details(entity, passive=passive)
    if isinstance(entity, Binding):
        bind = channel.exchange_bind if entity.to_exchange else channel.queue_bind
        return partial(bind, entity.destination, entity.source.name, **details)
    if isinstance(entity, Exchange):
        return partial(channel.exchange_declare, entity.name, exchange_type=entity.type, **details)
    return partial(channel.queue_declare, entity.name, **details)


def declaration(entity: Declaration, *, passive: bool) -> tuple[object, type]:
    """pika's object of the method that declares or binds the entity, and the class of its answer."""
    details = _details(entity, passive=passive)
    if isinstance(entity, Exchange):
        return spec.Exchange.Declare(exchange=entity.name, type=entity.type, **details), spec.Exchange.DeclareOk
    if isinstance(entity, Queue):
        return spec.Queue.Declare(queue=entity.name, **details), spec.Queue.DeclareOk
    source, destination = entity.source.name, entity.destination
    if entity.to_exchange:
        return spec.Exchange.Bind(source=source, destination=destination, **details), spec.Exchange.BindOk
    return spec.Queue.Bind(exchange=source, queue=destination, **details), spec.Queue.BindOk

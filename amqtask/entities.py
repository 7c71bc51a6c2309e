"""Exchange, Queue and Binding: frozen data that knows no channel and can be a dictionary key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

Arguments: TypeAlias = tuple[tuple[str, Any], ...]


def arguments(values: Mapping[str, Any] | Arguments | None) -> Arguments:
    """Queue or binding arguments in a hashable, order-free form."""
    if not values:
        return ()
    items = values.items() if isinstance(values, Mapping) else values
    return tuple(sorted(items))


@dataclass(frozen=True, slots=True)
class Exchange:
    """An exchange; `name=""` is the default exchange, which is never declared."""

    name: str = ""
    type: str = "direct"
    durable: bool = True
    auto_delete: bool = False
    arguments: Arguments = ()
    passive: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        """They travel with messages between processes; what dataclasses do by themselves asks for the fields each time."""
        return Exchange, (self.name, self.type, self.durable, self.auto_delete, self.arguments, self.passive)


@dataclass(frozen=True, slots=True)
class Binding:
    """A source exchange to a queue (or to an exchange) under a routing key."""

    source: Exchange
    destination: str
    routing_key: str = ""
    arguments: Arguments = ()
    to_exchange: bool = False


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue and the exchange it hangs on.

    `exchange` None and the default exchange mean: reached by its own name through the default exchange.
    `arguments` are the broker's (`x-queue-type`, `x-delivery-limit`, …), see `topology.plan` for the defaults.
    """

    name: str
    exchange: Exchange | None = None
    routing_key: str = ""
    durable: bool = True
    exclusive: bool = False
    auto_delete: bool = False
    arguments: Arguments = ()
    bindings: tuple[Binding, ...] = ()
    passive: bool = False
    # A Broadcast queue has a name of its own in each worker; nobody but its consumer declares it.
    broadcast: bool = field(default=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """See Exchange."""
        return Queue, (
            self.name, self.exchange, self.routing_key, self.durable, self.exclusive, self.auto_delete, self.arguments,
            self.bindings, self.passive, self.broadcast,
        )  # fmt: skip

    @property
    def argument_map(self) -> dict[str, Any]:
        """The arguments as the dictionary that goes to the broker."""
        return dict(self.arguments)


def Broadcast(name: str, *, exchange: Exchange | None = None) -> Queue:
    """Every worker that consumes `name` gets each message: a fanout exchange, and a queue of its own in each worker.

    Who is not there when a message is published does not get it, and nobody is told.
    """
    return Queue(name, exchange=exchange or Exchange(name, type="fanout"), broadcast=True)


Declaration: TypeAlias = Exchange | Queue | Binding


# -- as plain data, for outboxes and pipes

_KINDS: dict[str, type[Exchange] | type[Queue] | type[Binding]] = {
    "exchange": Exchange,
    "queue": Queue,
    "binding": Binding,
}


def changed_fields(value: Any, default: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from another one's."""
    values = {each.name: getattr(value, each.name) for each in fields(value)}
    return {name: found for name, found in values.items() if found != getattr(default, name)}


def as_document(entity: Declaration) -> dict[str, Any]:
    """An entity as tables and lists; what has its default is left out."""
    if isinstance(entity, Binding):
        found = changed_fields(entity, Binding(Exchange(), ""))
        found["source"], found["destination"] = as_document(entity.source), entity.destination
        return {"is": "binding", **found}
    if isinstance(entity, Exchange):
        return {"is": "exchange", **changed_fields(entity, Exchange())}
    found = changed_fields(entity, Queue(""))
    if entity.exchange is not None:
        found["exchange"] = as_document(entity.exchange)
    if entity.bindings:
        found["bindings"] = [as_document(binding) for binding in entity.bindings]
    return {"is": "queue", "name": entity.name, **found}


def from_document(document: Mapping[str, Any]) -> Any:
    """The entity that `as_document` wrote. Raises: KeyError, TypeError, ValueError, AttributeError for what is none."""
    found = dict(document)
    kind = _KINDS[found.pop("is")]
    for name in ("source", "exchange"):
        if name in found:
            found[name] = from_document(found[name])
    if "bindings" in found:
        found["bindings"] = tuple(from_document(binding) for binding in found["bindings"])
    made = kind(**found)
    if made.arguments:
        made = replace(made, arguments=tuple((name, value) for name, value in made.arguments))
    hash(made)  # publishers remember what they have declared
    return made

"""Exchange, Queue and Binding: frozen data that knows no channel and can be a dictionary key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonFields, JsonObject, QueueArgumentDict, QueueArguments

Arguments: TypeAlias = tuple[tuple[str, Any], ...]


def arguments(values: Mapping[str, object] | Arguments | None) -> Arguments:
    """Queue or binding arguments in a hashable, order-free form."""
    return _sorted(values) if values else ()


def _sorted(values: Mapping[str, object] | Arguments) -> Arguments:
    return tuple(sorted(values.items() if isinstance(values, Mapping) else values))


@dataclass(frozen=True, slots=True)
class Exchange:
    """An exchange; `name=""` is the default exchange, which is never declared.

    `delivery_mode` is taken for programs that had kombu's: that of a message is its call's, its task's or the setting's.
    """

    name: str = ""
    type: str = "direct"
    durable: bool = True
    auto_delete: bool = False
    arguments: Arguments = ()
    passive: bool = False
    delivery_mode: InitVar[int | str | None] = None

    def __reduce__(self) -> tuple[object, ...]:
        """Exchanges travel with messages between processes, often: pickled without a look at the dataclass's fields each time."""
        return Exchange, (self.name, self.type, self.durable, self.auto_delete, self.arguments, self.passive)


@dataclass(frozen=True, slots=True)
class Binding:
    """Binds a source exchange to a queue (or to an exchange) with a routing key."""

    source: Exchange
    destination: str
    routing_key: str = ""
    arguments: Arguments = ()
    to_exchange: bool = False


@dataclass(frozen=True, slots=True, init=False)
class Queue:
    """A queue and the exchange that it is bound to.

    `exchange` None, or the default exchange: messages reach it by its name through the default exchange.
    `arguments` are the broker's (`x-queue-type`, `x-delivery-limit`, …), see `topology.plan` for the defaults. kombu's names
    for them are taken, too: `queue_arguments`, `max_priority`, `max_length`, `max_length_bytes`, and in seconds `message_ttl`
    and `expires`.
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
    # A Broadcast queue has its own name in each worker; only its consumer declares it.
    broadcast: bool = field(default=False)

    def __init__(
        self,
        name: str,
        exchange: Exchange | str | None = None,
        routing_key: str = "",
        durable: bool = True,
        exclusive: bool = False,
        auto_delete: bool = False,
        arguments: Arguments | QueueArguments = (),
        bindings: tuple[Binding, ...] = (),
        passive: bool = False,
        broadcast: bool = False,
        *,
        queue_arguments: QueueArguments | None = None,
        max_priority: int | None = None,
        max_length: int | None = None,
        max_length_bytes: int | None = None,
        message_ttl: float | None = None,
        expires: float | None = None,
    ) -> None:
        put = object.__setattr__
        put(self, "name", name)
        put(self, "exchange", Exchange(exchange) if isinstance(exchange, str) else exchange)
        put(self, "routing_key", routing_key)
        put(self, "durable", durable)
        put(self, "exclusive", exclusive)
        put(self, "auto_delete", auto_delete)
        put(self, "bindings", bindings)
        put(self, "passive", passive)
        put(self, "broadcast", broadcast)
        named = {
            "x-max-priority": max_priority,
            "x-max-length": max_length,
            "x-max-length-bytes": max_length_bytes,
            "x-message-ttl": _milliseconds(message_ttl),
            "x-expires": _milliseconds(expires),
        }
        extra_arguments = {
            **(queue_arguments or {}),
            **{key: value for key, value in named.items() if value is not None},
        }
        put(
            self,
            "arguments",
            _sorted({**dict(arguments), **extra_arguments})
            if extra_arguments or isinstance(arguments, Mapping)
            else arguments,
        )

    def __reduce__(self) -> tuple[object, ...]:
        """See Exchange."""
        return Queue, (
            self.name, self.exchange, self.routing_key, self.durable, self.exclusive, self.auto_delete, self.arguments,
            self.bindings, self.passive, self.broadcast,
        )  # fmt: skip

    @property
    def argument_map(self) -> QueueArgumentDict:
        """The arguments as the dictionary that goes to the broker."""
        return dict(self.arguments)

    # kombu's name.
    queue_arguments = argument_map


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1000)


def Broadcast(name: str, *, exchange: Exchange | None = None) -> Queue:
    """Every worker that consumes `name` gets each message: a fanout exchange, and a queue of its own in each worker.

    A worker that is not connected when a message is published does not get it, and the producer gets no error.
    """
    return Queue(name, exchange=exchange or Exchange(name, type="fanout"), broadcast=True)


Declaration: TypeAlias = Exchange | Queue | Binding


# -- as plain data, for outboxes and pipes

_KINDS: dict[str, type[Exchange] | type[Queue] | type[Binding]] = {
    "exchange": Exchange,
    "queue": Queue,
    "binding": Binding,
}


def changed_fields(value: Any, default: object) -> JsonObject:
    """The fields of a dataclass that differ from those of `default`."""
    values = {field.name: getattr(value, field.name) for field in fields(value)}
    return {name: current for name, current in values.items() if current != getattr(default, name)}


def as_document(entity: Declaration) -> JsonObject:
    """An entity as tables and lists; fields with their default are left out."""
    if isinstance(entity, Binding):
        document = changed_fields(entity, Binding(Exchange(), ""))
        document["source"], document["destination"] = as_document(entity.source), entity.destination
        return {"is": "binding", **document}
    if isinstance(entity, Exchange):
        return {"is": "exchange", **changed_fields(entity, Exchange())}
    document = changed_fields(entity, Queue(""))
    if entity.exchange is not None:
        document["exchange"] = as_document(entity.exchange)
    if entity.bindings:
        document["bindings"] = [as_document(binding) for binding in entity.bindings]
    return {"is": "queue", "name": entity.name, **document}


def from_document(document: JsonFields) -> Any:
    """The entity that `as_document` wrote. Raises: KeyError, TypeError, ValueError, AttributeError for another document."""
    values = dict(document)
    entity_class = _KINDS[values.pop("is")]
    for name in ("source", "exchange"):
        if name in values:
            values[name] = from_document(values[name])
    if "bindings" in values:
        values["bindings"] = tuple(from_document(binding) for binding in values["bindings"])
    entity = entity_class(**values)
    if entity.arguments:
        entity = replace(entity, arguments=tuple((name, value) for name, value in entity.arguments))
    hash(entity)  # publishers remember what they have declared
    return entity


T = TypeVar("T")


# What a kombu.Queue may say of its limits, and an object like it need not.
_LIMITS = ("max_priority", "max_length", "max_length_bytes", "message_ttl", "expires")


def queue_of(entity: Any) -> Queue:
    """The queue that a kombu.Queue, or an object with its attributes, describes. Raises: AttributeError for another object."""
    exchange = exchange_of(entity.exchange) if entity.exchange and entity.exchange.name else None
    if type(entity).__name__ == "Broadcast":
        return Broadcast(entity.alias or entity.name, exchange=exchange)
    bindings = [
        Binding(exchange_of(binding.exchange), entity.name, binding.routing_key or "")
        for binding in getattr(entity, "bindings", None) or ()
    ]
    limits: dict[str, Any] = {name: getattr(entity, name, None) for name in _LIMITS}
    return Queue(
        entity.name,
        exchange=exchange,
        routing_key=entity.routing_key or entity.name,
        durable=entity.durable,
        exclusive=entity.exclusive,
        auto_delete=entity.auto_delete,
        bindings=tuple(sorted(bindings, key=lambda binding: (binding.source.name, binding.routing_key))),
        queue_arguments=entity.queue_arguments,
        **limits,
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

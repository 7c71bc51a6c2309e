"""Compares declarations with a broker's management HTTP API: every difference, as text.

The API's objects are those of RabbitMQ's `/api/queues`, `/api/exchanges` and `/api/bindings`
(https://www.rabbitmq.com/docs/http-api-reference).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

from amqtask.protocol.entities import Binding, Declaration, Exchange, Queue
from amqtask.topology.declarations import is_declarable

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonFields, JsonObject, QueueArguments

Status = Literal["ok", "created", "missing", "differs", "refused", "unknown"]
IN_ORDER: frozenset[Status] = frozenset({"ok", "created"})


class Finding(NamedTuple):
    """One entity and whether the broker has it as declared; `detail` says what differs, or why that is not known."""

    entity: Declaration
    status: Status
    detail: str = ""


def compare(
    declarations: Iterable[Declaration],
    queues: Iterable[JsonFields],
    exchanges: Iterable[JsonFields],
    bindings: Iterable[JsonFields],
) -> Iterator[Finding]:
    """A finding for each declared entity, in the same order."""
    queues_there = {str(queue["name"]): queue for queue in queues}
    exchanges_there = {str(exchange["name"]): exchange for exchange in exchanges}
    bindings_there = {_binding_key(binding) for binding in bindings}
    for entity in declarations:
        if isinstance(entity, Binding):
            yield Finding(entity, "ok" if _declared_key(entity) in bindings_there else "missing")
        elif isinstance(entity, Queue):
            yield _compare(entity, queues_there.get(entity.name), _of_queue(entity))
        else:
            yield _compare(entity, exchanges_there.get(entity.name), _of_exchange(entity))


def _compare(entity: Queue | Exchange, existing: QueueArguments | None, declared: QueueArguments) -> Finding:
    if existing is None:
        return Finding(entity, "missing")
    differences = list(_differences(declared, {**existing, **_flat(existing.get("arguments") or {})}))
    return Finding(entity, "differs" if differences else "ok", "; ".join(differences))


def _differences(declared: QueueArguments, existing: QueueArguments) -> Iterator[str]:
    arguments = {name for name in existing if name.startswith("x-") or name == "alternate-exchange"}
    for name in sorted({*declared, *arguments}):
        existing_value, declared_value = existing.get(name), declared.get(name)
        if name == "x-queue-type" and (
            declared_value is None or (existing_value is None and declared_value == "classic")
        ):
            continue  # the broker's default, which newer brokers report as an argument
        if existing_value != declared_value:
            yield f"{name} is {_text(existing_value)}, wanted {_text(declared_value)}"


def _text(value: object) -> str:
    return "not set" if value is None else repr(value)


def _of_queue(queue: Queue) -> JsonObject:
    return {"durable": queue.durable, "auto_delete": queue.auto_delete, **_flat(queue.argument_map)}


def _of_exchange(exchange: Exchange) -> JsonObject:
    properties = {"type": exchange.type, "durable": exchange.durable, "auto_delete": exchange.auto_delete}
    return {**properties, **_flat(dict(exchange.arguments))}


def _flat(arguments: QueueArguments) -> JsonObject:
    """Arguments as JSON has them: a number is a number, whatever its AMQP type."""
    return {name: value for name, value in arguments.items() if value is not None}


def _binding_key(binding: JsonFields) -> tuple[object, ...]:
    return (
        binding["source"],
        binding["destination"],
        binding["destination_type"],
        binding["routing_key"],
        _hashable(binding.get("arguments") or {}),
    )


def _declared_key(binding: Binding) -> tuple[object, ...]:
    destination_type = "exchange" if binding.to_exchange else "queue"
    return (
        binding.source.name, binding.destination, destination_type, binding.routing_key, _hashable(dict(binding.arguments))
    )  # fmt: skip


def _hashable(arguments: QueueArguments) -> tuple[object, ...]:
    return tuple(sorted((name, repr(value)) for name, value in arguments.items()))


def by_kind(
    entities: Iterable[Declaration],
) -> tuple[list[Exchange], list[Queue], list[Binding]]:
    """Exchanges (without the predeclared ones), queues and bindings, each in their order."""
    exchanges: list[Exchange] = []
    queues: list[Queue] = []
    bindings: list[Binding] = []
    for entity in entities:
        if isinstance(entity, Binding):
            bindings.append(entity)
        elif isinstance(entity, Queue):
            queues.append(entity)
        elif is_declarable(entity):
            exchanges.append(entity)
    return exchanges, queues, bindings

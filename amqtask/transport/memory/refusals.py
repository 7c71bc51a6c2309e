"""Refusals of the broker, in RabbitMQ's own words, and which declarations differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amqtask.protocol.entities import Exchange, Queue
from amqtask.transport.errors import ACCESS_REFUSED, NOT_FOUND, PRECONDITION_FAILED

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonObject

RESOURCE_LOCKED, NOT_IMPLEMENTED = 405, 540


class Refused(Exception):
    """The broker closes the channel with this; `reply_code` and `reply_text` as in `channel.close`."""

    def __init__(self, reply_code: int, reply_text: str) -> None:
        super().__init__(f"{reply_code} {reply_text}")
        self.reply_code = reply_code
        self.reply_text = reply_text


def not_found(entity_type: str, name: str) -> Refused:
    """No such queue or exchange."""
    return Refused(NOT_FOUND, f"NOT_FOUND - no {entity_type} '{name}' in vhost '/'")


def resource_locked(queue: str) -> Refused:
    """An exclusive queue of another connection."""
    return Refused(
        RESOURCE_LOCKED, f"RESOURCE_LOCKED - cannot obtain exclusive access to locked queue '{queue}' in vhost '/'"
    )


def too_large(size: int, limit: int) -> Refused:
    """A body over max_message_size."""
    return Refused(
        PRECONDITION_FAILED,
        f"PRECONDITION_FAILED - message size {size} is larger than configured max size {limit}",
    )


def invalid_expiration(text: str) -> Refused:
    """A message whose expiration is no number of milliseconds."""
    return Refused(PRECONDITION_FAILED, f"PRECONDITION_FAILED - invalid expiration '{text}'")


def consumed_exclusively(queue: str) -> Refused:
    """A consumer that the queue's other consumers leave no room for."""
    return Refused(ACCESS_REFUSED, f"ACCESS_REFUSED - queue '{queue}' in vhost '/' in exclusive use")


def in_use(queue: str) -> Refused:
    """A queue that was to be deleted if it had no consumers or no messages."""
    return Refused(PRECONDITION_FAILED, f"PRECONDITION_FAILED - queue '{queue}' in vhost '/' in use or not empty")


def not_implemented(method: str) -> Refused:
    """A method that this broker has not."""
    return Refused(NOT_IMPLEMENTED, f"NOT_IMPLEMENTED - the in-memory broker has no {method}")


def unknown_tag(tag: int) -> Refused:
    """An answer to a delivery that was answered already, or never made."""
    return Refused(PRECONDITION_FAILED, f"PRECONDITION_FAILED - unknown delivery tag {tag}")


def check_valid(queue: Queue) -> None:
    """Raises: Refused for properties that the queue's type does not allow."""
    queue_type = queue.argument_map.get("x-queue-type", "classic")
    if queue_type not in ("classic", "quorum"):
        raise Refused(PRECONDITION_FAILED, f"PRECONDITION_FAILED - the in-memory broker has no {queue_type} queues")
    if queue_type == "quorum":
        for name, is_wrong in (("durable", not queue.durable), ("exclusive", queue.exclusive),
                               ("auto-delete", queue.auto_delete)):  # fmt: skip
            if is_wrong:
                text = f"PRECONDITION_FAILED - invalid property '{name}' for queue '{queue.name}' in vhost '/'"
                raise Refused(PRECONDITION_FAILED, text)


def check_same(declared: Queue | Exchange, existing: Queue | Exchange) -> None:
    """Raises: Refused when the existing entity has other properties or arguments."""
    declared_properties, existing_properties = _properties(declared), _properties(existing)
    for name in sorted({*declared_properties, *existing_properties}):
        if declared_properties.get(name) != existing_properties.get(name):
            entity_type = "queue" if isinstance(declared, Queue) else "exchange"
            raise Refused(
                PRECONDITION_FAILED,
                f"PRECONDITION_FAILED - inequivalent arg '{name}' for {entity_type} '{declared.name}' in vhost '/': "
                f"received {_shown(declared_properties.get(name))} but current is {_shown(existing_properties.get(name))}",
            )


def _properties(entity: Queue | Exchange) -> JsonObject:
    arguments = dict(entity.arguments)
    if isinstance(entity, Exchange):
        # A client that only uses an exchange need not know whether it deletes itself.
        return {"type": entity.type, "durable": entity.durable, **arguments}
    queue_type = arguments.pop("x-queue-type", "classic")
    return {
        "durable": entity.durable,
        "exclusive": entity.exclusive,
        "auto_delete": entity.auto_delete,
        "x-queue-type": queue_type,
        **arguments,
    }


def _shown(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"'{str(value).lower()}'"
    type_name = "longstr" if isinstance(value, str) else "signedint"
    return f"the value '{value}' of type '{type_name}'"

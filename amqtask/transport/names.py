"""Names of entities, for errors and warnings."""

from __future__ import annotations

from amqtask.exceptions import PublishError
from amqtask.protocol.entities import Binding, Declaration, Exchange, Queue

# Bytes of the name of a queue or exchange, or of a routing key: they are AMQP short strings.
LONGEST_NAME = 255


def entity_name(entity: Declaration) -> str:
    """The entity's type and name."""
    if isinstance(entity, Queue):
        return f"queue {entity.name!r}"
    if isinstance(entity, Exchange):
        return f"exchange {entity.name!r}"
    return f"the binding of {entity.destination!r} to {entity.source.name!r}"


def has_line_end(name: str) -> bool:
    """Whether a name has line ends, which RabbitMQ removes (rabbit_channel:strip_cr_lf): it then declares another queue or
    exchange, and a client that waits for the answer about this one waits for ever."""
    return "\r" in name or "\n" in name


def check_name(entity: Declaration) -> None:
    """Raises: PublishError for a name that no queue or exchange can have."""
    if isinstance(entity, Binding):
        return
    if has_line_end(entity.name):
        raise PublishError(
            f"{entity_name(entity)} cannot be declared: its name has a line end, which RabbitMQ takes out"
        )
    size = len(entity.name.encode(errors="replace"))
    if size > LONGEST_NAME:
        raise PublishError(
            f"{entity_name(entity)} cannot be declared: its name has {size} bytes, and can have {LONGEST_NAME}"
        )

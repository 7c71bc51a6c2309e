"""Entities in words, for errors and warnings."""

from __future__ import annotations

from amqtask.entities import Declaration, Exchange, Queue


def entity_name(entity: Declaration) -> str:
    """What it is and what it is called."""
    if isinstance(entity, Queue):
        return f"queue {entity.name!r}"
    if isinstance(entity, Exchange):
        return f"exchange {entity.name!r}"
    return f"the binding of {entity.destination!r} to {entity.source.name!r}"

"""`celery.events.event`."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any

from amqtask.protocol.entities import Exchange

if TYPE_CHECKING:
    from amqtask.ground.shapes import EventDict

__all__ = ["Event", "event_exchange", "get_exchange", "group_from"]

event_exchange = Exchange("celeryev", type="topic")


def Event(
    type: str, _fields: EventDict | None = None, __dict__: type = dict, __now__: Any = time.time, **fields: object
) -> Any:
    """An event as the dictionary that it is on the wire."""
    event = {**(_fields or {}), **fields, "type": type}
    event.setdefault("timestamp", __now__())
    return event


def group_from(type: str) -> str:
    """`task` of `task-sent`."""
    return type.partition("-")[0]


def get_exchange(conn: object = None, name: str = "celeryev") -> Exchange:
    """The exchange that events go to."""
    return copy.copy(event_exchange) if name == event_exchange.name else Exchange(name, type="topic")

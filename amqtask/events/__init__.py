"""Events, the client's end: receive them, fold them into a state, take snapshots of it, send one's own.

Names are resolved on first use: a worker, which sends events, needs none of what receives them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amqtask.events.client import Events, EventSettings
    from amqtask.events.connection import BrokerConnection
    from amqtask.events.dispatcher import EventDispatcher
    from amqtask.events.receiver import EventReceiver
    from amqtask.events.state import State

__all__ = ["BrokerConnection", "EventDispatcher", "EventReceiver", "EventSettings", "Events", "State"]

_WHERE = {
    "BrokerConnection": "connection",
    "EventDispatcher": "dispatcher",
    "EventReceiver": "receiver",
    "EventSettings": "client",
    "Events": "client",
    "State": "state",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        return importlib.import_module("amqtask.compat").lookup(__name__, name)
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)

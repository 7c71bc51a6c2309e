"""Events, the client's side: receive them, keep a state of the cluster, take snapshots of it, send your own.

Names are resolved on first use: a worker, which sends events, needs none of what receives them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amqtask.ground.plugins import load, others_names

if TYPE_CHECKING:
    from amqtask.events.client import BrokerConnection, EventReceiver, Events, EventSettings
    from amqtask.events.dispatcher import EventDispatcher
    from amqtask.events.state import State

__all__ = ["BrokerConnection", "EventDispatcher", "EventReceiver", "EventSettings", "Events", "State"]

_WHERE = {
    "BrokerConnection": "client",
    "EventDispatcher": "dispatcher",
    "EventReceiver": "client",
    "EventSettings": "client",
    "Events": "client",
    "State": "state",
}
_others_name = others_names(__name__)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        return _others_name(name)
    return getattr(load(f"{__name__}.{_WHERE[name]}"), name)

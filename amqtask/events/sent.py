"""task-sent events: a producer's events for the calls that the broker has taken."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from amqtask.events.dispatcher import anonymous_name
from amqtask.protocol.event import event, event_message, events_message, utc_offset
from amqtask.topology.delays import TO_HEADER

if TYPE_CHECKING:
    from amqtask.ground.lamport_clock import LamportClock
    from amqtask.ground.shapes import EventDict
    from amqtask.protocol.message import Message

# Events in one message at most.
BATCH = 100


def sent_fields(message: Message) -> EventDict:
    """The fields of a task-sent event (celery/app/amqp.py) for a task message; for a delayed one with its destination."""
    headers = message.properties.headers
    exchange = headers.get(TO_HEADER, message.exchange)
    return {
        "uuid": headers["id"],
        "root_id": headers.get("root_id"),
        "parent_id": headers.get("parent_id"),
        "name": headers["task"],
        "args": headers.get("argsrepr"),
        "kwargs": headers.get("kwargsrepr"),
        "retries": headers.get("retries") or 0,
        "eta": headers.get("eta"),
        "expires": headers.get("expires"),
        # Any exchange but the default one chooses the queues itself.
        "queue": None if exchange else message.routing_key,
        "exchange": exchange,
        "routing_key": message.routing_key,
    }


class SentEvents:
    """Sends events for messages that were published; `publish` must not block for long, nor raise."""

    def __init__(
        self,
        publish: Callable[[Sequence[Message]], object],
        *,
        exchange: str,
        serializer: str,
        clock: LamportClock,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._publish = publish
        self._exchange = exchange
        self._serializer = serializer
        self._clock = clock
        self._wall_clock = wall_clock

    def sent(self, messages: Sequence[Message]) -> None:
        """The broker has these task messages."""
        hostname, now, offset, pid = anonymous_name(), self._wall_clock(), utc_offset(), os.getpid()
        events = [
            event(
                "task-sent",
                hostname,
                timestamp=now,
                clock=self._clock.forward(),
                pid=pid,
                utcoffset=offset,
                **sent_fields(message),
            )
            for message in messages
        ]
        if len(events) == 1:
            self._publish((event_message(events[0], self._exchange, serializer=self._serializer),))
        elif events:
            self._publish(
                [
                    events_message(events[start : start + BATCH], self._exchange, serializer=self._serializer)
                    for start in range(0, len(events), BATCH)
                ]
            )

"""EventDispatcher: sends your own events, from producers, tasks and tools."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING

from amqtask.ground.lamport_clock import LamportClock
from amqtask.protocol.event import event, event_message, utc_offset

if TYPE_CHECKING:
    from amqtask.ground.shapes import EventDict, EventFields
    from amqtask.protocol.message import Message


def anonymous_name() -> str:
    """The name of a process that is no worker, `gen1234@host` (celery/utils/nodenames.py)."""
    return f"gen{os.getpid()}@{socket.gethostname()}"


class EventDispatcher:
    """`send(type, **fields)` sends an event; `groups` limits that to events of these groups ("task", "worker", your own)."""

    def __init__(
        self,
        publish: Callable[[Message], object],
        *,
        hostname: str | None = None,
        enabled: bool = True,
        groups: Iterable[str] = (),
        exchange: str,
        serializer: str,
        clock: LamportClock | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.hostname = hostname or anonymous_name()
        self.enabled = enabled
        self.groups = set(groups)
        self.clock = clock or LamportClock()
        self._publish = publish
        self._exchange = exchange
        self._serializer = serializer
        self._wall_clock = wall_clock
        self._lock = threading.Lock()

    def send(self, type: str, blind: bool = False, **fields: object) -> None:
        """Publish an event, transient but confirmed; `blind` leaves the logical time out. Raises: PublishError."""
        if self.enabled and (not self.groups or type.partition("-")[0] in self.groups):
            event_fields = self._event(type, fields, blind=blind)
            self._publish(event_message(event_fields, self._exchange, serializer=self._serializer))

    def _event(self, type: str, fields: EventFields, *, blind: bool) -> EventDict:
        with self._lock:
            clock = None if blind else self.clock.forward()
        all_fields = {"timestamp": self._wall_clock(), "pid": os.getpid(), "utcoffset": utc_offset(), **fields}
        return event(type, self.hostname, clock=clock, **all_fields)

    def enable(self) -> None:
        """Send from now on."""
        self.enabled = True

    def disable(self) -> None:
        """Make `send` do nothing."""
        self.enabled = False

    def close(self) -> None:
        """Does nothing: it has no connection of its own."""

    def __enter__(self) -> EventDispatcher:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

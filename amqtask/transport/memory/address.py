"""MemoryAddress: where a broker in this process is, for all that connects to addresses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from amqtask.transport.memory.broker import MemoryBroker
from amqtask.transport.memory.stream import MemoryStream
from amqtask.transport.memory.wire import MemoryWire
from amqtask.transport.url import BrokerAddress

if TYPE_CHECKING:
    import pika

    from amqtask.ground.loop import TurnLoop
    from amqtask.transport.wire import Wire

MEMORY_URL = "memory://"


@dataclass(frozen=True, slots=True)
class MemoryAddress(BrokerAddress):
    """A host that is this process; any login is taken."""

    host: str = "memory"
    port: int = 0
    # Nothing can be silent here.
    heartbeat: int | None = 0
    broker: MemoryBroker = field(default_factory=MemoryBroker, repr=False)

    @property
    def safe_url(self) -> str:
        """`memory://`."""
        return MEMORY_URL

    @property
    def url(self) -> str:
        """`memory://`."""
        return MEMORY_URL

    def stream(self) -> MemoryStream:
        """A stream of bytes to the broker, not connected."""
        return MemoryStream(self.broker)

    def wire(
        self,
        loop: TurnLoop,
        parameters: pika.ConnectionParameters,
        on_open: Callable[[Wire], None],
        on_failed: Callable[[Wire, Exception], None],
        on_closed: Callable[[Wire, Exception], None],
    ) -> Wire:
        """A connection on a loop, that begins to connect."""
        return MemoryWire(self.broker, loop, parameters, on_open, on_failed, on_closed)

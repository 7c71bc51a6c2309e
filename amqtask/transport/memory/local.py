"""LocalBroker: `memory://`, the doors to a MemoryBroker of this application in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from amqtask.transport.amqp import AmqpBroker
from amqtask.transport.memory.broker import MemoryBroker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from amqtask.transport.contract import AsyncPublisher, BrokerOptions, OnWarning
    from amqtask.transport.url import BrokerAddress


class LocalBroker(AmqpBroker):
    """See amqtask.transport.broker.Broker. The doors are AMQP's; they lead to an address in this process."""

    transport = driver = "memory"
    is_shared = False

    def __init__(self, options: BrokerOptions, kept: dict[str, object]) -> None:
        super().__init__(options, kept)
        # Settings change; what is in the queues stays.
        self._memory = cast("MemoryBroker", kept.get("memory") or kept.setdefault("memory", MemoryBroker()))

    @property
    def memory(self) -> MemoryBroker:
        """The broker itself."""
        return self._memory

    def _parsed(self, urls: str | Sequence[str] | None) -> tuple[BrokerAddress, ...]:
        from amqtask.transport.memory.address import MemoryAddress

        return (MemoryAddress(broker=self._memory),)

    def async_publisher(self, *, name: str, on_warning: OnWarning) -> AsyncPublisher:
        """In the event loop's thread."""
        from amqtask.transport.memory.async_publisher import MemoryAsyncPublisher

        return MemoryAsyncPublisher(self.publisher(name=name, on_warning=on_warning))

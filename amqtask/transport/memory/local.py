"""LocalBroker: `memory://`, the doors to a MemoryBroker of this application in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from amqtask.exceptions import ConfigurationError
from amqtask.transport.memory.broker import MemoryBroker

if TYPE_CHECKING:
    from typing import NoReturn

    from amqtask.ground.loop import Loop
    from amqtask.ground.shapes import JsonObject
    from amqtask.protocol.entities import Queue
    from amqtask.protocol.message import Delivery
    from amqtask.transport.contract import BrokerOptions, ConsumerListener, OnWarning
    from amqtask.transport.memory.consumer import MemoryConsumer
    from amqtask.transport.memory.feed import MemoryQueueReader
    from amqtask.transport.memory.jobs import MemoryJobs
    from amqtask.transport.memory.publisher import (
        MemoryAsyncPublisher,
        MemoryEventPublisher,
        MemoryLoopPublisher,
        MemoryPublisher,
    )

MEMORY_URL = "memory://"
MEMORY_RESULTS = "cache+memory://"


class LocalBroker:
    """See amqtask.transport.broker.Broker."""

    transport = driver = "memory"
    is_shared = joins_chords = False
    safe_url, urls, addresses = MEMORY_URL, (MEMORY_URL,), ()

    def __init__(self, options: BrokerOptions, kept: dict[str, object]) -> None:
        # Settings change; what is in the queues stays.
        self.memory = cast("MemoryBroker", kept.get(MEMORY_URL) or kept.setdefault(MEMORY_URL, MemoryBroker()))

    def info(self) -> JsonObject:
        """That it is here."""
        return {"transport": self.transport, "url": MEMORY_URL, "transport_options": {}, "alternates": []}

    def results_url(self, url: str) -> str:
        """Replies stay in this process, too."""
        return MEMORY_RESULTS if url.partition("://")[0] == "rpc" else url

    # -- doors for callers

    def publisher(self, *, name: str, on_warning: OnWarning) -> MemoryPublisher:
        """Stores at once."""
        from amqtask.transport.memory.publisher import MemoryPublisher

        return MemoryPublisher(self.memory, on_warning=on_warning)

    def async_publisher(self, *, name: str, on_warning: OnWarning) -> MemoryAsyncPublisher:
        """Stores at once."""
        from amqtask.transport.memory.publisher import MemoryAsyncPublisher

        return MemoryAsyncPublisher(self.memory, on_warning=on_warning)

    def event_publisher(self, *, name: str, on_warning: OnWarning) -> MemoryEventPublisher:
        """Stores at once."""
        from amqtask.transport.memory.publisher import MemoryEventPublisher

        return MemoryEventPublisher(self.memory, on_warning=on_warning)

    def queue_reader(self, queue: Queue, on_delivery: Callable[[Delivery], None], *, name: str) -> MemoryQueueReader:
        """Reads in the thread that waits."""
        from amqtask.transport.memory.feed import MemoryQueueReader

        return MemoryQueueReader(self.memory, queue, on_delivery)

    def queue_jobs(self) -> MemoryJobs:
        """On the queues of this process."""
        from amqtask.transport.memory.jobs import MemoryJobs

        return MemoryJobs(self.memory)

    def admin(self) -> NoReturn:
        """Raises: ConfigurationError: the command line is another process."""
        raise ConfigurationError("memory:// lives inside each process: no other process can look at its queues")

    # -- doors for those who run on a loop

    def consumer(
        self, loop: Loop, listener: ConsumerListener, *, name: str, heartbeat: int | None, no_ack: bool = False
    ) -> MemoryConsumer:
        """On this loop."""
        from amqtask.transport.memory.consumer import MemoryConsumer

        return MemoryConsumer(self.memory, loop, listener, no_ack=no_ack)

    def loop_publisher(
        self, loop: Loop, *, name: str, heartbeat: int | None, on_warning: OnWarning
    ) -> MemoryLoopPublisher:
        """On this loop."""
        from amqtask.transport.memory.publisher import MemoryLoopPublisher

        return MemoryLoopPublisher(self.memory, loop, on_warning=on_warning)

    def shared_ends(self, loop: Loop, *, name: str, heartbeat: int | None, writes: bool = False) -> MemorySharedEnds:
        """Where connections are not lost one by one, both have their own."""
        return MemorySharedEnds(self, loop)

    def collector(self, loop: Loop, *, name: str, heartbeat: int | None, on_warning: OnWarning) -> NoReturn:
        """Raises: ConfigurationError: the parts of chords are counted in this process."""
        raise ConfigurationError("the in-memory broker joins no chords: they are counted in this process")


class MemorySharedEnds:
    """See amqtask.transport.contract.SharedEnds."""

    def __init__(self, broker: LocalBroker, loop: Loop) -> None:
        self._broker = broker
        self._loop = loop

    def consumer(self, listener: ConsumerListener, *, no_ack: bool = False) -> MemoryConsumer:
        """On the loop."""
        return self._broker.consumer(self._loop, listener, name="", heartbeat=None, no_ack=no_ack)

    def publisher(self, *, on_warning: OnWarning, nack_patience: float | None = None) -> MemoryLoopPublisher:
        """On the loop."""
        return self._broker.loop_publisher(self._loop, name="", heartbeat=None, on_warning=on_warning)

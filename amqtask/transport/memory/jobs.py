"""MemoryJobs: odd jobs on the queues of a MemoryBroker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amqtask.protocol.message import Delivery
from amqtask.transport.contract import QueueState

if TYPE_CHECKING:
    from amqtask.transport.memory.broker import MemoryBroker


class MemoryJobs:
    """See amqtask.transport.contract.QueueJobs."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker

    def __enter__(self) -> MemoryJobs:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def state(self, queue: str) -> QueueState:
        """How many messages are ready; consumers are not counted."""
        return QueueState(self._broker.count(queue), 0)

    def purge(self, queue: str) -> int:
        """Drop all ready messages; how many. 0 for a queue that is not there."""
        return self._broker.purge(queue) if self._broker.count(queue) else 0

    def delete(self, queue: str) -> None:
        """Delete a queue and its messages."""
        self._broker.delete_queue(queue)

    def take(self, queue: str) -> Delivery | None:
        """The first message, which is gone then."""
        broker = self._broker
        with broker.lock:
            if not broker.count(queue):
                return None
            stored = broker.queue(queue).pop()
        return Delivery(stored.body, stored.decoded(), stored.exchange, stored.routing_key, False, queue, 0, 0)

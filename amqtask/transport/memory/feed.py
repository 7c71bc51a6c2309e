"""MemoryQueueReader: a queue of a MemoryBroker, read by the thread that waits; what QueueReader is over AMQP."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from amqtask.exceptions import BrokerUnreachable
from amqtask.protocol.message import Delivery
from amqtask.topology.declarations import consumption
from amqtask.transport.memory.publisher import declare_all

if TYPE_CHECKING:
    from amqtask.protocol.entities import Queue
    from amqtask.transport.memory.broker import MemoryBroker
    from amqtask.transport.memory.session import Delivered, Session

# How long a wait goes on before an unreachable broker is tried again, in seconds.
RETRY_PAUSE = 0.05
LONG = 3600.0


class MemoryQueueReader:
    """Declares and consumes `queue` and hands each message to `on_delivery`, in the thread that drives."""

    def __init__(self, broker: MemoryBroker, queue_: Queue, on_delivery: Callable[[Delivery], None]) -> None:
        self._broker = broker
        self._queue = queue_
        self._on_delivery = on_delivery
        self._session: Session | None = None
        self._inbox: queue.SimpleQueue[Delivered] = queue.SimpleQueue()

    def ensure(self, timeout: float) -> None:
        """Connect and consume. Raises: BrokerUnreachable."""
        self._connected(time.monotonic() + timeout)

    def drive(self, done: Callable[[], bool], deadline: float | None) -> bool:
        """Wait until `done()` or the deadline (monotonic seconds, None: for ever). Raises: BrokerUnreachable."""
        while not done():
            now = time.monotonic()
            end = now + LONG if deadline is None else deadline
            if now >= end:
                return False
            self._connected(end)
            try:
                self._hand_over(self._inbox.get(timeout=min(RETRY_PAUSE, end - now)))
            except queue.Empty:
                continue
        return True

    def close(self) -> None:
        """Disconnect; the queue is deleted."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _connected(self, deadline: float) -> None:
        while self._session is None or not self._session.is_open:
            try:
                self._session = self._consume()
            except ConnectionRefusedError as error:
                if time.monotonic() + RETRY_PAUSE >= deadline:
                    raise BrokerUnreachable(str(error)) from error
                time.sleep(RETRY_PAUSE)

    def _consume(self) -> Session:
        session = self._broker.connect(lambda error: None)
        declare_all(self._broker, consumption(self._queue), lambda text: None, session)
        session.consume(self._queue.name, "feed", self._inbox.put, lambda tag: None, prefetch=0, no_ack=True)
        return session

    def _hand_over(self, delivered: Delivered) -> None:
        stored = delivered.stored
        self._on_delivery(
            Delivery(
                stored.body,
                delivered.properties,
                stored.exchange,
                stored.routing_key,
                delivered.redelivered,
                delivered.queue,
                delivered.tag,
                0,
            )
        )

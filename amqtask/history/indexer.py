"""Indexer: reads kept events from the broker into the index, until it is stopped.

What is acknowledged, or has a later offset, is in the index: a batch is acknowledged after its transaction. An indexer that is
killed in between reads the batch again: from a stream it knows by the offset that it has it, from a queue by the events.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from amqtask.exceptions import AccessRefused, MessageError, OperationalError
from amqtask.ground.printable import bounded_logger
from amqtask.history.index import DELETED_AT_ONCE, HistoryIndex, Overtaken
from amqtask.protocol.event import read_events
from amqtask.transport.contract import OFFSET, PREFETCH

if TYPE_CHECKING:
    from amqtask.ground.shapes import EventDict
    from amqtask.protocol.message import Delivery
    from amqtask.transport.contract import Tail

logger = bounded_logger("amqtask.history")

# Messages that are read at once, and events after which a batch is written: a message has one to 500. (All that waits after a
# pause, read at once, would be 100,000 events.)
MOST_MESSAGES, MOST_EVENTS = 10, 2_000
# Seconds that a read waits for a message, for others to come after it, and before another attempt.
READ_SECONDS, GATHER_SECONDS, RETRY_SECONDS = 0.5, 0.2, 1.0
# Seconds between looks at what is too old.
FORGET_SECONDS = 60.0


class Indexer:
    """`open_tail(position)` reads what comes after that position; times are seconds."""

    def __init__(
        self,
        index: HistoryIndex,
        open_tail: Callable[[int | None], Tail],
        *,
        accept: frozenset[str],
        max_age: float,
        max_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.index = index
        self._open_tail = open_tail
        self._accept = accept
        self._max_age = max_age
        self._max_bytes = max_bytes
        self._clock = clock
        self._stop = threading.Event()
        self._position: int | None = None
        self._tail: Tail | None = None
        self._problem = ""
        self._forget_at = 0.0
        # The key before which tasks are being forgotten.
        self._forget_before: int | None = None
        # Events that were taken in.
        self.count = 0

    def run(self) -> None:
        """Read until `stop`. Raises: AccessRefused, ConfigurationError; what is away is waited for."""
        logger.info("history: reading")
        try:
            while not self._stop.is_set():
                self._turn()
        finally:
            self.close()

    def stop(self) -> None:
        """End `run`, from another thread or a signal handler."""
        self._stop.set()

    def _turn(self) -> None:
        try:
            # What is to be forgotten goes in portions, between batches: what comes in does not wait for all of it.
            self.read_once(READ_SECONDS if self._forget_before is None else 0.0)
            self._forget()
        except AccessRefused:
            raise
        except OperationalError as error:
            self.close()
            if not isinstance(error, Overtaken) and str(error) != self._problem:
                self._problem = str(error)
                logger.warning("history: %s; trying again", error)
            self._stop.wait(RETRY_SECONDS)
        else:
            if self._problem:
                self._problem = ""
                logger.warning("history: goes on")

    def read_once(self, seconds: float = READ_SECONDS) -> int:
        """Take in what has come, waiting for the first message at most so long; how many events that were.

        Raises: OperationalError."""
        if self._tail is None:
            self._position = self.index.position()
            self._tail = self._open_tail(self._position)
        deliveries = self._tail.read(MOST_MESSAGES, seconds)
        if not deliveries:
            return 0
        now, count = _offset(deliveries[-1]), len(deliveries)
        events = self._events(deliveries)
        gather_until = self._clock() + GATHER_SECONDS
        # The broker sends no more than PREFETCH ahead: to wait for more would be to wait for nothing.
        while len(events) < MOST_EVENTS and count < PREFETCH and (seconds_left := gather_until - self._clock()) > 0:
            deliveries = self._tail.read(MOST_MESSAGES, seconds_left)
            if deliveries:
                now, count = _offset(deliveries[-1]), count + len(deliveries)
                events += self._events(deliveries)
        if now is not None and self._position is not None and now <= self._position:
            logger.warning("history: the stream was made anew; it is read from its beginning")
        batch = self.index.take(events, before=self._position, now=now)
        if batch.skipped:
            logger.warning("history: %d events without a time or an id are left out", batch.skipped)
        self._position = now
        self._tail.acknowledge()
        self.count += len(events)
        return len(events)

    def _events(self, deliveries: Sequence[Delivery]) -> list[EventDict]:
        events: list[EventDict] = []
        for delivery in deliveries:
            properties = delivery.properties
            try:
                events += read_events(delivery.body, properties.content_type, properties.content_encoding, self._accept)
            except MessageError as error:
                logger.warning("history: a message under %r is skipped: %s", delivery.routing_key, error)
        return events

    def _forget(self) -> None:
        now = self._clock()
        if now >= self._forget_at:
            self._forget_at = now + FORGET_SECONDS
            self._forget_before = self.index.outdated(max_age=self._max_age, max_bytes=self._max_bytes)
        if self._forget_before is not None and self.index.forget(self._forget_before) < DELETED_AT_ONCE:
            self._forget_before = None

    def close(self) -> None:
        """Disconnect from the broker; `read_once` connects again."""
        tail, self._tail = self._tail, None
        if tail is not None:
            tail.close()


def _offset(delivery: Delivery) -> int | None:
    """Where in the stream the message is; None in a queue."""
    offset = (delivery.properties.headers or {}).get(OFFSET)
    # In Redis a header may be any number.
    return offset if isinstance(offset, int) and 0 <= offset < 2**63 else None

"""Indexer: reads kept events from the broker into the index, until it is stopped.

What is acknowledged, or has a later offset, is in the index: a batch is acknowledged after its transaction. An indexer that is
killed in between reads the batch again: from a stream it knows by the offset that it has it, from a queue by the events.

Nothing that is read ends it. What cannot be taken in is set aside in the index, with the reason, and the rest goes on without it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from amqtask.exceptions import AccessRefused, ConfigurationError, OperationalError, QueueNotFound, line_of
from amqtask.ground.printable import bounded_logger
from amqtask.history.index import DELETED_AT_ONCE, LONGEST_ASIDE, HistoryIndex, Overtaken
from amqtask.history.tables import ASIDE
from amqtask.protocol.event import read_events
from amqtask.protocol.task import saferepr
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
    """`open_tail(position)` reads what comes after that position; times are seconds.

    One that `is_patient` tries again also where only an operator can help: as a thread of a program that does other things."""

    def __init__(
        self,
        index: HistoryIndex,
        open_tail: Callable[[int | None], Tail],
        *,
        accept: frozenset[str],
        max_age: float,
        max_bytes: int,
        is_patient: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.index = index
        self._open_tail = open_tail
        self._accept = accept
        self._max_age = max_age
        self._max_bytes = max_bytes
        self._is_patient = is_patient
        self._clock = clock
        self._stop = threading.Event()
        self._position: int | None = None
        self._tail: Tail | None = None
        # What comes may have waited.
        self._is_behind = True
        self._problem = ""
        self._forget_at = 0.0
        # The key before which tasks are being forgotten.
        self._forget_before: int | None = None
        # Events that were taken in.
        self.count = 0

    def run(self) -> None:
        """Read until `stop`; what is away, or goes wrong, is told and tried again.

        Raises: AccessRefused, ConfigurationError, unless it is patient."""
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
        except Exception as error:
            self.close()
            is_final = isinstance(error, (AccessRefused, ConfigurationError)) and not isinstance(error, QueueNotFound)
            if is_final and not self._is_patient:
                raise
            self._tell(error)
            self._stop.wait(RETRY_SECONDS)
        else:
            if self._problem:
                self._problem = ""
                logger.warning("history: goes on")

    def _tell(self, error: Exception) -> None:
        """One line for as long as the same goes wrong."""
        problem = line_of(error)
        if not isinstance(error, Overtaken) and problem != self._problem:
            self._problem = problem
            logger.warning("history: %s; trying again", problem)

    def read_once(self, seconds: float = READ_SECONDS) -> int:
        """Take in what has come, waiting for the first message at most so long; how many events that were.

        Raises: OperationalError."""
        if self._tail is None:
            self._position = self.index.position()
            self._tail = self._open_tail(self._position)
            self._is_behind = True
        deliveries = self._tail.read(MOST_MESSAGES, seconds)
        if not deliveries:
            self._is_behind = False
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
        self._take(events, now)
        self._position = now
        self._is_behind = len(events) >= MOST_EVENTS or count >= PREFETCH
        self._tail.acknowledge()
        self.count += len(events)
        return len(events)

    def _take(self, events: Sequence[EventDict], now: int | None) -> None:
        try:
            batch = self.index.take(events, before=self._position, now=now, is_fresh=not self._is_behind)
        except OperationalError:
            raise
        except Exception as error:
            if not events:
                raise
            # One of them fails, it may be any. What is taken in twice, should this process end meanwhile, is known by its events.
            if len(events) > 1:
                for part in (events[: len(events) // 2], events[len(events) // 2 :]):
                    self._take(part, self._position)
            else:
                self._set_aside(_written(events[0]), error)
            if now != self._position:
                self._take([], now)
            return
        if batch.skipped:
            logger.warning("history: %d events without a time or an id are left out", batch.skipped)

    def _events(self, deliveries: Sequence[Delivery]) -> list[EventDict]:
        events: list[EventDict] = []
        for delivery in deliveries:
            properties = delivery.properties
            try:
                events += read_events(delivery.body, properties.content_type, properties.content_encoding, self._accept)
            except Exception as error:  # noqa: BLE001 - whatever a decoder makes of a stranger's bytes
                self._set_aside(delivery.body[:LONGEST_ASIDE].decode(errors="replace"), error)
        return events

    def _set_aside(self, body: str, error: Exception) -> None:
        reason = line_of(error)
        self.index.set_aside(body, reason)
        logger.warning("history: what cannot be taken in is set aside in the index (%s): %s", ASIDE.name, reason)

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


def _written(event: EventDict) -> str:
    try:
        return json.dumps(event, default=str)
    except (ValueError, TypeError, RecursionError):
        return saferepr(event, LONGEST_ASIDE)

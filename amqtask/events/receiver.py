"""EventReceiver: calls handlers with the events of a cluster, in the thread that captures."""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from amqtask.events.dispatcher import LamportClock
from amqtask.exceptions import AccessRefused, BrokerUnreachable, MessageError
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.event import read_events, receiver_queue

if TYPE_CHECKING:
    from amqtask.ground.shapes import EventDict, JsonObject
    from amqtask.protocol.entities import Queue
    from amqtask.protocol.message import Delivery

logger = bounded_logger(__name__)

Handler = Callable[["EventDict"], object]
# Seconds of a wait before `should_stop` is checked.
LOOK_SECONDS = 0.5
CONNECT_SECONDS = 5.0
# Seconds between attempts to reach a broker that is away.
RETRY_PAUSE = 0.5


class Feed(Protocol):
    """A consumed queue, read by the thread that waits (transport/queue_reader.py)."""

    def ensure(self, timeout: float) -> None:
        """Connect and consume. Raises: BrokerUnreachable, AccessRefused."""

    def drive(self, done: Callable[[], bool], deadline: float | None) -> bool:
        """Wait until `done()` or the deadline (monotonic). Raises: BrokerUnreachable, AccessRefused."""

    def close(self) -> None: ...


OpenFeed = Callable[["Queue", Callable[["Delivery"], None]], Feed]


class EventReceiver:
    """`app.events.Receiver`: an exclusive queue of events, that the broker deletes with it.

    `handlers` maps event types to functions of the event; "*" gets the events that have no other handler. An exception of a
    handler ends `capture`. Messages that are no events are logged and skipped. Timestamps stay the sender's Unix times;
    `local_received` is added.
    """

    def __init__(
        self,
        open_feed: OpenFeed,
        handlers: Mapping[str, Handler] | None = None,
        *,
        routing_key: str = "#",
        node_id: str | None = None,
        exchange: str,
        queue_prefix: str,
        queue_ttl: float,
        queue_expires: float,
        accept: frozenset[str],
        wake_workers: Callable[[], object],
        clock: LamportClock | None = None,
    ) -> None:
        self.handlers: Mapping[str, Handler] = {} if handlers is None else handlers
        self.node_id = node_id or str(uuid.uuid4())
        self.queue = receiver_queue(
            f"{queue_prefix}.{self.node_id}", exchange, routing_key=routing_key, ttl=queue_ttl, expires=queue_expires
        )
        self.clock = clock or LamportClock()
        # Set it (in a handler, or from another thread) to end `capture`.
        self.should_stop = False
        self._open_feed = open_feed
        self._accept = accept
        self._wake_workers = wake_workers
        self._received: deque[dict[str, object]] = deque()

    def capture(self, limit: int | None = None, timeout: float | None = None, wakeup: bool = True) -> None:
        """Call the handlers with events until `limit` events have come, or for ever.

        Raises: TimeoutError when none comes for `timeout` seconds; BrokerUnreachable when the broker cannot be reached at
        the beginning (later it waits until the broker is back); AccessRefused; exceptions of a handler.
        `wakeup` asks the workers for a heartbeat, so that they are known at once.
        """
        for _ in self.itercapture(limit, timeout, wakeup):
            pass

    def itercapture(
        self, limit: int | None = None, timeout: float | None = None, wakeup: bool = True
    ) -> Iterator[EventDict]:
        """`capture` that yields each event after its handler was called."""
        feed = self._open_feed(self.queue, self._on_delivery)
        try:
            feed.ensure(CONNECT_SECONDS if timeout is None else max(timeout, CONNECT_SECONDS))
            if wakeup:
                self.wakeup_workers()
            count = 0
            while not self.should_stop and (limit is None or count < limit):
                if not self._received and not self._wait(feed, timeout):
                    return
                count += 1
                event = self._received.popleft()
                self.process(str(event["type"]), event)
                yield event
        finally:
            feed.close()

    def _wait(self, feed: Feed, timeout: float | None) -> bool:
        """True once an event has come, False when it should stop. Raises: TimeoutError."""
        end = None if timeout is None else time.monotonic() + timeout
        was_lost = False
        while not self.should_stop:
            now = time.monotonic()
            if end is not None and now >= end:
                raise TimeoutError(f"no event came for {timeout:g} s")
            try:
                if feed.drive(lambda: bool(self._received), now + LOOK_SECONDS):
                    return True
            except AccessRefused:
                raise
            except BrokerUnreachable as error:
                if not was_lost:
                    was_lost = True
                    logger.warning("events: the connection is lost; waiting for the broker (%s)", error)
                time.sleep(RETRY_PAUSE)
        return False

    def wakeup_workers(self) -> None:
        """Ask all workers for a heartbeat."""
        self._wake_workers()

    def process(self, type: str, event: EventDict) -> None:
        """Call the handler for an event."""
        handler = self.handlers.get(type) or self.handlers.get("*")
        if handler is not None:
            handler(event)

    def event_from_message(self, body: JsonObject) -> tuple[str, EventDict]:
        """(type, event) of a received event: with the time of its receipt, and our logical time."""
        if body["type"] == "task-sent":
            # Producers receive no clocks, so theirs mean nothing (celery/events/receiver.py).
            body["clock"] = max(0, self.clock.value - 1)
        elif isinstance(body.get("clock"), int):
            self.clock.adjust(body["clock"])
        else:
            body["clock"] = self.clock.forward()
        body["local_received"] = time.time()
        return body["type"], body

    def _on_delivery(self, delivery: Delivery) -> None:
        properties = delivery.properties
        try:
            events = read_events(delivery.body, properties.content_type, properties.content_encoding, self._accept)
        except MessageError as error:
            logger.warning("events: a message under %r is skipped: %s", delivery.routing_key, error)
            return
        self._received.extend(self.event_from_message(event)[1] for event in events)

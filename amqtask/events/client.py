"""`app.events`: receivers and dispatchers of one application. A receiver calls handlers with the events of a cluster, in the
thread that captures."""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from amqtask.events.dispatcher import EventDispatcher, LamportClock
from amqtask.events.state import State
from amqtask.exceptions import AccessRefused, BrokerUnreachable, MessageError
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.event import read_events, receiver_queue

if TYPE_CHECKING:
    from amqtask.ground.shapes import EventDict, JsonObject
    from amqtask.protocol.entities import Queue
    from amqtask.protocol.message import Delivery, Message

logger = bounded_logger("amqtask.events.client")

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
        settings: EventSettings,
        routing_key: str,
        node_id: str | None,
        wake_workers: Callable[[], object],
        clock: LamportClock,
    ) -> None:
        self.handlers: Mapping[str, Handler] = {} if handlers is None else handlers
        self.node_id = node_id or str(uuid.uuid4())
        self.queue = receiver_queue(
            f"{settings.queue_prefix}.{self.node_id}", settings.exchange,
            routing_key=routing_key, ttl=settings.queue_ttl, expires=settings.queue_expires,
        )  # fmt: skip
        self.clock = clock
        # Set it (in a handler, or from another thread) to end `capture`.
        self.should_stop = False
        self._open_feed = open_feed
        self._accept = settings.accept
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


@dataclass(frozen=True, slots=True)
class EventSettings:
    """The settings `event_*`; times are seconds."""

    exchange: str = "celeryev"
    queue_prefix: str = "celeryev"
    queue_ttl: float = 5.0
    queue_expires: float = 60.0
    serializer: str = "json"
    accept: frozenset[str] = frozenset({"application/json"})


class Events:
    """`app.events`, under Celery's names.

    with app.connection() as connection:
        receiver = app.events.Receiver(connection, handlers={"task-failed": print})
        receiver.capture(limit=None, timeout=None, wakeup=True)
    """

    State = State

    def __init__(
        self,
        settings: EventSettings,
        *,
        open_feed: OpenFeed,
        publish: Callable[[Message], object],
        wake_workers: Callable[[], object],
    ) -> None:
        self._settings = settings
        self._open_feed = open_feed
        self._publish = publish
        self._wake_workers = wake_workers
        self.clock = LamportClock()

    def Receiver(
        self,
        connection: BrokerConnection | None = None,
        handlers: Mapping[str, Handler] | None = None,
        routing_key: str = "#",
        node_id: str | None = None,
        app: object = None,
        queue_prefix: str | None = None,
        accept: Iterable[str] | None = None,
        queue_ttl: float | None = None,
        queue_expires: float | None = None,
    ) -> EventReceiver:
        """A receiver on this app's broker. `connection` is the object that `app.connection()` returns, or None.

        `routing_key` limits the events ("worker.#"; task events come in lists, as `task.multi`, so "task.#").
        Raises: TypeError for another library's connection.
        """
        _check(connection)
        own = self._settings
        settings = replace(
            own,
            queue_prefix=queue_prefix or own.queue_prefix,
            queue_ttl=own.queue_ttl if queue_ttl is None else queue_ttl,
            queue_expires=own.queue_expires if queue_expires is None else queue_expires,
            accept=own.accept if accept is None else frozenset(accept),
        )
        return EventReceiver(
            self._open_feed,
            handlers,
            settings=settings,
            routing_key=routing_key,
            node_id=node_id,
            wake_workers=self._wake_workers,
            clock=self.clock,
        )

    def Dispatcher(
        self,
        connection: BrokerConnection | None = None,
        hostname: str | None = None,
        enabled: bool = True,
        groups: Iterable[str] | None = None,
    ) -> EventDispatcher:
        """A sender of your own events; it need not be closed. Raises: TypeError, as `Receiver`."""
        _check(connection)
        return EventDispatcher(
            self._publish,
            hostname=hostname,
            enabled=enabled,
            groups=groups or (),
            exchange=self._settings.exchange,
            serializer=self._settings.serializer,
            clock=self.clock,
        )

    def default_dispatcher(self, hostname: str | None = None, enabled: bool = True) -> EventDispatcher:
        """`with app.events.default_dispatcher() as dispatcher: dispatcher.send("custom-thing", …)`."""
        return self.Dispatcher(None, hostname, enabled)


def _check(connection: Any) -> None:
    if connection is not None and not isinstance(connection, BrokerConnection):
        raise TypeError(
            f"{type(connection).__module__}.{type(connection).__name__} is not a connection of ours: "
            "say app.connection(), or nothing"
        )


class BrokerConnection:
    """The return value of `app.connection()`: names a broker, for `app.events.Receiver(connection)` and the like.

    The receiver connects by itself, and reconnects; this object has nothing to open, to share or to close.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def as_uri(self, include_password: bool = False, mask: str = "**") -> str:
        """The broker's URLs, without passwords."""
        return self._name

    def close(self) -> None:
        """Does nothing: no connection is open."""

    release = close

    def __enter__(self) -> BrokerConnection:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<BrokerConnection {self._name}>"

"""`app.events`: receivers and dispatchers of one application."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from amqtask.events.dispatcher import EventDispatcher, LamportClock
from amqtask.events.receiver import EventReceiver, Handler, OpenFeed
from amqtask.events.state import State

if TYPE_CHECKING:
    from amqtask.protocol.message import Message


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
        settings = self._settings
        return EventReceiver(
            self._open_feed,
            handlers,
            routing_key=routing_key,
            node_id=node_id,
            exchange=settings.exchange,
            queue_prefix=queue_prefix or settings.queue_prefix,
            queue_ttl=settings.queue_ttl if queue_ttl is None else queue_ttl,
            queue_expires=settings.queue_expires if queue_expires is None else queue_expires,
            accept=settings.accept if accept is None else frozenset(accept),
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

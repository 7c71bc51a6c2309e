"""What `app.connection()`, `app.producer_pool` and `app.pool` return: kombu's words, for health checks and odd jobs on queues."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from queue import Empty
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from amqtask.events.client import BrokerConnection
from amqtask.exceptions import OperationalError
from amqtask.protocol.compression import compress
from amqtask.protocol.message import Message, Properties
from amqtask.protocol.serialization import content_types, dumps, is_private, loads

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.ground.shapes import JsonObject
    from amqtask.transport.contract import QueueJobs

# Names of a connection's parameters, and what the broker calls them.
_INFO = {"hostname": "hostname", "port": "port", "uri": "url"}
_PROPERTIES = frozenset(Properties.__dataclass_fields__)


class Transport(NamedTuple):
    """The transport of a connection, as kombu describes it."""

    driver_type: str
    driver_name: str


class queue_declare_ok_t(NamedTuple):
    """The broker's answer to a declared queue."""

    queue: str
    message_count: int
    consumer_count: int


class Connection(BrokerConnection):
    """A connection to the application's broker, opened when something is asked of it."""

    connection_errors = channel_errors = recoverable_connection_errors = (OperationalError, OSError)

    def __init__(self, app: AmqTask) -> None:
        super().__init__(app.broker_name)
        self.app = app
        self._jobs: QueueJobs | None = None

    def as_uri(self, include_password: bool = False, mask: str = "**") -> str:
        """The first broker's URL; with the password on request."""
        return self.app.broker.urls[0] if include_password else super().as_uri()

    # -- opening

    @property
    def connected(self) -> bool:
        """Whether the connection is open."""
        return self._jobs is not None

    def connect(self) -> Connection:
        """Open the connection. Raises: OperationalError when no broker answers."""
        if self._jobs is None:
            self._jobs = self.app.broker.queue_jobs().__enter__()
        return self

    def ensure_connection(
        self,
        errback: Callable[[Any, float], object] | None = None,
        max_retries: int | None = None,
        interval_start: float = 2,
        interval_step: float = 2,
        interval_max: float = 30,
        callback: object = None,
        reraise_as_library_errors: bool = True,
        timeout: float | None = None,
    ) -> Connection:
        """Open the connection, if need be again and again: `max_retries` times, or until `timeout`; for ever without both."""
        deadline = None if timeout is None else time.monotonic() + timeout
        tried, pause = 0, interval_start
        while True:
            try:
                return self.connect()
            except OperationalError as error:
                is_late = deadline is not None and time.monotonic() + pause > deadline
                if is_late or (max_retries is not None and tried >= max_retries):
                    raise
                if errback is not None:
                    errback(error, pause)
            time.sleep(pause)
            tried, pause = tried + 1, min(pause + interval_step, interval_max)

    _ensure_connection = ensure_connection

    def close(self) -> None:
        """Close it."""
        jobs, self._jobs = self._jobs, None
        if jobs is not None:
            jobs.__exit__()

    release = _close = close

    def heartbeat_check(self, rate: int = 2) -> None:
        """Do nothing: the connection is short-lived."""

    def info(self) -> JsonObject:
        """The connection's parameters, without password."""
        info = self.app.broker.info()
        return {name: info[key] for name, key in _INFO.items() if "hostname" in info}

    @property
    def transport(self) -> Transport:
        """AMQP, or this process's memory."""
        return Transport(self.app.broker.transport, self.app.broker.driver)

    # -- using it

    @property
    def default_channel(self) -> Channel:
        """A channel."""
        return Channel(self)

    def channel(self) -> Channel:
        """A channel."""
        return Channel(self)

    def Producer(self, channel: object = None, **options: Any) -> Producer:
        """A producer on this connection."""
        return Producer(self.app, **options)

    def SimpleQueue(self, name: Any, no_ack: bool | None = None, **_: object) -> SimpleQueue:
        """`get` and `put`."""
        return SimpleQueue(self, getattr(name, "name", name))

    @property
    def jobs(self) -> QueueJobs:
        """Odd jobs on the broker's queues. Raises: OperationalError."""
        self.connect()
        assert self._jobs is not None
        return self._jobs


class _Closing(AbstractContextManager[Any]):
    """A context manager that calls `close` at the end of its block."""

    def close(self) -> None:
        """Do nothing, where a class has no connection of its own."""

    def __exit__(
        self, exception_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Channel(_Closing):
    """Looks at queues, empties and deletes them."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def queue_declare(self, queue: str, passive: bool = False, **_: object) -> queue_declare_ok_t:
        """A queue's numbers of messages and consumers. Raises: QueueNotFound; NotImplementedError unless `passive`."""
        if not passive:
            raise NotImplementedError("queues are declared by amqtask.Queue and `amqtask topology declare`")
        state = self.connection.jobs.state(queue)
        return queue_declare_ok_t(queue, state.ready, state.consumers)

    def queue_purge(self, queue: str, **_: object) -> int:
        """Delete the messages of a queue; returns how many there were."""
        return self.connection.jobs.purge(queue)

    def queue_delete(self, queue: str, **_: object) -> None:
        """Delete a queue."""
        self.connection.jobs.delete(queue)


class Producer(_Closing):
    """Publishes, with confirms, through the application's own connections."""

    def __init__(
        self, app: AmqTask, exchange: Any = "", routing_key: str = "", serializer: str | None = None, **_: object
    ) -> None:
        self.app = app
        self.exchange = exchange
        self.routing_key = routing_key
        self.serializer = serializer

    def publish(
        self,
        body: Any,
        routing_key: str | None = None,
        delivery_mode: int | None = None,
        mandatory: bool = False,
        immediate: bool = False,
        priority: int = 0,
        content_type: str | None = None,
        content_encoding: str | None = None,
        serializer: str | None = None,
        headers: Any = None,
        compression: str | None = None,
        exchange: object = None,
        retry: bool = False,
        retry_policy: object = None,
        declare: object = (),
        expiration: float | None = None,
        timeout: float | None = None,
        **properties: Any,
    ) -> None:
        """One message. Raises: PublishError, EncodeError."""
        headers = dict(headers or {})
        if content_type is None:
            name = serializer or self.serializer or self.app.conf.task_serializer
            if is_private(name):
                headers |= {text: None for text in ("argsrepr", "kwargsrepr") if text in headers}
            body, content_type, content_encoding = dumps(body, name, headers)
        if isinstance(body, str):
            body = body.encode(content_encoding or "utf-8")
        if compression:
            body, headers["compression"] = compress(body, compression)
        target = self.exchange if exchange is None else exchange
        message_properties = Properties(
            content_type=content_type,
            content_encoding=content_encoding or "binary",
            headers=headers,
            delivery_mode=delivery_mode or 2,
            priority=priority,
            expiration=None if expiration is None else str(int(expiration * 1000)),
            **{name: value for name, value in properties.items() if name in _PROPERTIES},
        )
        key = self.routing_key if routing_key is None else routing_key
        message = Message(
            body, message_properties, str(getattr(target, "name", target) or ""), key, self._declared(declare)
        )
        self.app.publisher.publish(message, timeout=timeout)

    def _declared(self, entities: Any) -> tuple[Any, ...]:
        return tuple(
            declaration
            for entity in entities or ()
            for declaration in self.app.queues.declarations(self.app.queues.add(entity))
        )

    @property
    def connection(self) -> Connection:
        """A connection to the same broker."""
        return Connection(self.app)

    def release(self) -> None:
        """Do nothing: the application keeps its connections."""


class Producers:
    """A pool: `with pool.acquire(block=True) as producer`. The application limits its own connections (broker_pool_limit)."""

    def __init__(self, make: Callable[[], object]) -> None:
        self._make = make

    def acquire(self, block: bool = False, timeout: float | None = None) -> Any:
        """A producer or connection of the pool."""
        return self._make()

    def release(self, resource: Any) -> None:
        """Release a producer or connection."""
        resource.release()

    def force_close_all(self) -> None:
        """Do nothing: the application closes its connections itself."""


class SimpleQueue(_Closing):
    """`put` and `get` of one queue."""

    def __init__(self, connection: Connection, name: str) -> None:
        self._connection = connection
        self.name = name

    def put(self, message: Any, **options: Any) -> None:
        """Publish a message to the queue."""
        Producer(self._connection.app).publish(message, routing_key=self.name, **options)

    def get(self, block: bool = True, timeout: float | None = None) -> Received:
        """The first message, which is gone then. Raises: queue.Empty."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            received = self._get()
            if received is not None:
                return received
            if not block or (deadline is not None and time.monotonic() >= deadline):
                raise Empty
            time.sleep(0.05)

    def get_nowait(self) -> Received:
        """`get` without waiting."""
        return self.get(block=False)

    def _get(self) -> Received | None:
        delivery = self._connection.jobs.take(self.name)
        return None if delivery is None else Received(delivery.properties, delivery.body)

    def qsize(self) -> int:
        """How many messages wait."""
        return self._connection.default_channel.queue_declare(self.name, passive=True).message_count

    __len__ = qsize

    def clear(self) -> int:
        """Delete the queue's messages."""
        return self._connection.default_channel.queue_purge(self.name)


class Received:
    """A message that `get` took."""

    def __init__(self, properties: Any, body: bytes) -> None:
        self.properties = properties
        self.headers: dict[str, object] = properties.headers or {}
        self.body = body

    @property
    def payload(self) -> Any:
        """The decoded body."""
        mime_type = self.properties.content_type
        accept = content_types([mime_type or "json"])
        return loads(self.body, mime_type, self.properties.content_encoding, accept, self.headers)

    def decode(self) -> Any:
        """The decoded body."""
        return self.payload

    def ack(self) -> None:
        """Do nothing: the message was acknowledged when it was taken."""

    reject = requeue = ack

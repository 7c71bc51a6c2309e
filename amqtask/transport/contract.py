"""The contract of a transport; pika's, aio-pika's and the in-memory transport keep it alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from amqtask.exceptions import (
    BrokerUnreachable,
    ConnectionBlocked,
    MessageTooLarge,
    PublishError,
    PublishTimeout,
    Unroutable,
)

if TYPE_CHECKING:
    from amqtask.protocol.entities import Declaration, Queue
    from amqtask.protocol.message import Delivery, Message
    from amqtask.transport.errors import ChannelClosing

OnWarning = Callable[[str], None]
# The header in which a message of a stream, or of another journal, has its position.
OFFSET = "x-stream-offset"
# Messages of a queue or stream that the broker sends a Tail ahead: it acknowledges them before it has more.
PREFETCH = 200
# How many messages are under way at once when messages move: so many may be stored twice after a kill.
# RabbitMQ's client of a quorum queue keeps acknowledgements to itself while 32 are not yet applied (rabbit_fifo_client's
# soft limit), and forgets those of basic.get when the channel closes (3.10: 67 of 100 came back). Each basic.get waits for
# all that came before it, so fewer than that at once are safe.
BATCH = 25
# Errors that fail every message; other errors concern one message only (a nack may be either).
_NO_BROKER = (BrokerUnreachable, ConnectionBlocked, PublishTimeout)
_ITS_OWN = (Unroutable, MessageTooLarge)


class Publisher(Protocol):
    """Publishes from the caller's thread and returns when the broker has confirmed.

    Safe to share between threads, greenlets and forked processes.
    """

    def publish(self, message: Message, *, timeout: float | None = None) -> None:
        """Publish and wait for the confirm; `timeout` (seconds, default: the publisher's own) is the one total
        deadline for connect, declare, publish and confirm.

        Raises: Unroutable, PublishRefused, MessageTooLarge, ConnectionBlocked, PublishTimeout, BrokerUnreachable,
        AccessRefused (all PublishError).
        """

    def publish_many(self, messages: Sequence[Message], *, timeout: float | None = None) -> list[PublishError | None]:
        """Pipelined: all are sent before the first confirm is awaited. One entry per message, None = stored."""

    def declare(self, entities: Sequence[Declaration], *, timeout: float | None = None) -> None: ...

    def close(self) -> None: ...


class AsyncPublisher(Protocol):
    """The same contract for asyncio."""

    async def connect(self, *, timeout: float | None = None) -> None:
        """Connect now instead of at the first publish."""

    async def publish(self, message: Message, *, timeout: float | None = None) -> None: ...

    async def publish_many(
        self, messages: Sequence[Message], *, timeout: float | None = None
    ) -> list[PublishError | None]: ...

    async def close(self) -> None: ...


class EventPublisher(Protocol):
    """Publishes messages that may be lost, such as events; safe to share like a Publisher."""

    def publish(self, messages: Sequence[Message]) -> None:
        """Publish these messages, or drop them: waits for no confirm, raises nothing, and keeps nothing for later."""

    def close(self) -> None: ...


class LoopPublisher(Protocol):
    """Publishes from a worker's I/O loop: never blocks; keeps unconfirmed messages over a reconnect and sends them again."""

    def publish(self, message: Message, on_done: Callable[[PublishError | None], None]) -> None:
        """`on_done(None)` once confirmed, `on_done(error)` when the broker returned or refused it.

        A lost connection is no error: the message is sent again on the next one."""

    @property
    def outstanding(self) -> int:
        """How many messages still wait for their confirm."""

    @property
    def oldest(self) -> Message | None:
        """The message that waits longest for its confirm, while the broker could give it (connected, not blocked); else None."""

    @property
    def host(self) -> str:
        """The URL, without password, of the host that it is connected to; empty while it is not."""

    def go_to(self, host: str, reason: str) -> None:
        """Leave for the host with this URL, if it is one of several and not the present one."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


# RabbitMQ's words: "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out. Timeout value used: 1800000 ms. …"
_HELD_TOO_LONG = "delivery acknowledgement on channel"


def held_too_long(error: Exception) -> bool:
    """Whether the broker closed a channel, and took all its deliveries back, for one that was held beyond `consumer_timeout`."""
    return _HELD_TOO_LONG in str(error)


class HostLeft(Exception):
    """The host answers, and was left for one that does more."""


class ConsumerListener(Protocol):
    """The owner of a Consumer, with the methods that it calls; all calls come on the I/O loop. Who derives from this may
    leave out those that mean nothing to it."""

    def on_delivery(self, delivery: Delivery) -> None: ...

    def on_consuming(self, epoch: int) -> None:
        """(Re)connected and all queues are consumed; deliveries of older epochs are void from here on."""
        return

    def on_connection_lost(self, error: Exception) -> None:
        """The connection or channel is gone; the broker has requeued all unanswered deliveries.

        A TimeoutError: the broker was silent, and may take the connection for alive until it misses its heartbeats. HostLeft: see
        there."""

    def on_cancelled(self, queue: str, reason: str) -> None:
        """The broker cancelled the consumer of one queue (deleted, timeout, failover); it is being set up again."""
        return

    def on_fatal(self, error: Exception) -> None:
        """Cannot go on (refused login, wrong vhost, queue locked by an exclusive owner)."""

    def unanswered(self, queue: str) -> int:
        """How many deliveries of this queue have no answer yet, at most (not asked where they need none)."""
        return 0

    def on_warning(self, text: str) -> None:
        """A text that the operator should read once: a queue that exists with other arguments, a blocked connection."""


class Consumer(Protocol):
    """Consumes queues over one connection with manual acks, on a worker's I/O loop; reconnects for ever."""

    def start(self) -> None:
        """Connect, declare, consume; the listener is told the result."""

    def add_queue(
        self,
        queue: Queue,
        *,
        prefetch: int,
        dead_letter: Queue | None = None,
        declare: tuple[Declaration, ...] | None = None,
    ) -> None:
        """Consume one more queue; `declare` (default: the queue, its dead-letter queue and its bindings) is declared first."""

    def cancel_queue(self, name: str) -> None:
        """Stop deliveries of one queue; deliveries that are unanswered can still be answered."""

    def set_prefetch(self, queue: str, prefetch: int) -> None:
        """A second consumer with the new window is started, then the first cancelled (per-consumer QoS only)."""

    def ack(self, tag: int, *, multiple: bool = False) -> None: ...

    def reject(self, tag: int, *, requeue: bool) -> None:
        """basic.reject: counts towards a quorum queue's delivery limit."""

    def nack(self, tag: int, *, requeue: bool = True) -> None:
        """basic.nack: on RabbitMQ 4.3 a requeue does not count towards the delivery limit."""

    def replace(self, delivery: Delivery, messages: Sequence[Message], on_done: Callable[[bool], None]) -> bool:
        """Publish the messages and acknowledge the delivery in one step. False: that cannot be done here, and nothing follows.

        Else `on_done(True)` follows once it is done, or the delivery is somebody else's by now and nothing was published; or
        `on_done(False)`: there is no place for one of the messages, and nothing was done."""

    def pause(self) -> None:
        """Cancel all consumers (deliveries stop), keep the channel for answers."""

    def resume(self) -> None: ...

    def leave(self, reason: str) -> None:
        """Treat the connection as lost, and go on with the next host, or with the same one if there is no other."""

    def go_to(self, host: str, reason: str) -> None:
        """Leave for the host with this URL, if it is one of several and not the present one."""

    def stop(self, *, on_stopped: Callable[[], None] | None = None) -> None:
        """Flush answers, close channel and connection; unanswered deliveries go back to their queues."""

    @property
    def host(self) -> str:
        """The URL, without password, of the host that it is connected to; empty while it is not."""

    @property
    def epoch(self) -> int: ...

    @property
    def is_consuming(self) -> bool: ...


class QueuePresence(Enum):
    """Whether a queue exists: it is there (perhaps consumed by another process), it is gone, or it cannot be reached now."""

    THERE = auto()
    GONE = auto()
    AWAY = auto()


class Collector(Protocol):
    """Takes all messages of a queue once it holds so many; never blocks, on a worker's I/O loop."""

    def collect(
        self,
        queue: str,
        size: int,
        *,
        take: Callable[[Sequence[Delivery], Callable[[bool], None]], bool],
        on_done: Callable[[QueuePresence], None],
    ) -> None:
        """Look whether `queue` holds `size` messages; if so offer all of them. No other process has them meanwhile.

        `take(messages, finished)` returns False to requeue them; `finished(True)` deletes the queue, `finished(False)` requeues
        them after all. `on_done(…)` follows in any case."""

    def stop(self) -> None: ...


class QueueReader(Protocol):
    """Declares and consumes one queue, and hands each message to its callback in the thread that drives it."""

    def ensure(self, timeout: float) -> None:
        """Make sure that the queue exists and is consumed, within `timeout` seconds. Raises: BrokerUnreachable, AccessRefused."""

    def drive(self, done: Callable[[], bool], deadline: float | None) -> bool:
        """Wait until `done()` or the deadline (monotonic seconds, None: for ever); whether it is done.

        Raises: BrokerUnreachable, AccessRefused."""

    def close(self) -> None:
        """Delete the queue and disconnect."""


class Tail(Protocol):
    """Reads a queue in batches, at least once each message; for one thread. Each method raises BrokerUnreachable, AccessRefused,
    QueueNotFound or another OperationalError; then another one is opened."""

    def read(self, limit: int, seconds: float) -> list[Delivery]:
        """The next messages, at most `limit`; what has come within `seconds`, and as soon as there is one."""

    def acknowledge(self) -> None:
        """All that was read so far is kept elsewhere now: the next reader need not have it."""

    def close(self) -> None:
        """Disconnect; what is not acknowledged is read again."""


class JournalTail(Tail, Protocol):
    """Reads a journal, and adds to it."""

    def write(self, message: Message) -> None:
        """Add one over the connection that reads, without waiting: it is kept when a later `read` returns it."""


class Note(Protocol):
    """A small text that the broker keeps for all applications of the virtual host. Each method raises OperationalError."""

    def read(self) -> str | None:
        """The text as it was written last; None where nobody has."""

    def write(self, text: str) -> None:
        """Keep this one instead; it is kept when this returns."""


class Journal(Protocol):
    """Messages that the broker keeps for a time, for any number of readers that each read all of them."""

    def write(self, message: Message) -> None:
        """Add one, wherever it is addressed to; it is kept when this returns. Raises: PublishError."""

    def tail(self, position: object) -> JournalTail:
        """Reads what comes after a position, the header x-stream-offset of a delivery; None: all that may still matter."""


class QueueState(NamedTuple):
    """How many messages of a queue are ready, and how many consumers it has."""

    ready: int
    consumers: int


class QueueJobs(Protocol):
    """Odd jobs on queues that every broker has; a context manager. Each raises QueueNotFound and OperationalError."""

    def state(self, queue: str) -> QueueState: ...

    def states(self, queues: Sequence[str]) -> dict[str, QueueState]:
        """Of those of these queues that are there; many are asked about in one round trip. Raises OperationalError only."""

    def purge(self, queue: str) -> int:
        """Delete the ready messages; how many there were."""

    def delete(self, queue: str) -> None:
        """Delete the queue with its messages; no error when it does not exist."""

    def take(self, queue: str) -> Delivery | None:
        """The first message, which is gone then."""

    def __enter__(self) -> QueueJobs: ...

    def __exit__(self, *_: object) -> None: ...


class Refusal(NamedTuple):
    """Why an entity is not declared, in RabbitMQ's words."""

    reply_code: int
    reply_text: str


@dataclass(slots=True)
class Moved:
    """The result of moving messages.

    `repeated` of the moved messages had been delivered before: an earlier move that was killed may have published them.
    `kept` did not fit the filter. `failed` could not be published, the first of them because of `failure`; they are still
    in the queue. `is_over`: the error was not caused by these messages, so other messages would fail, too.
    """

    moved: int = 0
    repeated: int = 0
    kept: int = 0
    failed: int = 0
    failure: PublishError | None = None
    is_over: bool = False

    def batches(self, limit: int | None, is_stopped: Callable[[], bool]) -> Iterator[int]:
        """How many messages may be taken next, for as long as the move goes on."""
        while not is_stopped() and not self.is_over and (limit is None or self.moved < limit):
            yield BATCH if limit is None else min(BATCH, limit - self.moved)

    def publish(
        self, publisher: Publisher, taken: Sequence[Delivery], convert: Callable[[Delivery], Message | None]
    ) -> list[Delivery]:
        """Publish the messages, and note what became of them; the deliveries whose messages are stored."""
        pairs = [(delivery, message) for delivery in taken if (message := convert(delivery)) is not None]
        self.kept += len(taken) - len(pairs)
        if not pairs:
            return []
        try:
            errors: Sequence[PublishError | None] = publisher.publish_many([message for _, message in pairs])
        except PublishError as error:
            errors = [error] * len(pairs)
        stored = [delivery for (delivery, _), error in zip(pairs, errors, strict=True) if error is None]
        failures = [error for error in errors if error is not None]
        self.failed += len(failures)
        self.failure = self.failure or next(iter(failures), None)
        self.is_over = any(isinstance(error, _NO_BROKER) for error in failures) or (
            not stored and not all(isinstance(error, _ITS_OWN) or type(error) is PublishError for error in failures)
        )
        self.moved += len(stored)
        self.repeated += sum(delivery.redelivered for delivery in stored)
        return stored


class Admin(QueueJobs, Protocol):
    """Jobs on queues for the command line; a context manager."""

    @property
    def server(self) -> str:
        """The broker's product and version."""

    def about(self) -> dict[str, str]:
        """What the broker says of itself, under its own names; `server_time` is its clock, where it tells it."""

    @property
    def delay_queues(self) -> tuple[str, ...] | None:
        """The queues in which delayed messages are looked at; None: those of the application's DelayPlan."""

    def count(self, queue: str) -> int:
        """How many messages are ready."""

    def has_exchange(self, name: str) -> bool: ...

    def declare(self, entity: Declaration, *, passive: bool) -> ChannelClosing | None:
        """Declare an entity, or ask whether it exists; why the broker refuses that."""

    def browse(self, queue: str, limit: int) -> Iterator[Delivery]:
        """The first messages, which stay in the queue."""

    def move(
        self,
        queue: str,
        publisher: Publisher,
        convert: Callable[[Delivery], Message | None],
        *,
        limit: int | None = None,
        acknowledge: bool = True,
        is_stopped: Callable[[], bool] = lambda: False,
        on_progress: Callable[[Moved], None] = lambda _: None,
    ) -> Moved:
        """Publish `convert(delivery)` of each message that is ready now, at most `limit`; acknowledge the confirmed ones.

        `convert` returns None for a message that is to stay. A message is acknowledged after its confirm, never before:
        whatever interrupts a move, each message is stored at least once. `acknowledge=False` copies. A message that cannot be
        published stays in the queue and does not hold up others; when the broker takes no message at all, the move ends.
        `is_stopped` is called between batches."""

    def sift(self, queue: str, is_meant: Callable[[Delivery], bool], *, delete: bool) -> int:
        """How many of the messages that are ready now are meant; with `delete` they are deleted."""

    def wait(self, seconds: float) -> None:
        """Do nothing for so long, but keep the connection alive. Raises: OperationalError when it breaks."""

    def __enter__(self) -> Admin: ...


class Delayed(Protocol):
    """The messages that wait for their time, as a worker sees them."""

    @property
    def blocks(self) -> bool:
        """Whether `soonest` waits for a server: event loops then call it in a thread."""

    def soonest(self, limit: int) -> list[tuple[float, Delivery]]:
        """At most `limit` of them with their due times (Unix time), the soonest first."""

    def count(self, address: tuple[str, str]) -> int:
        """How many this worker holds that are to go to that exchange and routing key."""

    def drop(self, address: tuple[str, str]) -> int:
        """Delete those that this worker holds and that are to go there; how many that were."""

    def release(self, is_meant: Callable[[Delivery], bool], *, revoked: bool = False) -> int:
        """Publish those that this worker holds and that are meant now; how many. `revoked`: as expired, so nobody runs them."""


class SharedEnds(Protocol):
    """Consumers and a publisher that share a connection: when one loses it, the others have lost it, too.

    The first that is made is the first to be told so."""

    def consumer(self, listener: ConsumerListener, *, no_ack: bool = False, is_second: bool = False) -> Consumer:
        """`is_second`: another one consumes its queues, too, and finds out when they deliver nothing."""

    def publisher(self, *, on_warning: OnWarning, nack_patience: float | None = None) -> LoopPublisher:
        """`nack_patience`: for so many seconds a message that the broker refuses is tried again (None: the publisher's own)."""


class BrokerOptions(NamedTuple):
    """What a broker is opened with; the settings' values. Times are seconds."""

    urls: str | Sequence[str] | None
    write_urls: str | Sequence[str] | None = None
    use_ssl: bool | Mapping[str, object] | None = None
    login_method: str | None = None
    publish_timeout: float | None = 5.0
    connect_timeout: float = 4.0
    heartbeat: int | None = 60
    pool_limit: int | None = 10
    # Celery's broker_transport_options, and the exchange of events, which is a fanout where there is no topic for it.
    transport_options: Mapping[str, Any] = MappingProxyType({})
    event_exchange: str = "celeryev"

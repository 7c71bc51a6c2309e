"""Broker: what an application's broker can do, and the doors to it. `open_broker` finds it by the scheme of its URL."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from amqtask.transport.redis import SCHEMES

if TYPE_CHECKING:
    from amqtask.ground.loop import TurnLoop
    from amqtask.ground.shapes import JsonObject
    from amqtask.protocol.entities import Queue
    from amqtask.protocol.event import Keeping
    from amqtask.protocol.message import Delivery
    from amqtask.transport.contract import (
        Admin,
        AsyncPublisher,
        BrokerOptions,
        Collector,
        Consumer,
        ConsumerListener,
        Delayed,
        EventPublisher,
        Journal,
        LoopPublisher,
        Note,
        OnWarning,
        Publisher,
        QueueJobs,
        QueueReader,
        SharedEnds,
        Tail,
    )
    from amqtask.transport.memory.broker import MemoryBroker
    from amqtask.transport.url import BrokerAddress


class Broker(Protocol):
    """A broker as an application uses it: what it can do, and the doors to it. `open_broker` finds it by its URL.

    Nothing is connected before a door's object is used. `name` is for people, as the broker shows it with its connections.
    """

    # -- what it is

    @property
    def transport(self) -> str:
        """Its name in kombu's words: amqp, memory, redis."""

    @property
    def driver(self) -> str:
        """The library that speaks to it."""

    @property
    def safe_url(self) -> str:
        """Its URLs for people, without passwords. Raises: ConfigurationError."""

    @property
    def urls(self) -> tuple[str, ...]:
        """Its URLs with passwords, for another program. Raises: ConfigurationError."""

    @property
    def addresses(self) -> tuple[BrokerAddress, ...]:
        """The hosts to connect to over AMQP; none of another broker. Raises: ConfigurationError."""

    @property
    def memory(self) -> MemoryBroker | None:
        """The broker itself, where it lives in this process, for tests; else None."""

    def info(self) -> JsonObject:
        """Where it is, under kombu's names (kombu/connection.py, `info`), without the password."""

    # -- what it can do

    @property
    def is_shared(self) -> bool:
        """Whether other processes use it, too: only then can a command look at its queues and workers."""

    @property
    def binds_events(self) -> bool:
        """Whether a durable queue can be bound to the exchange of events; False where that reaches only those who listen."""

    @property
    def chords_url(self) -> str | None:
        """The result store that counts the parts of chords where the application has none that does; None: the parts are
        joined in the broker (`collector`)."""

    def results_url(self, url: str) -> str:
        """The result store for an application that names this one. Raises: ConfigurationError if it needs another broker."""

    # -- doors for callers

    def publisher(self, *, name: str, on_warning: OnWarning) -> Publisher: ...

    def async_publisher(self, *, name: str, on_warning: OnWarning) -> AsyncPublisher: ...

    def event_publisher(self, *, name: str, on_warning: OnWarning) -> EventPublisher: ...

    def queue_reader(self, queue: Queue, on_delivery: Callable[[Delivery], None], *, name: str) -> QueueReader: ...

    def tail(self, keeping: Keeping, position: int | None, *, name: str) -> Tail:
        """Reads the queue of history; a stream after this position (None: from the beginning)."""

    def note(self, name: str) -> Note:
        """A small text that the broker keeps, under this name."""

    def journal(self, name: str, publisher: Publisher, *, max_age: float) -> Journal:
        """Messages that are kept for `max_age` seconds, under this name; `publisher` publishes them, where they are published."""

    def queue_jobs(self) -> QueueJobs: ...

    def delayed(self) -> Delayed | None:
        """What waits in the broker for its time; None where workers must hold and forward it (amqtask.services.forwarder)."""

    def admin(self) -> Admin:
        """For the command line."""

    # -- doors for those who run on a loop

    def consumer(
        self, loop: TurnLoop, listener: ConsumerListener, *, name: str, heartbeat: int | None, no_ack: bool = False
    ) -> Consumer: ...

    def loop_publisher(
        self, loop: TurnLoop, *, name: str, heartbeat: int | None, on_warning: OnWarning
    ) -> LoopPublisher: ...

    def shared_ends(self, loop: TurnLoop, *, name: str, heartbeat: int | None, writes: bool = False) -> SharedEnds:
        """`writes`: over the hosts that are written to (`broker_write_url`)."""

    def collector(
        self, loop: TurnLoop, *, name: str, heartbeat: int | None, beside: LoopPublisher, on_warning: OnWarning
    ) -> Collector:
        """Only where `chords_url` is None."""


def open_broker(options: BrokerOptions, kept: dict[str, object]) -> Broker:
    """The broker of these URLs; nothing is connected yet, and of AMQP's URLs nothing is looked at before it is used.

    What must outlive a change of settings stays in `kept`, which is one application's.
    """
    scheme = _scheme(options.urls)
    if scheme == "memory":
        from amqtask.transport.memory.local import LocalBroker

        return LocalBroker(options, kept)
    if scheme in SCHEMES:
        from amqtask.transport.redis.broker import RedisBroker

        return RedisBroker(options, kept)
    from amqtask.transport.amqp import AmqpBroker, DevBroker

    # Whatever else is there is AMQP's to take or to refuse.
    return DevBroker(options, kept) if scheme == "dev" else AmqpBroker(options, kept)


def _scheme(urls: object) -> str:
    first = urls if isinstance(urls, str) else next(iter(urls or ()), "")  # type: ignore[call-overload]
    return first.partition("://")[0].strip().lower() if isinstance(first, str) and "://" in first else ""

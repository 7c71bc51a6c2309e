"""AmqpBroker: RabbitMQ, over pika, aio-pika and links of our own. Its modules are imported when a door is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from amqtask.ground.lazy import lazy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from amqtask.ground.loop import TurnLoop
    from amqtask.ground.shapes import JsonObject
    from amqtask.protocol.entities import Queue
    from amqtask.protocol.event import Keeping
    from amqtask.protocol.message import Delivery
    from amqtask.transport.admin import QueueAdmin, QueueTail
    from amqtask.transport.collector import PikaCollector
    from amqtask.transport.connection import LoopConnection
    from amqtask.transport.consumer import PikaConsumer
    from amqtask.transport.contract import (
        AsyncPublisher,
        BrokerOptions,
        ConsumerListener,
        Journal,
        LoopPublisher,
        Note,
        OnWarning,
        Publisher,
    )
    from amqtask.transport.loop_publisher import PikaLoopPublisher
    from amqtask.transport.publisher import PikaEventPublisher, PikaPublisher
    from amqtask.transport.queue_reader import QueueReader
    from amqtask.transport.url import BrokerAddress


class AmqpBroker:
    """See amqtask.transport.broker.Broker."""

    transport, driver = "amqp", "pika"
    is_shared = True
    binds_events = True
    chords_url: str | None = None

    def __init__(self, options: BrokerOptions, kept: dict[str, object]) -> None:
        self._options = options

    # -- what it is

    @lazy
    def addresses(self) -> tuple[BrokerAddress, ...]:
        """The hosts to read from. Raises: ConfigurationError."""
        return self._parsed(self._options.urls)

    @lazy
    def _written(self) -> tuple[BrokerAddress, ...]:
        """The hosts to publish to."""
        return self._parsed(self._options.write_urls) if self._options.write_urls else self.addresses

    def _parsed(self, urls: str | Sequence[str] | None) -> tuple[BrokerAddress, ...]:
        from amqtask.transport.url import parse_broker_urls

        return parse_broker_urls(urls, use_ssl=self._options.use_ssl, login_method=self._options.login_method)

    @property
    def memory(self) -> Any:
        """None: it is another process."""
        return None

    @property
    def safe_url(self) -> str:
        """The URLs, without passwords."""
        return ", ".join(address.safe_url for address in self.addresses)

    @property
    def urls(self) -> tuple[str, ...]:
        """The URLs, with passwords."""
        return tuple(address.url for address in self.addresses)

    def info(self) -> JsonObject:
        """The first host, and the URLs of the others."""
        first, *alternates = self.addresses
        return {
            "transport": self.transport,
            "url": self.safe_url,
            "transport_options": {},
            "alternates": [address.safe_url for address in alternates],
            "hostname": first.host,
            "port": first.port,
            "userid": first.user,
            "virtual_host": first.vhost,
            "ssl": first.tls is not None,
            "login_method": first.login_method,
            "uri_prefix": None,
            "insist": False,
        }

    def results_url(self, url: str) -> str:
        """Every result store works beside RabbitMQ."""
        return url

    # -- doors for callers

    def publisher(self, *, name: str, on_warning: OnWarning) -> PikaPublisher:
        """Blocking, over a pool of connections."""
        from amqtask.transport.publisher import PikaPublisher

        return PikaPublisher(
            self._written, pool_limit=self._options.pool_limit, on_warning=on_warning, **self._publishing(name)
        )

    def async_publisher(self, *, name: str, on_warning: OnWarning) -> AsyncPublisher:
        """Over aio-pika."""
        from amqtask.transport.async_publisher import AioPikaPublisher

        return AioPikaPublisher(self._written, on_warning=on_warning, **self._publishing(name))

    def _publishing(self, name: str) -> dict[str, Any]:
        options = self._options
        return {
            "timeout": options.publish_timeout,
            "heartbeat": options.heartbeat,
            "connect_timeout": options.connect_timeout,
            "client_name": name,
        }

    def event_publisher(self, *, name: str, on_warning: OnWarning) -> PikaEventPublisher:
        """Without confirms."""
        from amqtask.transport.publisher import PikaEventPublisher

        return PikaEventPublisher(
            self._written, connect_timeout=self._options.connect_timeout, client_name=name, on_warning=on_warning
        )

    def queue_reader(self, queue: Queue, on_delivery: Callable[[Delivery], None], *, name: str) -> QueueReader:
        """Over a connection of its own."""
        from amqtask.transport.queue_reader import QueueReader, guarded

        return QueueReader(
            self.addresses, queue, guarded(on_delivery), connect_timeout=self._options.connect_timeout, name=name
        )

    def tail(self, keeping: Keeping, position: int | None, *, name: str) -> QueueTail:
        """Over a connection of its own."""
        from amqtask.transport.admin import QueueTail

        timeout = self._options.connect_timeout
        return QueueTail(
            self.addresses, keeping.queue, keeping.declare, position=position, connect_timeout=timeout, name=name
        )

    def note(self, name: str) -> Note:
        """In a stream, whose last message it is."""
        from amqtask.transport.admin import StreamNote

        return StreamNote(
            self.addresses, lambda: self.publisher(name="amqtask command line", on_warning=lambda text: None), name
        )

    def journal(self, name: str, publisher: Publisher, *, max_age: float) -> Journal:
        """In a stream."""
        from amqtask.transport.admin import StreamJournal

        timeout = self._options.connect_timeout
        return StreamJournal(self.addresses, publisher, name, max_age=max_age, connect_timeout=timeout)

    def admin(self) -> QueueAdmin:
        """Over a connection of its own."""
        from amqtask.transport.admin import QueueAdmin

        return QueueAdmin(self.addresses)

    queue_jobs = admin

    def delayed(self) -> None:
        """Workers hold and forward it."""

    # -- doors for those who run on a loop

    def consumer(
        self, loop: TurnLoop, listener: ConsumerListener, *, name: str, heartbeat: int | None, no_ack: bool = False
    ) -> PikaConsumer:
        """Over a connection of its own."""
        from amqtask.transport.consumer import PikaConsumer

        return PikaConsumer(self._connection(loop, name, heartbeat), listener, no_ack=no_ack)

    def loop_publisher(
        self, loop: TurnLoop, *, name: str, heartbeat: int | None, on_warning: OnWarning
    ) -> PikaLoopPublisher:
        """Over a connection of its own."""
        from amqtask.transport.loop_publisher import PikaLoopPublisher

        return PikaLoopPublisher(self._connection(loop, name, heartbeat), on_warning=on_warning)

    def shared_ends(self, loop: TurnLoop, *, name: str, heartbeat: int | None, writes: bool = False) -> AmqpSharedEnds:
        """Over one connection for both."""
        return AmqpSharedEnds(self._connection(loop, name, heartbeat, writes=writes))

    def collector(
        self, loop: TurnLoop, *, name: str, heartbeat: int | None, beside: LoopPublisher, on_warning: OnWarning
    ) -> PikaCollector:
        """Over a connection of its own."""
        from amqtask.transport.collector import PikaCollector

        connection = self._connection(loop, name, heartbeat)
        return PikaCollector(connection, beside=beside, on_warning=on_warning)

    def _connection(self, loop: TurnLoop, name: str, heartbeat: int | None, *, writes: bool = False) -> LoopConnection:
        from amqtask.transport.connection import LoopConnection

        addresses, timeout = self._written if writes else self.addresses, self._options.connect_timeout
        return LoopConnection(addresses, loop, heartbeat=heartbeat, connect_timeout=timeout, name=name)


# Result stores that are servers of their own, or in one process.
_AWAY = ("redis", "rediss", "sentinel", "valkey", "valkeys", "cache", "mongodb", "amqp")


class DevBroker(AmqpBroker):
    """See amqtask.transport.broker.Broker: the one that `amqtask dev` serves."""

    def _parsed(self, urls: str | Sequence[str] | None) -> tuple[BrokerAddress, ...]:
        from amqtask.transport.url import dev_address

        return (dev_address(urls if isinstance(urls, str) else next(iter(urls or ()), "")),)

    def results_url(self, url: str) -> str:
        """Nothing beside this broker needs to be installed: what would be in a server of its own goes through the broker."""
        scheme = url.partition("://")[0].partition("+")[0]
        return "rpc://" if scheme in _AWAY else url


class AmqpSharedEnds:
    """See amqtask.transport.contract.SharedEnds."""

    def __init__(self, shared: LoopConnection) -> None:
        self._shared = shared

    def consumer(self, listener: ConsumerListener, *, no_ack: bool = False, is_second: bool = False) -> PikaConsumer:
        """A consumer over the connection, on a channel of its own."""
        from amqtask.transport.consumer import PikaConsumer

        return PikaConsumer(self._shared, listener, no_ack=no_ack, is_second=is_second)

    def publisher(self, *, on_warning: OnWarning, nack_patience: float | None = None) -> PikaLoopPublisher:
        """A publisher over the connection."""
        from amqtask.transport.confirms import PATIENCE_SECONDS
        from amqtask.transport.loop_publisher import PikaLoopPublisher

        patience = PATIENCE_SECONDS if nack_patience is None else nack_patience
        return PikaLoopPublisher(self._shared, on_warning=on_warning, resends=False, nack_patience=patience)

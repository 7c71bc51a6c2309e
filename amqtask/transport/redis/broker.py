"""RedisBroker: Redis or Valkey as a broker; the doors to it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from amqtask.exceptions import ConfigurationError
from amqtask.ground.lazy import lazy
from amqtask.transport.redis import SCHEMES, in_clients_words, tls_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from amqtask.ground.loop import TurnLoop
    from amqtask.ground.shapes import JsonObject, Options
    from amqtask.protocol.entities import Queue
    from amqtask.protocol.event import Keeping
    from amqtask.protocol.message import Delivery
    from amqtask.transport.contract import BrokerOptions, ConsumerListener, LoopPublisher, OnWarning, Publisher
    from amqtask.transport.redis.admin import RedisAdmin, RedisDelayed, RedisJobs, RedisJournal, RedisNote, RedisTail
    from amqtask.transport.redis.consumer import RedisConsumer
    from amqtask.transport.redis.layout import Layout
    from amqtask.transport.redis.link import RedisLoopPublisher
    from amqtask.transport.redis.publisher import (
        RedisAsyncPublisher,
        RedisEventPublisher,
        RedisPublisher,
        RedisQueueReader,
    )
    from amqtask.transport.redis.servers import Deployment
    from amqtask.transport.redis.wire import Way

MISSING = "a broker URL of Redis needs the package `{}`, which is not installed: pip install amqtask[redis]"
# Seconds that `lease` may have.
SHORTEST_LEASE, LONGEST_LEASE = 3.0, 86_400.0
# In front of the keys in a cluster: what is in braces says in which slot they are.
_HASH_TAG = "{amqtask}"


class RedisBroker:
    """See amqtask.transport.broker.Broker."""

    transport = driver = "redis"
    is_shared = True
    binds_events = False
    memory, addresses = None, ()

    def __init__(self, options: BrokerOptions, kept: dict[str, object]) -> None:
        for package in ("redis", "msgspec"):
            if find_spec(package) is None:
                raise ConfigurationError(MISSING.format(package))
        self._options = options

    # -- what it is

    @lazy
    def _read(self) -> _Server:
        """The one to read from. Raises: ConfigurationError."""
        return _server(self._options.urls, self._options)

    @lazy
    def _written(self) -> _Server:
        """The one to publish to. Raises: ConfigurationError."""
        return _server(self._options.write_urls, self._options) if self._options.write_urls else self._read

    @property
    def safe_url(self) -> str:
        """The server, without user and password."""
        return self._read.deployment.name

    @property
    def urls(self) -> tuple[str, ...]:
        """As they were given."""
        urls = self._options.urls or ()
        return (urls,) if isinstance(urls, str) else tuple(urls)

    def info(self) -> JsonObject:
        """The server."""
        server = self._read.way.server
        return {
            "transport": self.transport,
            "url": self.safe_url,
            "transport_options": dict(self._options.transport_options),
            "alternates": [],
            "hostname": server.path or server.host,
            "port": server.port,
            "userid": server.user,
            "virtual_host": str(server.db),
            "ssl": server.tls is not None,
            "login_method": None,
            "uri_prefix": None,
            "insist": False,
        }

    @property
    def chords_url(self) -> str:
        """In the same Redis. Raises: ConfigurationError."""
        return self._read.url

    def results_url(self, url: str) -> str:
        """Raises: ConfigurationError for rpc://, whose replies are messages of RabbitMQ."""
        if url.partition("://")[0] == "rpc":
            raise ConfigurationError(
                "result_backend = 'rpc://' needs RabbitMQ. With a Redis broker keep results in Redis, too: set result_backend to "
                "the broker's URL"
            )
        return url

    # -- doors for callers

    def publisher(self, *, name: str, on_warning: OnWarning) -> RedisPublisher:
        """Blocking, over redis-py's pool of connections."""
        from amqtask.transport.redis.publisher import RedisPublisher

        server = self._written
        return RedisPublisher(
            server.deployment, server.layout, timeout=self._options.publish_timeout, on_warning=on_warning
        )

    def async_publisher(self, *, name: str, on_warning: OnWarning) -> RedisAsyncPublisher:
        """Over redis.asyncio."""
        from amqtask.transport.redis.publisher import RedisAsyncPublisher

        server = self._written
        return RedisAsyncPublisher(
            server.deployment, server.layout, timeout=self._options.publish_timeout, on_warning=on_warning
        )

    def event_publisher(self, *, name: str, on_warning: OnWarning) -> RedisEventPublisher:
        """Without waiting for long."""
        from amqtask.transport.redis.publisher import RedisEventPublisher

        return RedisEventPublisher(self._written.deployment, self._written.layout, on_warning=on_warning)

    def queue_reader(self, queue: Queue, on_delivery: Callable[[Delivery], None], *, name: str) -> RedisQueueReader:
        """Over a connection of its own."""
        from amqtask.transport.redis.publisher import RedisQueueReader

        return RedisQueueReader(self._read.deployment, self._read.layout, queue, on_delivery)

    def tail(self, keeping: Keeping, position: int | None, *, name: str) -> RedisTail:
        """Over a connection of its own; a list has no positions."""
        from amqtask.transport.redis.admin import RedisTail

        return RedisTail(self._read.deployment, self._read.layout, keeping.queue.name)

    def note(self, name: str) -> RedisNote:
        """In a key of that name."""
        from amqtask.transport.redis.admin import RedisNote

        return RedisNote(self._read.deployment, self._read.layout, name)

    def journal(self, name: str, publisher: Publisher, *, max_age: float) -> RedisJournal:
        """In a stream of Redis of that name."""
        from amqtask.transport.redis.admin import RedisJournal

        return RedisJournal(self._read.deployment, self._read.layout, name, max_age=max_age)

    def queue_jobs(self) -> RedisJobs:
        """Over a connection of its own."""
        from amqtask.transport.redis.admin import RedisJobs

        return RedisJobs(self._read.deployment, self._read.layout)

    def admin(self) -> RedisAdmin:
        """Over a connection of its own."""
        from amqtask.transport.redis.admin import RedisAdmin

        return RedisAdmin(self._read.deployment, self._read.layout)

    def delayed(self) -> RedisDelayed:
        """In a sorted set."""
        from amqtask.transport.redis.admin import RedisDelayed

        return RedisDelayed(self._read.deployment, self._read.layout)

    # -- doors for those who run on a loop

    def consumer(
        self, loop: TurnLoop, listener: ConsumerListener, *, name: str, heartbeat: int | None, no_ack: bool = False
    ) -> RedisConsumer:
        """Over a connection of its own."""
        return RedisEnds(self._read, self._options, loop, name).consumer(listener, no_ack=no_ack)

    def loop_publisher(
        self, loop: TurnLoop, *, name: str, heartbeat: int | None, on_warning: OnWarning
    ) -> RedisLoopPublisher:
        """Over a connection of its own."""
        return RedisEnds(self._read, self._options, loop, name).publisher(on_warning=on_warning)

    def shared_ends(self, loop: TurnLoop, *, name: str, heartbeat: int | None, writes: bool = False) -> RedisEnds:
        """Each has a connection of its own."""
        return RedisEnds(self._written if writes else self._read, self._options, loop, name)

    def collector(
        self, loop: TurnLoop, *, name: str, heartbeat: int | None, beside: LoopPublisher, on_warning: OnWarning
    ) -> NoReturn:
        """Raises: ConfigurationError."""
        raise ConfigurationError("chords are counted in Redis, not joined from its queues")


class _Server(NamedTuple):
    """A Redis: its URL in redis-py's words, what makes clients, the way for connections on a loop, and how its keys are named."""

    url: str
    deployment: Deployment
    way: Way
    layout: Layout


def _server(urls: str | Sequence[str] | None, options: BrokerOptions) -> _Server:
    """Raises: ConfigurationError."""
    from amqtask.transport.redis.layout import Layout
    from amqtask.transport.redis.servers import ClusterMaster, client_arguments, deployment_of, way_to

    url = _one_url(urls, has_tls=bool(options.use_ssl))
    settings = tls_settings(options.use_ssl)
    prefix = str(options.transport_options.get("global_keyprefix") or "")
    deployment: Deployment
    if "+cluster:" in url:
        prefix = _tagged(prefix)
        arguments = client_arguments(options.transport_options, options.connect_timeout, settings)
        deployment = ClusterMaster(url, arguments, prefix)
    else:
        deployment = deployment_of(
            url, options.transport_options, options.connect_timeout, settings, "broker_transport_options"
        )
    way = way_to(deployment.client())
    lease = _lease(options.transport_options)
    return _Server(url, deployment, way, Layout(prefix, way.server.db, options.event_exchange, lease))


def _lease(options: Options) -> float:
    """Raises: ConfigurationError."""
    from amqtask.transport.redis.layout import LEASE_SECONDS

    value = options.get("lease", LEASE_SECONDS)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not SHORTEST_LEASE <= value <= LONGEST_LEASE:
        raise ConfigurationError(
            f"broker_transport_options = {{'lease': {value!r}}}: it is the seconds for which a worker keeps what it has taken "
            f"though it says nothing, {SHORTEST_LEASE:g} to {LONGEST_LEASE:g} [{LEASE_SECONDS:g}]"
        )
    return float(value)


def _one_url(urls: str | Sequence[str] | None, *, has_tls: bool) -> str:
    """The one URL, as redis-py writes it. Raises: ConfigurationError."""
    joined = urls if isinstance(urls, str) else ";".join(urls or ())
    scheme, _, location = in_clients_words(joined, has_tls=has_tls).partition("://")
    if scheme not in SCHEMES.values():
        raise ConfigurationError(
            f"the URL of a Redis broker cannot begin with {scheme}://. Name one server (redis://), sentinels (sentinel://) or "
            "nodes of a cluster (redis+cluster://)"
        )
    if ";" in location and scheme not in ("sentinel", "redis+cluster", "rediss+cluster"):
        raise ConfigurationError(
            "a Redis broker has one URL: a second server would have other messages. For several that follow each other use "
            "sentinel://host:26379/0;sentinel://other:26379 and broker_transport_options = {'master_name': …}, or a cluster"
        )
    return f"{scheme}://{location}"


def _tagged(prefix: str) -> str:
    """The prefix with a hash tag (https://redis.io/docs/reference/cluster-spec/#hash-tags)."""
    if "}" in prefix.partition("{")[2]:
        return prefix
    return f"{{{prefix}}}" if prefix else _HASH_TAG


class RedisEnds:
    """See amqtask.transport.contract.SharedEnds. While the consumer has a queue alone, the publisher publishes as that one."""

    def __init__(self, server: _Server, options: BrokerOptions, loop: TurnLoop, name: str) -> None:
        from amqtask.transport.redis.link import Link

        self._connect = partial(
            Link, server.way, server.layout, loop, name=name, connect_timeout=options.connect_timeout
        )
        self._consumer: RedisConsumer | None = None

    def consumer(self, listener: ConsumerListener, *, no_ack: bool = False, is_second: bool = False) -> RedisConsumer:
        """On the loop."""
        from amqtask.transport.redis.consumer import RedisConsumer

        self._consumer = RedisConsumer(self._connect, listener, no_ack=no_ack)
        return self._consumer

    def publisher(self, *, on_warning: OnWarning, nack_patience: float | None = None) -> RedisLoopPublisher:
        """On the loop."""
        from amqtask.transport.redis.link import RedisLoopPublisher

        return RedisLoopPublisher(self._connect, on_warning=on_warning, sole_right=self._sole_right)

    def _sole_right(self) -> tuple[str, str] | None:
        return None if self._consumer is None else self._consumer.sole_right

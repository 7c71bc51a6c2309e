"""RedisBroker: Redis or Valkey as a broker; the doors to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, NoReturn

from amqtask.exceptions import ConfigurationError
from amqtask.ground.lazy import lazy
from amqtask.transport.redis.layout import Layout

if TYPE_CHECKING:
    from amqtask.ground.loop import TurnLoop
    from amqtask.ground.shapes import JsonObject
    from amqtask.protocol.entities import Queue
    from amqtask.protocol.message import Delivery
    from amqtask.transport.contract import BrokerOptions, ConsumerListener, OnWarning
    from amqtask.transport.redis.admin import RedisAdmin
    from amqtask.transport.redis.consumer import RedisConsumer
    from amqtask.transport.redis.delayed import RedisDelayed
    from amqtask.transport.redis.jobs import RedisJobs
    from amqtask.transport.redis.loop_publisher import RedisLoopPublisher
    from amqtask.transport.redis.places import Way
    from amqtask.transport.redis.publisher import RedisAsyncPublisher, RedisEventPublisher, RedisPublisher
    from amqtask.transport.redis.reader import RedisQueueReader
    from amqtask.transport.redis.servers import Deployment

MISSING = "a broker URL of Redis needs the package `redis`, which is not installed: pip install amqtask[redis]"
# Schemes of ours and of kombu, and what redis-py calls them.
_SCHEMES = {
    "redis": "redis",
    "rediss": "rediss",
    "redis+socket": "unix",
    "sentinel": "sentinel",
    "valkey": "redis",
    "valkeys": "rediss",
}


class RedisBroker:
    """See amqtask.transport.broker.Broker."""

    transport = driver = "redis"
    is_shared = True
    memory, addresses = None, ()

    def __init__(self, options: BrokerOptions, kept: dict[str, object]) -> None:
        if find_spec("redis") is None:
            raise ConfigurationError(MISSING)
        self._options = options

    # -- what it is

    @lazy
    def _url(self) -> str:
        """The one URL, in redis-py's words. Raises: ConfigurationError."""
        urls = self._options.write_urls or self._options.urls or ()
        listed = [urls] if isinstance(urls, str) else list(urls)
        joined = ";".join(listed)
        scheme, _, rest = joined.partition("://")
        name = _SCHEMES.get(scheme.strip().lower())
        if name is None:
            raise ConfigurationError(
                f"a broker URL cannot begin with {scheme}://: what belongs together lies in several keys, which a cluster has on "
                "several nodes. Name one server, or sentinels (sentinel://)"
            )
        if name != "sentinel" and ";" in rest:
            raise ConfigurationError(
                "a Redis broker has one URL: a second server would have other messages. For several that follow each other use "
                "sentinel://host:26379/0;sentinel://other:26379 and broker_transport_options = {'master_name': …}"
            )
        if self._options.use_ssl and name == "redis":
            name = "rediss"
        if name == "unix":
            path, _, query = rest.partition("?")
            query = query.replace("virtual_host=", "db=")
            return f"unix://{path}" + (f"?{query}" if query else "")
        return f"{name}://{rest}"

    @lazy
    def _deployment(self) -> Deployment:
        from amqtask.transport.redis.servers import deployment_of

        use_ssl = self._options.use_ssl
        settings = {"redis_backend_use_ssl": dict(use_ssl) if isinstance(use_ssl, Mapping) else None}
        return deployment_of(
            self._url,
            self._options.transport_options,
            self._options.connect_timeout,
            settings,
            "broker_transport_options",
        )

    @lazy
    def _way(self) -> Way:
        from amqtask.transport.redis.places import way_to

        return way_to(self._deployment.client())

    @lazy
    def _layout(self) -> Layout:
        prefix = str(self._options.transport_options.get("global_keyprefix") or "")
        return Layout(prefix, self._way.server.db, self._options.event_exchange)

    @property
    def safe_url(self) -> str:
        """The server, without user and password."""
        return self._deployment.name

    @property
    def urls(self) -> tuple[str, ...]:
        """As they were given."""
        urls = self._options.urls or ()
        return (urls,) if isinstance(urls, str) else tuple(urls)

    def info(self) -> JsonObject:
        """The server."""
        server = self._way.server
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
        return self._url

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

        return RedisPublisher(
            self._deployment, self._layout, timeout=self._options.publish_timeout, on_warning=on_warning
        )

    def async_publisher(self, *, name: str, on_warning: OnWarning) -> RedisAsyncPublisher:
        """Over redis.asyncio."""
        from amqtask.transport.redis.publisher import RedisAsyncPublisher

        return RedisAsyncPublisher(
            self._deployment, self._layout, timeout=self._options.publish_timeout, on_warning=on_warning
        )

    def event_publisher(self, *, name: str, on_warning: OnWarning) -> RedisEventPublisher:
        """Without waiting for long."""
        from amqtask.transport.redis.publisher import RedisEventPublisher

        return RedisEventPublisher(self._deployment, self._layout, on_warning=on_warning)

    def queue_reader(self, queue: Queue, on_delivery: Callable[[Delivery], None], *, name: str) -> RedisQueueReader:
        """Over a connection of its own."""
        from amqtask.transport.redis.reader import RedisQueueReader

        return RedisQueueReader(self._deployment, self._layout, queue, on_delivery)

    def queue_jobs(self) -> RedisJobs:
        """Over a connection of its own."""
        from amqtask.transport.redis.jobs import RedisJobs

        return RedisJobs(self._deployment, self._layout)

    def admin(self) -> RedisAdmin:
        """Over a connection of its own."""
        from amqtask.transport.redis.admin import RedisAdmin

        return RedisAdmin(self._deployment, self._layout)

    def delayed(self) -> RedisDelayed:
        """In a sorted set."""
        from amqtask.transport.redis.delayed import RedisDelayed

        return RedisDelayed(self._deployment, self._layout)

    # -- doors for those who run on a loop

    def consumer(
        self, loop: TurnLoop, listener: ConsumerListener, *, name: str, heartbeat: int | None, no_ack: bool = False
    ) -> RedisConsumer:
        """Over a connection of its own."""
        from amqtask.transport.redis.consumer import RedisConsumer

        return RedisConsumer(
            self._way,
            self._layout,
            loop,
            listener,
            name=name,
            connect_timeout=self._options.connect_timeout,
            no_ack=no_ack,
        )

    def loop_publisher(
        self,
        loop: TurnLoop,
        *,
        name: str,
        heartbeat: int | None,
        on_warning: OnWarning,
        sole_right: Callable[[], tuple[str, str] | None] = lambda: None,
    ) -> RedisLoopPublisher:
        """Over a connection of its own."""
        from amqtask.transport.redis.loop_publisher import RedisLoopPublisher

        return RedisLoopPublisher(
            self._way,
            self._layout,
            loop,
            name=name,
            connect_timeout=self._options.connect_timeout,
            on_warning=on_warning,
            sole_right=sole_right,
        )

    def shared_ends(self, loop: TurnLoop, *, name: str, heartbeat: int | None, writes: bool = False) -> RedisEnds:
        """Each has a connection of its own."""
        return RedisEnds(self, loop, name)

    def collector(self, loop: TurnLoop, *, name: str, heartbeat: int | None, on_warning: OnWarning) -> NoReturn:
        """Raises: ConfigurationError."""
        raise ConfigurationError("chords are counted in Redis, not joined from its queues")


class RedisEnds:
    """See amqtask.transport.contract.SharedEnds. While the consumer has a queue alone, the publisher publishes as that one."""

    def __init__(self, broker: RedisBroker, loop: TurnLoop, name: str) -> None:
        self._broker = broker
        self._loop = loop
        self._name = name
        self._consumer: RedisConsumer | None = None

    def consumer(self, listener: ConsumerListener, *, no_ack: bool = False) -> RedisConsumer:
        """On the loop."""
        self._consumer = self._broker.consumer(self._loop, listener, name=self._name, heartbeat=None, no_ack=no_ack)
        return self._consumer

    def publisher(self, *, on_warning: OnWarning, nack_patience: float | None = None) -> RedisLoopPublisher:
        """On the loop."""
        return self._broker.loop_publisher(
            self._loop, name=self._name, heartbeat=None, on_warning=on_warning, sole_right=self._sole_right
        )

    def _sole_right(self) -> tuple[str, str] | None:
        return None if self._consumer is None else self._consumer.sole_right

"""Deployments of Redis (one server, the master that sentinels name, a cluster): their clients, and the way there for a loop."""

from __future__ import annotations

import itertools
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import redis
import redis.asyncio
import redis.asyncio.cluster
import redis.asyncio.retry
import redis.asyncio.sentinel
import redis.sentinel
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.crc import key_slot
from redis.retry import Retry
from redis.sentinel import SentinelConnectionPool

from amqtask.exceptions import ConfigurationError
from amqtask.ground.strikes import let_through
from amqtask.transport.redis import CLIENT_OPTIONS, in_clients_words
from amqtask.transport.redis.wire import Address, Place, Way, owner_in
from amqtask.transport.resolving import addresses_of, as_host, resolve

if TYPE_CHECKING:
    from amqtask.ground.shapes import Options, SettingValues


# Celery writes ssl.CERT_… where redis-py wants a word.
_CERT_REQS = {"CERT_REQUIRED": "required", "CERT_OPTIONAL": "optional", "CERT_NONE": "none"}
SENTINEL_PORT = 26379


class Deployment(Protocol):
    """Makes clients, without retries of the library's: they would mend a broken subscription behind our back, and what was
    published meanwhile would be missed."""

    # For logs and errors, without user and password.
    name: str

    def client(self) -> Any:
        """A client for threads; raises redis' errors."""

    async def async_client(self) -> Any:
        """A client for one event loop: `ping`, `get`, `pubsub`, `pipeline`, `aclose`; raises redis' errors."""

    def get_many(self, client: Any, keys: Sequence[str]) -> list[bytes | None]:
        """The values of keys, in their order."""
        values: list[bytes | None] = client.mget(keys)
        return values


def client_arguments(
    options: Options, connect_timeout: float, settings: SettingValues = MappingProxyType({})
) -> dict[str, object]:
    """The arguments of every connection: ours, then the settings `redis_…`, then `result_backend_transport_options`."""
    from_settings = {name: settings.get(f"redis_{name}") for name in CLIENT_OPTIONS}
    return {
        "socket_connect_timeout": connect_timeout,
        "socket_timeout": max(connect_timeout, 5.0),
        "socket_keepalive": True,
        "health_check_interval": 25,
        **{name: value for name, value in from_settings.items() if value is not None},
        **{name: options[name] for name in CLIENT_OPTIONS if name in options},
        **(settings.get("redis_backend_use_ssl") or {}),
    }


def client_url(url: str) -> str:
    """The URL with Celery's and kombu's spellings in redis-py's, and without what would make texts of the bytes that are read."""
    address, mark, query = url.partition("?")
    options = [
        ("db" if name == "virtual_host" else name, _CERT_REQS.get(value, value)) for name, value in parse_qsl(query)
    ]
    return address + mark + urlencode([option for option in options if option[0] != "decode_responses"])


def _check_options(url: str, arguments: Options) -> None:
    """redis-py trips over what it does not know when it connects."""
    pool = redis.ConnectionPool.from_url(url, **arguments)
    try:
        pool.connection_class(**pool.connection_kwargs)
    except TypeError as error:
        raise ConfigurationError(
            f"{safe_url(url)}: the URL has an option that connections to Redis of this kind do not have ({error}); what Celery "
            "takes as broker_transport_options is written there"
        ) from error


def safe_url(url: str) -> str:
    """The URL without user and password."""
    split = urlsplit(url)
    if split.scheme == "unix":
        return f"unix://{split.path}"
    return f"{split.scheme}://{split.hostname or 'localhost'}:{split.port or 6379}{split.path}"


def _check_database(url: str) -> None:
    """redis-py takes database 0 where the path names none that it can read."""
    for part in url.split(";"):
        split = urlsplit(part)
        database = split.path.strip("/")
        if split.hostname and database and not database.isdecimal():
            raise ConfigurationError(
                f"{safe_url(part)}: after the host stands the number of a database (redis://host:6379/0), not {database!r}"
            )


def close_idle(client: Any) -> None:
    """Close a client's connections, but for those that other threads use at this moment: redis-py's `close` would pull these from
    under them. They close when they are used no more, and the client is gone."""
    nodes: Any = getattr(client, "get_nodes", tuple)()  # of a cluster
    for part in [node.redis_connection for node in nodes if node.redis_connection is not None] or [client]:
        part.connection_pool.disconnect(inuse_connections=False)


def _once() -> Retry:
    return Retry(NoBackoff(), 0)


def _async_once() -> redis.asyncio.retry.Retry:
    return redis.asyncio.retry.Retry(NoBackoff(), 0)


# -- redis-py's connections, with the name of their host looked up within the time that connecting may take: redis-py waits for as
# long as the resolver does.

# Seconds, where nothing limits connecting.
LONGEST = 60.0


class Connection(redis.Connection):
    """Without TLS."""

    def _connect(self) -> Any:
        name, error = self.host, OSError("the name has no address")
        deadline = time.monotonic() + (self.socket_connect_timeout or LONGEST)
        for candidate in resolve(name, int(self.port), deadline):
            # As bytes: for text Python asks its idna codec, which makes its own of what strikes meanwhile.
            self.host = as_host(candidate[4]).encode()  # type: ignore[assignment]
            try:
                return super()._connect()  # type: ignore[no-untyped-call]
            except OSError as failure:
                let_through(failure)
                error = failure
            finally:
                self.host = name
        raise error


class SSLConnection(redis.SSLConnection, Connection):
    """With TLS: its _connect calls that of Connection, and checks the certificate for the name."""


class AsyncConnection(redis.asyncio.Connection):
    """Without TLS, on an event loop."""

    _address = ""

    async def _connect(self) -> None:
        error = OSError("the name has no address")
        for address in await addresses_of(self.host, int(self.port), self.socket_connect_timeout or LONGEST):
            self._address = as_host(address)
            try:
                await super()._connect()  # type: ignore[no-untyped-call]
            except OSError as failure:
                let_through(failure)
                error = failure
            else:
                return
        raise error

    def _connection_arguments(self) -> Mapping[str, Any]:
        return {**super()._connection_arguments(), "host": self._address}


class AsyncSSLConnection(redis.asyncio.SSLConnection, AsyncConnection):
    """With TLS, on an event loop."""

    def _connection_arguments(self) -> Mapping[str, Any]:
        return {**super()._connection_arguments(), "server_hostname": self.host}


class SentinelConnection(redis.sentinel.SentinelManagedConnection, Connection):
    """To the master that sentinels name."""


class SentinelSSLConnection(redis.sentinel.SentinelManagedSSLConnection, SSLConnection):
    """The same with TLS."""


class AsyncSentinelConnection(redis.asyncio.sentinel.SentinelManagedConnection, AsyncConnection):
    """The same on an event loop."""


class AsyncSentinelSSLConnection(redis.asyncio.sentinel.SentinelManagedSSLConnection, AsyncSSLConnection):
    """The same with TLS."""


_OURS: dict[Any, Any] = {
    redis.Connection: Connection,
    redis.SSLConnection: SSLConnection,
    redis.asyncio.Connection: AsyncConnection,
    redis.asyncio.SSLConnection: AsyncSSLConnection,
    redis.sentinel.SentinelManagedConnection: SentinelConnection,
    redis.sentinel.SentinelManagedSSLConnection: SentinelSSLConnection,
    redis.asyncio.sentinel.SentinelManagedConnection: AsyncSentinelConnection,
    redis.asyncio.sentinel.SentinelManagedSSLConnection: AsyncSentinelSSLConnection,
}
ClientT = TypeVar("ClientT")


def resolving(client: ClientT) -> ClientT:
    """A client that has not connected yet, with these connections; those to a socket in the file system stay."""
    pool: Any = client.connection_pool  # type: ignore[attr-defined] # of a redis.Redis, or one of redis.asyncio
    pool.connection_class = _OURS.get(pool.connection_class, pool.connection_class)
    return client


class Pool(redis.ConnectionPool):
    """To one node of a cluster."""

    def __init__(self, connection_class: Any = Connection, **arguments: Any) -> None:
        super().__init__(connection_class=_OURS.get(connection_class, connection_class), **arguments)


def resolving_cluster(client: redis.asyncio.RedisCluster) -> redis.asyncio.RedisCluster:
    """A cluster's client for an event loop, which has not connected yet, with these connections."""
    parts: list[Any] = [client, client.nodes_manager, *client.nodes_manager.startup_nodes.values()]
    for part in parts:
        options = part.connection_kwargs
        if "connection_class" in options:
            options["connection_class"] = _OURS.get(options["connection_class"], options["connection_class"])
    for node in client.nodes_manager.startup_nodes.values():
        node.connection_class = _OURS.get(node.connection_class, node.connection_class)
    return client


# -- deployments


class SingleServer(Deployment):
    """`redis://`, `rediss://`, `unix://`."""

    def __init__(self, url: str, arguments: Options) -> None:
        self.name = safe_url(url)
        self._url = client_url(url)
        self._arguments = dict(arguments)
        if url.startswith("unix:"):
            self._arguments.pop("socket_keepalive", None)  # of TCP
        _check_options(self._url, self._arguments)

    def client(self) -> Any:
        """Connects when it is used."""
        return resolving(redis.Redis.from_url(self._url, retry=_once(), **self._arguments))

    async def async_client(self) -> Any:
        """Connects when it is used."""
        return resolving(redis.asyncio.Redis.from_url(self._url, retry=_async_once(), **self._arguments))


class SentinelMaster(Deployment):
    """`sentinel://host:26379/db;sentinel://other:26379`: the sentinels say which server is the master, at each connection.

    User, password and database of the first URL are those of the master (celery/backends/redis.py). Options: `master_name`,
    `min_other_sentinels`, `sentinel_kwargs` (of the connections to sentinels).
    """

    def __init__(
        self, url: str, arguments: Options, options: Options, options_name: str = "result_backend_transport_options"
    ) -> None:
        splits = [urlsplit(part) for part in url.split(";") if part]
        self._hosts = [(split.hostname or "localhost", split.port or SENTINEL_PORT) for split in splits]
        self._master = options.get("master_name")
        if not self._master:
            raise ConfigurationError(
                f"sentinel:// needs to know which master: {options_name} = {{'master_name': 'mymaster'}}"
            )
        first = splits[0]
        self.name = f"master {self._master} of {', '.join(f'sentinel://{host}:{port}' for host, port in self._hosts)}"
        self._arguments = dict(arguments)
        credentials = (("username", first.username), ("password", first.password))
        self._arguments |= {name: unquote(value) for name, value in credentials if value}
        self._arguments["db"] = int(first.path.strip("/") or 0)
        self._min_other_sentinels = int(options.get("min_other_sentinels", 0))
        timeouts = {name: value for name, value in arguments.items() if name.startswith("socket_")}
        self._to_sentinels = {**timeouts, **options.get("sentinel_kwargs", {})}

    def client(self) -> Any:
        """Connects to the master of the moment when it is used."""
        sentinels: Any = redis.sentinel.Sentinel(  # type: ignore[no-untyped-call]
            self._hosts, self._min_other_sentinels, sentinel_kwargs={"retry": _once(), **self._to_sentinels}
        )
        for sentinel in sentinels.sentinels:
            resolving(sentinel)
        return resolving(sentinels.master_for(self._master, retry=_once(), **self._arguments))

    async def async_client(self) -> Any:
        """Connects to the master of the moment when it is used."""
        sentinels: Any = redis.asyncio.sentinel.Sentinel(  # type: ignore[no-untyped-call]
            self._hosts, self._min_other_sentinels, sentinel_kwargs={"retry": _async_once(), **self._to_sentinels}
        )
        for sentinel in sentinels.sentinels:
            resolving(sentinel)
        master = resolving(sentinels.master_for(self._master, retry=_async_once(), **self._arguments))
        return _Together(master, master, sentinels.sentinels)


class _OfCluster(Deployment):
    """`redis+cluster://host:port;redis+cluster://other:port` (`rediss+cluster://` with TLS): some nodes of a cluster."""

    def __init__(self, url: str, arguments: Options) -> None:
        self._urls = [client_url(part.replace("+cluster:", ":", 1)) for part in url.split(";") if part]
        self.name = f"cluster {', '.join(safe_url(node_url) for node_url in self._urls)}"
        self._arguments = dict(arguments)


class Cluster(_OfCluster):
    """All of it."""

    def __init__(self, url: str, arguments: Options) -> None:
        super().__init__(url, arguments)
        self._next = itertools.cycle(self._urls)

    def client(self) -> Any:
        """Connects, to learn which node has which keys."""
        nodes = self._nodes(ClusterNode)
        return RedisCluster(
            url=self._urls[0], startup_nodes=nodes, retry=_once(), connection_pool_class=Pool, **self._arguments
        )

    async def async_client(self) -> Any:
        """A cluster's client to look, one node to subscribe: what is published anywhere reaches every node."""
        first = urlsplit(self._urls[0])
        cluster = redis.asyncio.cluster.RedisCluster.from_url(
            self._urls[0],
            startup_nodes=[
                *self._nodes(redis.asyncio.cluster.ClusterNode),
                redis.asyncio.cluster.ClusterNode(first.hostname or "localhost", first.port or 6379),
            ],
            retry=_async_once(),
            **self._arguments,
        )
        node = redis.asyncio.Redis.from_url(next(self._next), retry=_async_once(), **self._arguments)
        return _Together(resolving(node), resolving_cluster(cluster))

    def _nodes(self, node_class: Callable[[str, int], Any]) -> list[Any]:
        splits = [urlsplit(url) for url in self._urls[1:]]
        return [node_class(split.hostname or "localhost", split.port or 6379) for split in splits]

    def get_many(self, client: Any, keys: Sequence[str]) -> list[bytes | None]:
        """An MGET to each node that has some of them."""
        values: list[bytes | None] = client.mget_nonatomic(keys)
        return values


class ClusterMaster(_OfCluster):
    """`redis+cluster://…` for a broker: the master that has all keys with a prefix, which is a hash tag. So they are in one slot,
    what belongs together happens in one step there, and it goes with the slot to another master.

    redis-py's pools for sentinels ask `_Nodes` who that is, at each connection.
    """

    def __init__(self, url: str, arguments: Options, prefix: str) -> None:
        super().__init__(url, arguments)
        self._slot = key_slot(prefix.encode())

    def client(self) -> Any:
        """Connects to the master of the moment when it is used."""
        nodes = [resolving(redis.Redis.from_url(url, retry=_once(), **self._arguments)) for url in self._urls]
        return redis.Redis.from_pool(_owners_pool(SentinelConnectionPool, _Nodes(nodes, self._slot)))

    async def async_client(self) -> Any:
        """Connects to the master of the moment when it is used."""
        nodes = [
            resolving(redis.asyncio.Redis.from_url(url, retry=_async_once(), **self._arguments)) for url in self._urls
        ]
        pool = _owners_pool(redis.asyncio.sentinel.SentinelConnectionPool, _AsyncNodes(nodes, self._slot))
        master = redis.asyncio.Redis.from_pool(pool)
        return _Together(master, master, nodes)


def _owners_pool(pool_class: Any, nodes: _Nodes) -> Any:
    """Connections to the master that these nodes name."""
    pool = nodes.sentinels[0].connection_pool
    return pool_class(
        "its slot", nodes, **{**pool.connection_kwargs, "connection_class": _OWNERS[pool.connection_class]}
    )


class _Nodes:
    """Some nodes of a cluster, and which slot they are asked for."""

    def __init__(self, sentinels: list[Any], slot: int) -> None:
        # redis-py's name for those that are asked.
        self.sentinels = sentinels
        self.slot = slot

    def discover_master(self, service_name: str) -> Address:
        """The master of the slot. Raises: redis.ConnectionError, or why the last of them did not answer."""
        problem = self._nobody()
        for node in self._in_turn():
            try:
                owner = self._owner(node, node.execute_command("CLUSTER", "SLOTS"))
            except (redis.RedisError, OSError) as error:
                problem = error
            else:
                if owner is not None:
                    return owner
        raise problem

    def _nobody(self) -> Exception:
        return redis.ConnectionError(f"no node of the cluster says who has slot {self.slot}")

    def _in_turn(self) -> list[Any]:
        """All of them, each time another one first: the first may be cut off from the others."""
        self.sentinels.append(self.sentinels.pop(0))
        return list(self.sentinels)

    def _owner(self, node: Any, slots: Sequence[Any]) -> Address | None:
        """The master that a node names. The others that it names are asked, too, when those that the URL names are away."""
        owner, nodes = owner_in(slots, self.slot, address_of(node)[0])
        known, pool = set(map(address_of, self.sentinels)), node.connection_pool
        for host, port in nodes:
            if (host, port) not in known:
                options = {**pool.connection_kwargs, "host": host, "port": port}
                self.sentinels.append(
                    type(node).from_pool(type(pool)(connection_class=pool.connection_class, **options))
                )
        return owner


class _AsyncNodes(_Nodes):
    async def discover_master(self, service_name: str) -> Address:  # type: ignore[override]
        """The same for an event loop."""
        problem = self._nobody()
        for node in self._in_turn():
            try:
                owner = self._owner(node, await node.execute_command("CLUSTER", "SLOTS"))
            except (redis.RedisError, OSError) as error:
                problem = error
            else:
                if owner is not None:
                    return owner
        raise problem


def address_of(client: Any) -> Address:
    """The host and port that a client was made for."""
    options: Options = client.connection_pool.connection_kwargs
    return options.get("host") or "localhost", int(options.get("port") or 6379)


# What a node answers that has the slot no longer; redis-py then asks again who has it.
_MOVED = "the keys are on another master now"


class _OwnersConnection(SentinelConnection):
    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().read_response(*args, **kwargs)
        except redis.exceptions.MovedError:
            self.disconnect()  # type: ignore[no-untyped-call]
            raise redis.ConnectionError(_MOVED) from None


class _OwnersSSLConnection(_OwnersConnection, SSLConnection):
    """The same with TLS."""


class _AsyncOwnersConnection(AsyncSentinelConnection):
    async def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().read_response(*args, **kwargs)
        except redis.exceptions.MovedError:
            await self.disconnect()
            raise redis.ConnectionError(_MOVED) from None


class _AsyncOwnersSSLConnection(_AsyncOwnersConnection, AsyncSSLConnection):
    """The same with TLS."""


# Those that find the master themselves, in place of those that go to one server.
_OWNERS: dict[Any, Any] = {
    Connection: _OwnersConnection,
    SSLConnection: _OwnersSSLConnection,
    AsyncConnection: _AsyncOwnersConnection,
    AsyncSSLConnection: _AsyncOwnersSSLConnection,
}


class _Together:
    """What `Deployment.async_client` promises, and `pipeline`, of several clients that close together; `others` may grow."""

    def __init__(self, subscribes: Any, looks: Any, others: Sequence[Any] = ()) -> None:
        self._clients = subscribes, looks
        self._others = others
        self.ping, self.pubsub, self.get, self.pipeline = subscribes.ping, subscribes.pubsub, looks.get, looks.pipeline

    async def aclose(self) -> None:
        """Close all."""
        for client in {id(client): client for client in (*self._clients, *self._others)}.values():
            await client.aclose()


def deployment_of(
    url: str,
    options: Options,
    connect_timeout: float,
    settings: SettingValues = MappingProxyType({}),
    options_name: str = "result_backend_transport_options",
) -> Deployment:
    """The deployment that a URL names, with what settings (`redis_…`) add to it. `options_name` is for errors.

    Raises: ConfigurationError."""
    arguments = client_arguments(options, connect_timeout, settings)
    has_tls = bool(settings.get("redis_backend_use_ssl"))
    if not url.partition("://")[2].strip("/"):  # Celery's way to name it without a URL
        host, port, db = (settings.get(f"redis_{name}") for name in ("host", "port", "db"))
        url = f"{url.partition('://')[0]}://{host or 'localhost'}:{port or 6379}/{db or 0}"
    url = in_clients_words(url, has_tls=has_tls)
    _check_database(url)
    scheme = url.partition("://")[0]
    if scheme == "sentinel":
        return SentinelMaster(url, {**arguments, "ssl": True} if has_tls else arguments, options, options_name)
    if scheme.endswith("+cluster"):
        return Cluster(url, arguments)
    return SingleServer(url, arguments)


_VERIFY = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}


def way_to(client: Any) -> Way:
    """The way of a redis-py client. Raises: ConfigurationError."""
    pool = client.connection_pool
    server = _place(pool.connection_kwargs, issubclass(pool.connection_class, redis.SSLConnection))
    if not isinstance(pool, SentinelConnectionPool):
        return Way(server)
    manager = pool.sentinel_manager
    pools = [guide.connection_pool for guide in manager.sentinels]
    guides = [
        _place(guide_pool.connection_kwargs, issubclass(guide_pool.connection_class, redis.SSLConnection))
        for guide_pool in pools
    ]
    return Way(server, tuple(guides), pool.service_name, manager.slot if isinstance(manager, _Nodes) else None)


def _place(options: Options, has_tls: bool) -> Place:
    return Place(
        host=options.get("host") or "localhost",
        port=int(options.get("port") or 6379),
        path=options.get("path") or "",
        db=int(options.get("db") or 0),
        user=options.get("username") or "",
        password=options.get("password") or "",
        tls=_context(options) if has_tls else None,
    )


def _context(options: Options) -> ssl.SSLContext:
    """As redis-py makes it (redis/connection.py, SSLConnection)."""
    context = ssl.create_default_context(
        cafile=options.get("ssl_ca_certs"), capath=options.get("ssl_ca_path"), cadata=options.get("ssl_ca_data")
    )
    cert_reqs = options.get("ssl_cert_reqs", ssl.CERT_REQUIRED)
    verify = _VERIFY.get(cert_reqs, ssl.CERT_REQUIRED) if isinstance(cert_reqs, str) else cert_reqs or ssl.CERT_NONE
    context.check_hostname = bool(options.get("ssl_check_hostname", True)) and verify == ssl.CERT_REQUIRED
    context.verify_mode = verify
    if options.get("ssl_certfile"):
        context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"), options.get("ssl_password"))
    return context

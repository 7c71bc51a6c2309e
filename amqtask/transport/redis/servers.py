"""Deployments of Redis (one server, the master that sentinels name, a cluster): their clients, and the way there for a loop."""

from __future__ import annotations

import itertools
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import redis
import redis.asyncio
import redis.asyncio.cluster
import redis.asyncio.retry
import redis.asyncio.sentinel
import redis.sentinel
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.connection import SSLConnection
from redis.crc import key_slot
from redis.retry import Retry
from redis.sentinel import SentinelConnectionPool

from amqtask.exceptions import ConfigurationError
from amqtask.transport.redis import connections
from amqtask.transport.redis.connections import Pool, resolving, resolving_cluster
from amqtask.transport.redis.urls import CLIENT_OPTIONS, in_clients_words

if TYPE_CHECKING:
    from amqtask.ground.shapes import Options, SettingValues


# Celery writes ssl.CERT_… where redis-py wants a word.
_CERT_REQS = {"CERT_REQUIRED": "required", "CERT_OPTIONAL": "optional", "CERT_NONE": "none"}
SENTINEL_PORT = 26379
# Host and port.
Address: TypeAlias = tuple[str, int]


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


class SingleServer:
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

    def get_many(self, client: Any, keys: Sequence[str]) -> list[bytes | None]:
        """MGET."""
        values: list[bytes | None] = client.mget(keys)
        return values


class SentinelMaster:
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

    def get_many(self, client: Any, keys: Sequence[str]) -> list[bytes | None]:
        """MGET."""
        values: list[bytes | None] = client.mget(keys)
        return values


class Cluster:
    """`redis+cluster://host:port;redis+cluster://other:port` (`rediss+cluster://` with TLS): some nodes of a cluster."""

    def __init__(self, url: str, arguments: Options) -> None:
        self._urls = [client_url(part.replace("+cluster:", ":", 1)) for part in url.split(";") if part]
        self.name = f"cluster {', '.join(safe_url(node_url) for node_url in self._urls)}"
        self._arguments = dict(arguments)
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


class ClusterMaster:
    """`redis+cluster://…` for a broker: the master that has all keys with a prefix, which is a hash tag. So they are in one slot,
    what belongs together happens in one step there, and it goes with the slot to another master.

    redis-py's pools for sentinels ask `_Nodes` who that is, at each connection.
    """

    def __init__(self, url: str, arguments: Options, prefix: str) -> None:
        self._urls = [client_url(part.replace("+cluster:", ":", 1)) for part in url.split(";") if part]
        self.name = f"cluster {', '.join(safe_url(node_url) for node_url in self._urls)}"
        self._arguments = dict(arguments)
        self._slot = key_slot(prefix.encode())

    def client(self) -> Any:
        """Connects to the master of the moment when it is used."""
        nodes = [resolving(redis.Redis.from_url(url, retry=_once(), **self._arguments)) for url in self._urls]
        pool = nodes[0].connection_pool
        has_tls = issubclass(pool.connection_class, SSLConnection)
        master_pool: Any = SentinelConnectionPool(
            "its slot",
            _Nodes(nodes, self._slot),
            **{
                **pool.connection_kwargs,
                "connection_class": _OwnersSSLConnection if has_tls else _OwnersConnection,
            },
        )  # type: ignore[no-untyped-call]
        return redis.Redis.from_pool(master_pool)

    async def async_client(self) -> Any:
        """Connects to the master of the moment when it is used."""
        nodes = [
            resolving(redis.asyncio.Redis.from_url(url, retry=_async_once(), **self._arguments)) for url in self._urls
        ]
        pool = nodes[0].connection_pool
        has_tls = issubclass(pool.connection_class, redis.asyncio.SSLConnection)
        finds = _AsyncNodes(nodes, self._slot)
        master_pool: Any = redis.asyncio.sentinel.SentinelConnectionPool(
            "its slot",
            finds,
            **{
                **pool.connection_kwargs,
                "connection_class": _AsyncOwnersSSLConnection if has_tls else _AsyncOwnersConnection,
            },
        )  # type: ignore[no-untyped-call]
        master = redis.asyncio.Redis.from_pool(master_pool)
        return _Together(master, master, nodes)

    def get_many(self, client: Any, keys: Sequence[str]) -> list[bytes | None]:
        """MGET."""
        values: list[bytes | None] = client.mget(keys)
        return values


class _Nodes:
    """Some nodes of a cluster, and which slot they are asked for."""

    def __init__(self, sentinels: list[Any], slot: int) -> None:
        # redis-py's name for those that are asked.
        self.sentinels = sentinels
        self.slot = slot

    def discover_master(self, service_name: str) -> Address:
        """The master of the slot. Raises: redis.ConnectionError, or why the last of them did not answer."""
        problem: Exception = redis.ConnectionError(f"no node of the cluster says who has slot {self.slot}")
        for node in self._in_turn():
            try:
                owner, nodes = owner_in(node.execute_command("CLUSTER", "SLOTS"), self.slot, host_of(node))
            except (redis.RedisError, OSError) as error:
                problem = error
                continue
            self._note(nodes)
            if owner is not None:
                return owner
        raise problem

    def _in_turn(self) -> list[Any]:
        """All of them, each time another one first: the first may be cut off from the others."""
        self.sentinels.append(self.sentinels.pop(0))
        return list(self.sentinels)

    def _note(self, nodes: Sequence[Address]) -> None:
        """They are asked when those that the URL names are away."""
        options: Options = self.sentinels[0].connection_pool.connection_kwargs
        addresses = {address_of(node) for node in self.sentinels}
        pool_class = type(self.sentinels[0].connection_pool)
        for host, port in nodes:
            if (host, port) not in addresses:
                first = self.sentinels[0].connection_pool
                pool = pool_class(connection_class=first.connection_class, **{**options, "host": host, "port": port})
                self.sentinels.append(type(self.sentinels[0]).from_pool(pool))


class _AsyncNodes(_Nodes):
    async def discover_master(self, service_name: str) -> Address:  # type: ignore[override]
        """The same for an event loop."""
        problem: Exception = redis.ConnectionError(f"no node of the cluster says who has slot {self.slot}")
        for node in self._in_turn():
            try:
                owner, nodes = owner_in(await node.execute_command("CLUSTER", "SLOTS"), self.slot, host_of(node))
            except (redis.RedisError, OSError) as error:
                problem = error
                continue
            self._note(nodes)
            if owner is not None:
                return owner
        raise problem


def host_of(client: Any) -> str:
    """The host that a client was made for."""
    return address_of(client)[0]


def address_of(client: Any) -> Address:
    """The host and port that a client was made for."""
    options: Options = client.connection_pool.connection_kwargs
    return options.get("host") or "localhost", int(options.get("port") or 6379)


def owner_in(slots: Sequence[Any], slot: int, answered_by: str) -> tuple[Address | None, list[Address]]:
    """The master of a slot, and all nodes, in an answer to CLUSTER SLOTS. `answered_by`: the host that gave it; a node that does
    not know its own address leaves it out."""
    owner: Address | None = None
    nodes: list[Address] = []
    for first, last, *members in slots:
        addresses = [
            ((host.decode() if isinstance(host, bytes) else host) or answered_by, int(port))
            for host, port, *_ in members
        ]
        nodes += addresses
        if first <= slot <= last:
            owner = addresses[0]
    return owner, nodes


# What a node answers that has the slot no longer; redis-py then asks again who has it.
_MOVED = "the keys are on another master now"


class _OwnersConnection(connections.SentinelConnection):
    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().read_response(*args, **kwargs)
        except redis.exceptions.MovedError:
            self.disconnect()  # type: ignore[no-untyped-call]
            raise redis.ConnectionError(_MOVED) from None


class _OwnersSSLConnection(_OwnersConnection, connections.SSLConnection):
    """The same with TLS."""


class _AsyncOwnersConnection(connections.AsyncSentinelConnection):
    async def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().read_response(*args, **kwargs)
        except redis.exceptions.MovedError:
            await self.disconnect()
            raise redis.ConnectionError(_MOVED) from None


class _AsyncOwnersSSLConnection(_AsyncOwnersConnection, connections.AsyncSSLConnection):
    """The same with TLS."""


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


@dataclass(frozen=True, slots=True)
class Place:
    """One server. `path` is that of a socket of this machine, or ""."""

    host: str = "localhost"
    port: int = 6379
    path: str = ""
    db: int = 0
    user: str = ""
    password: str = field(default="", repr=False)
    tls: ssl.SSLContext | None = None

    @property
    def name(self) -> str:
        """For people."""
        return self.path or f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Way:
    """How to get to the server that takes writes: `server`, or the one that `guides` name. They are sentinels, which know
    `master`, or nodes of a cluster, which know who has `slot`."""

    server: Place
    guides: tuple[Place, ...] = ()
    master: str = ""
    slot: int | None = None

    @property
    def name(self) -> str:
        """For people."""
        if self.slot is not None:
            return "the cluster's master of the broker's keys"
        return f"the master {self.master!r}" if self.guides else self.server.name

    @property
    def question(self) -> tuple[str, ...]:
        """What a guide is asked."""
        if self.slot is not None:
            return ("CLUSTER", "SLOTS")
        return ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.master)

    def directions(self, reply: Any, guide: Place) -> tuple[Place | None, list[Place]]:
        """The server that a guide names, and other guides."""
        if not isinstance(reply, list):
            return None, []
        if self.slot is None:
            masters = [replace(self.server, host=reply[0].decode(), port=int(reply[1]))] if len(reply) == 2 else []
            return next(iter(masters), None), []
        owner, nodes = owner_in(reply, self.slot, guide.host)
        places = [replace(self.server, host=host, port=port) for host, port in nodes]
        return None if owner is None else replace(self.server, host=owner[0], port=owner[1]), places


def way_to(client: Any) -> Way:
    """The way of a redis-py client. Raises: ConfigurationError."""
    pool = client.connection_pool
    server = _place(pool.connection_kwargs, issubclass(pool.connection_class, SSLConnection))
    if not isinstance(pool, SentinelConnectionPool):
        return Way(server)
    manager = pool.sentinel_manager
    pools = [guide.connection_pool for guide in manager.sentinels]
    guides = [
        _place(guide_pool.connection_kwargs, issubclass(guide_pool.connection_class, SSLConnection))
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

"""redis-py's connections, with the name of their host looked up within the time that connecting may take: redis-py waits for as
long as the resolver does."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, TypeVar

import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel

from amqtask.ground.strikes import let_through
from amqtask.transport.resolving import addresses_of, as_host, resolve

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

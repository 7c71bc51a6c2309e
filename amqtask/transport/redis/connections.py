"""redis-py's connections, with the name of their host looked up within the time that connecting may take: redis-py waits for as
long as the resolver does."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import redis
import redis.asyncio

from amqtask.transport.resolving import addresses_of, as_host, resolve

# Seconds, where nothing limits connecting.
LONGEST = 60.0


class Connection(redis.Connection):
    """Without TLS."""

    def _connect(self) -> Any:
        name, error = self.host, OSError("the name has no address")
        deadline = time.monotonic() + (self.socket_connect_timeout or LONGEST)
        for candidate in resolve(name, int(self.port), deadline):
            self.host = as_host(candidate[4])
            try:
                return super()._connect()  # type: ignore[no-untyped-call]
            except OSError as failure:
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


def class_for(url: str) -> dict[str, Any]:
    """The argument of `from_url` for a server at this URL; none for a socket in the file system."""
    classes = {"redis": Connection, "rediss": SSLConnection}
    found = classes.get(urlsplit(url).scheme)
    return {} if found is None else {"connection_class": found}


def async_class_for(url: str) -> dict[str, Any]:
    """The same for redis.asyncio."""
    classes = {"redis": AsyncConnection, "rediss": AsyncSSLConnection}
    found = classes.get(urlsplit(url).scheme)
    return {} if found is None else {"connection_class": found}

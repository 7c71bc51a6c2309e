"""`cache+memcached://host:port;host:port`: results in memcached (celery/backends/cache.py), through pymemcache.

memcached forgets by itself: when a result expires, and earlier when its memory is full.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pymemcache.client.base import PooledClient
from pymemcache.client.hash import HashClient
from pymemcache.exceptions import MemcacheClientError, MemcacheError, MemcacheServerError, MemcacheUnknownError

from amqtask.backends.contract import BackendOptions
from amqtask.backends.polling import IsFinal, ValueBackend
from amqtask.exceptions import BackendUnreachable, ConfigurationError, EncodeError
from amqtask.ground.lazy import ByProcess
from amqtask.ground.printable import clause

# memcached takes a longer expiry for a time on the clock (doc/protocol.txt, "Expiration times").
_LONGEST_RELATIVE = 30 * 24 * 3600
DEFAULT_PORT = 11211


class MemcachedBackend(ValueBackend):
    """See amqtask.backends.contract.ResultBackend and `ValueBackend` for `transport_options`.

    `cache_backend_options` go to pymemcache's client; with several servers a key has its server by its hash.
    """

    supports_autoexpire = True
    errors = (OSError, MemcacheError)

    def __init__(self, options: BackendOptions) -> None:
        super().__init__(options)
        self._servers = servers_of(options.url)
        # memcached counts the ticks of its clock, one a second, and the first may come at once.
        self._expires = math.ceil(options.expires) + 1 if options.expires else 0
        self._arguments = {
            "connect_timeout": options.connect_timeout,
            "timeout": max(options.connect_timeout, 5.0),
            "default_noreply": False,
            **(options.settings.get("cache_backend_options") or {}),
        }
        self._clients: ByProcess[Any] = ByProcess(self._connect)

    def get_values(self, keys: Sequence[str]) -> Mapping[str, bytes]:
        """One GET for all keys."""
        values: Mapping[str, bytes] = self._clients.get().get_many(list(keys))
        return values

    def put_value(self, key: str, value: bytes) -> None:
        """SET."""
        self._clients.get().set(key, value, expire=self._expiry())

    def put_unless(self, key: str, value: bytes, is_final: IsFinal) -> None:
        """ADD, or CAS with what was read until nobody came between."""
        client = self._clients.get()
        while not client.add(key, value, expire=self._expiry()):
            stored, unique = client.gets(key)
            if stored is not None and (is_final(stored) or client.cas(key, value, unique, expire=self._expiry())):
                return

    def delete_value(self, key: str) -> None:
        """DELETE."""
        self._clients.get().delete(key)

    def is_transient(self, error: Exception) -> bool:
        """Whether the error may pass: a connection can be made again, what the server refuses it refuses again."""
        return not _is_refused(error)

    def explain(self, error: Exception) -> Exception:
        """Our error for one of memcached, with the servers' names, and what to do about a value that is too large."""
        store_name = f"memcached at {', '.join(f'{host}:{port}' for host, port in self._servers)}"
        if isinstance(error, MemcacheServerError) and b"too large" in _message_of(error):
            return EncodeError(f"a result is too large for {store_name} (its -I is 1m by default): {error}")
        if isinstance(error, MemcacheClientError):
            return EncodeError(f"{store_name} does not take a result: {error}")
        if isinstance(error, MemcacheUnknownError) or _is_refused(error):
            return BackendUnreachable(f"{store_name} refused: {error}")
        return BackendUnreachable(
            f"{store_name} does not answer: {clause(error)}. Is it running there, and is result_backend right?"
        )

    def close(self) -> None:
        """Close connections; they open again when they are needed."""
        super().close()
        self._clients.end(lambda client: client.close())

    def _expiry(self) -> int:
        return self._expires if self._expires <= _LONGEST_RELATIVE else int(time.time()) + self._expires

    def _connect(self) -> object:
        if len(self._servers) == 1:
            return PooledClient(self._servers[0], **self._arguments)
        # A server that is away is an error, not an empty store.
        arguments = {"use_pooling": True, "retry_attempts": 0, "dead_timeout": 0, **self._arguments}
        return HashClient(list(self._servers), **arguments)


def _message_of(error: Exception) -> bytes:
    reason = error.args[0] if error.args else b""
    return reason if isinstance(reason, bytes) else str(reason).encode()


def _is_refused(error: Exception) -> bool:
    return isinstance(error, MemcacheClientError) or (
        isinstance(error, MemcacheServerError) and b"too large" in _message_of(error)
    )


def servers_of(url: str) -> tuple[tuple[str, int], ...]:
    """The servers of `cache+memcached://host:port;host:port`. Raises: ConfigurationError."""
    servers = []
    for address in url.partition("://")[2].strip("/").split(";"):
        host, _, port = address.rpartition("@")[2].partition(":")
        if not host or (port and not port.isdigit()):
            raise ConfigurationError("no memcached server in result_backend: write cache+memcached://host:11211")
        servers.append((host, int(port or DEFAULT_PORT)))
    return tuple(servers)

"""Where a Redis is and how to log in, as redis-py has read it from the URL, for connections that a worker's loop drives."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from redis.connection import SSLConnection
from redis.sentinel import SentinelConnectionPool

if TYPE_CHECKING:
    from amqtask.ground.shapes import Options

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
    """How to get to the server that takes writes: `server`, or at the host and port that the sentinels name for `master`."""

    server: Place
    sentinels: tuple[Place, ...] = ()
    master: str = ""


def way_to(client: Any) -> Way:
    """The way of a redis-py client. Raises: ConfigurationError."""
    pool = client.connection_pool
    server = _place(pool.connection_kwargs, issubclass(pool.connection_class, SSLConnection))
    if not isinstance(pool, SentinelConnectionPool):
        return Way(server)
    pools = [sentinel.connection_pool for sentinel in pool.sentinel_manager.sentinels]
    sentinels = [_place(each.connection_kwargs, issubclass(each.connection_class, SSLConnection)) for each in pools]
    return Way(server, tuple(sentinels), pool.service_name)


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
    wanted = options.get("ssl_cert_reqs", ssl.CERT_REQUIRED)
    verify = _VERIFY.get(wanted, ssl.CERT_REQUIRED) if isinstance(wanted, str) else wanted or ssl.CERT_NONE
    context.check_hostname = bool(options.get("ssl_check_hostname", True)) and verify == ssl.CERT_REQUIRED
    context.verify_mode = verify
    if options.get("ssl_certfile"):
        context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"), options.get("ssl_password"))
    return context

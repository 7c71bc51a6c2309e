"""Redis and Valkey as a broker, in kombu's layout (kombu/transport/redis.py), with leases in place of its visibility timeout.

Here: their URLs. Brokers, results, locks and places are named by the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amqtask.ground.shapes import SettingValues

# Schemes of ours, of kombu and of redis-py, and what redis-py calls them.
SCHEMES = {
    "redis": "redis",
    "rediss": "rediss",
    "redis+socket": "unix",
    "sentinel": "sentinel",
    "redis+cluster": "redis+cluster",
    "rediss+cluster": "rediss+cluster",
}
SCHEMES |= {name.replace("redis", "valkey"): meant for name, meant in SCHEMES.items() if name.startswith("redis")}
SCHEMES["unix"] = "unix"


# Options of broker_transport_options and its kin that go to the client as they are.
CLIENT_OPTIONS = ("socket_timeout", "socket_connect_timeout", "socket_keepalive", "health_check_interval", "username",
                  "password", "client_name", "max_connections")  # fmt: skip
# What `…_use_ssl` makes of them.
_WITH_TLS = {"redis": "rediss", "redis+cluster": "rediss+cluster"}


def in_clients_words(url: str, *, has_tls: bool = False) -> str:
    """The URL as redis-py writes it; one of another scheme as it is. Nodes of a cluster may be named without their scheme."""
    scheme, mark, location = url.partition("://")
    name = SCHEMES.get(scheme.strip().lower())
    if name is None or not mark:
        return url
    if has_tls:
        name = _WITH_TLS.get(name, name)
    if name.endswith("+cluster"):
        hosts = [part.rpartition("://")[2] for part in url.split(";") if part.strip()]
        return ";".join(f"{name}://{host}" for host in hosts)
    return f"{name}://{location}"


def tls_settings(use_ssl: object) -> SettingValues:
    """`broker_use_ssl` for what is in the broker's Redis: the setting that result stores read. True: with what redis-py does by
    itself."""
    arguments = dict(use_ssl) if isinstance(use_ssl, Mapping) else {"ssl_cert_reqs": "required"} if use_ssl else None
    return {"redis_backend_use_ssl": arguments}

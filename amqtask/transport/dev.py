"""`dev://`: the broker that `amqtask dev` serves on this machine. AMQP in all but the address and what stands beside it."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from amqtask.exceptions import ConfigurationError
from amqtask.transport.amqp import AmqpBroker
from amqtask.transport.url import BrokerAddress

# Where RabbitMQ would be: what names no broker, or the one on this machine, finds it there without a word.
HOST, PORT = "127.0.0.1", 5672
# Result stores that are servers of their own, or in one process: results go over the broker instead.
_AWAY = ("redis", "rediss", "sentinel", "valkey", "valkeys", "cache", "mongodb", "amqp")


class DevAddress(BrokerAddress):
    """Any login is taken."""

    @property
    def safe_url(self) -> str:
        """The URL."""
        return f"dev://{self.host}:{self.port}"

    @property
    def question(self) -> str:
        """What to look at when nothing answers there."""
        return "Does `amqtask dev` run, with this port?"


class DevBroker(AmqpBroker):
    """See amqtask.transport.broker.Broker."""

    def _parsed(self, urls: str | Sequence[str] | None) -> tuple[BrokerAddress, ...]:
        return (dev_address(urls if isinstance(urls, str) else next(iter(urls or ()), "")),)

    def results_url(self, url: str) -> str:
        """Nothing beside this broker needs to be installed: what would be in a server of its own goes through the broker."""
        scheme = url.partition("://")[0].partition("+")[0]
        return "rpc://" if scheme in _AWAY else url


def dev_address(url: str) -> DevAddress:
    """What `dev://`, `dev://:PORT` or `dev://HOST:PORT` names. Raises: ConfigurationError."""
    try:
        split = urlsplit(url)
        return DevAddress(host=split.hostname or HOST, port=split.port or PORT)
    except ValueError:
        raise ConfigurationError(f"the broker URL {url!r} should look like dev:// or dev://:5673") from None

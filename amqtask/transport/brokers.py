"""Which broker a URL means: the table of schemes. A broker is imported when a URL has its scheme."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amqtask.transport.broker import Broker
    from amqtask.transport.contract import BrokerOptions

_REDIS = frozenset(
    {"redis", "rediss", "redis+socket", "sentinel", "valkey", "valkeys", "redis+cluster", "rediss+cluster"}
)


def open_broker(options: BrokerOptions, kept: dict[str, object]) -> Broker:
    """The broker of these URLs; nothing is connected yet, and of AMQP's URLs nothing is looked at before it is used.

    What must outlive a change of settings stays in `kept`, which is one application's.
    """
    scheme = _scheme(options.urls)
    if scheme == "memory":
        from amqtask.transport.memory.local import LocalBroker

        return LocalBroker(options, kept)
    if scheme in _REDIS:
        from amqtask.transport.redis.broker import RedisBroker

        return RedisBroker(options, kept)
    # Whatever else is there is AMQP's to take or to refuse.
    from amqtask.transport.amqp import AmqpBroker

    return AmqpBroker(options, kept)


def _scheme(urls: object) -> str:
    first = urls if isinstance(urls, str) else next(iter(urls or ()), "")  # type: ignore[call-overload]
    return first.partition("://")[0].strip().lower() if isinstance(first, str) and "://" in first else ""

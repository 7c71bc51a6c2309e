"""The queue that `add_consumer` asks for: by name, or with an exchange and kombu's options (celery/app/amqp.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amqtask.exceptions import ConfigurationError
from amqtask.protocol.entities import Exchange
from amqtask.topology.declarations import work_queue

if TYPE_CHECKING:
    from amqtask.ground.shapes import CommandArguments
    from amqtask.protocol.entities import Queue
    from amqtask.topology.declarations import QueueDefaults

OPTIONS = ("durable", "exclusive", "auto_delete", "queue_arguments")
EXCHANGE_TYPES = ("direct", "topic", "fanout", "headers")
_PLACE = ("queue", "exchange", "exchange_type", "routing_key")


def asked_queue(arguments: CommandArguments, defaults: QueueDefaults) -> Queue | str:
    """The queue by its description; only its name if there is no more in it.

    Options: `durable`, `exclusive`, `auto_delete`, `queue_arguments` (the broker's). Raises: ConfigurationError for
    another option, for an unknown exchange type, and without a name.
    """
    name = arguments.get("queue")
    if not name or not isinstance(name, str):
        raise ConfigurationError("add_consumer needs the name of a queue")
    options = {key: value for key, value in arguments.items() if key not in _PLACE and value is not None}
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise ConfigurationError(f"add_consumer knows no option {', '.join(unknown)} (there are: {', '.join(OPTIONS)})")
    exchange = arguments.get("exchange")
    if not exchange and not options:
        return name
    return work_queue(
        name,
        defaults,
        exchange=_exchange(str(exchange), arguments.get("exchange_type")) if exchange else None,
        routing_key=str(arguments.get("routing_key") or name),
        queue_arguments=options.get("queue_arguments"),
        durable=bool(options.get("durable", True)),
        exclusive=bool(options.get("exclusive")),
        auto_delete=bool(options.get("auto_delete")),
    )


def _exchange(name: str, exchange_type: object) -> Exchange:
    exchange_type = exchange_type or "direct"
    if exchange_type not in EXCHANGE_TYPES and not str(exchange_type).startswith("x-"):
        raise ConfigurationError(f"there is no exchange type {exchange_type!r}: it is {', '.join(EXCHANGE_TYPES)}")
    return Exchange(name, type=str(exchange_type))

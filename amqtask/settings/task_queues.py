"""The settings `task_queues` and `task_default_exchange` in all their forms, as our entities."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import ConfigurationError
from amqtask.protocol.entities import Exchange, Queue, arguments, queue_of

if TYPE_CHECKING:
    from amqtask.ground.shapes import Options
    from amqtask.settings import Settings


def default_exchange(conf: Settings) -> Exchange | None:
    """The exchange of the default queue; None (the default exchange) when nothing is configured."""
    name, exchange_type = conf.task_default_exchange, conf.task_default_exchange_type
    if not name and exchange_type == "direct":
        return None
    return Exchange(name or conf.task_default_queue, type=exchange_type)


def configured(queues: object, default: Exchange | None) -> Iterator[Queue]:
    """Queues from a list of Queue, names or kombu's queues, or from Celery's mapping of names.

    Raises: ConfigurationError for anything else.
    """
    if queues is None:
        return
    if isinstance(queues, Mapping):
        for name, options in queues.items():
            yield _from_mapping(str(name), options or {}, default)
        return
    if isinstance(queues, (str, Queue)) or not isinstance(queues, Iterable):
        queues = [queues]
    for entry in queues:
        if isinstance(entry, Queue):
            yield entry
        elif isinstance(entry, str):
            yield Queue(entry, routing_key=entry)
        else:
            yield _from_entity(entry)


def _from_mapping(name: str, options: Options, default: Exchange | None) -> Queue:
    """Celery's dictionary form: exchange, exchange_type, routing_key (or binding_key), queue_arguments."""
    exchange = options.get("exchange")
    if isinstance(exchange, str):
        exchange = Exchange(exchange, type=str(options.get("exchange_type", "direct")))
    key = options.get("routing_key") or options.get("binding_key") or name
    queue_arguments = options.get("queue_arguments") or options.get("arguments")
    return Queue(name, exchange=exchange or default, routing_key=str(key), arguments=arguments(queue_arguments))


def _from_entity(entity: Any) -> Queue:
    try:
        return queue_of(entity)
    except AttributeError as error:
        raise ConfigurationError(f"task_queues holds {entity!r}, which is no Queue: {error}") from error

"""The form of the panel's answers: Celery's dictionaries of tasks, queues, tasks' options and resources; and asked queues.

Sources: celery/worker/request.py (`info`), kombu's Queue.as_dict, celery/worker/worker.py (`rusage`).
"""

from __future__ import annotations

import resource
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import AmqTaskError, ConfigurationError
from amqtask.protocol.entities import Exchange
from amqtask.protocol.serialization import dumps
from amqtask.protocol.task import decode_body, saferepr
from amqtask.topology.declarations import work_queue
from amqtask.topology.delays import TO_HEADER, waiting_priority
from amqtask.worker.strategy import bare_request

if TYPE_CHECKING:
    from amqtask.execution.request import Request
    from amqtask.ground.shapes import CommandArguments, JsonObject
    from amqtask.protocol.entities import Exchange, Queue
    from amqtask.protocol.message import Delivery
    from amqtask.services.command_context import Control
    from amqtask.topology.declarations import QueueDefaults

# The options of each task in the answer to `registered`, by default.
TASK_FIELDS = ("exchange", "routing_key", "rate_limit")
RUSAGE = (
    "utime", "stime", "maxrss", "ixrss", "idrss", "isrss", "minflt", "majflt", "nswap", "inblock", "oublock",
    "msgsnd", "msgrcv", "nsignals", "nvcsw", "nivcsw",
)  # fmt: skip
# Larger bodies (bytes) are not decoded for an answer: the worker's loop would wait meanwhile.
LARGE = 64 * 1024
# Pickled bodies are not decoded for an answer.
_PLAIN = frozenset({"application/json", "application/x-msgpack", "application/x-yaml"})


def task_info(control: Control, request: Request, *, safe: bool) -> JsonObject:
    """One task in this worker. `safe`: its arguments as the text that came with the message."""
    running = control.operations.find(request)
    args, kwargs = _arguments(control, request, safe=safe)
    return {
        "id": request.id,
        "name": request.headers.get("shadow") or request.task,
        "args": args,
        "kwargs": kwargs,
        "type": request.task,
        "hostname": control.worker.setup.hostname,
        "time_start": control.operations.start_of(request) if running is not None else None,
        "acknowledged": running is not None and request.number in control.worker.deliveries.acks_early,
        "delivery_info": {
            "exchange": request.exchange,
            "routing_key": request.routing_key,
            "priority": request.priority,
            "redelivered": request.redelivered,
        },
        "worker_pid": running.pid if running is not None else None,
    }


def _arguments(control: Control, request: Request, *, safe: bool) -> tuple[object, object]:
    """The arguments; or their text, if the sender chose another text than Python's repr (usually to hide a value)."""
    headers = request.headers
    sent_reprs = headers.get("argsrepr"), headers.get("kwargsrepr")
    if sent_reprs != (None, None) and (safe or len(request.body) > LARGE):
        return sent_reprs
    try:
        accept = control.accept & _PLAIN
        args, kwargs, _ = request.decoded or decode_body(
            request.body, request.content_type, request.content_encoding, headers, accept, LARGE
        )
        dumps([args, kwargs], "json")
    except (AmqTaskError, TypeError, ValueError):
        return sent_reprs
    decoded = tuple(args), kwargs
    is_true = all(
        text is None or _plain(saferepr(value)) == _plain(text) for text, value in zip(sent_reprs, decoded, strict=True)
    )
    return (list(args), dict(kwargs)) if is_true else sent_reprs


def _plain(text: object) -> str:
    """The text with lists for tuples, because JSON makes lists of tuples."""
    return str(text).replace("(", "[").replace(")", "]").replace(",]", "]")


def scheduled_info(control: Control, request: Request) -> JsonObject:
    """One task that waits here for its ETA."""
    return {
        "eta": request.headers.get("eta"),
        "priority": 6,  # the priority of ETA tasks among Celery's timers
        "request": task_info(control, request, safe=False),
    }


def delayed_info(control: Control, delivery: Delivery, due: float) -> JsonObject:
    """One delayed message that this worker holds until it is due."""
    request = bare_request(delivery, 0)
    headers = request.headers
    request.exchange = str(headers.get(TO_HEADER) or "")
    request.priority = waiting_priority(delivery.properties)
    eta = datetime.fromtimestamp(due, timezone.utc).isoformat()
    return {"eta": headers.get("eta") or eta, "priority": 6, "request": task_info(control, request, safe=True)}


def queue_info(queue: Queue) -> JsonObject:
    """One queue that is consumed, with kombu's names."""
    arguments = queue.argument_map
    return {
        "name": queue.name,
        "exchange": _exchange_info(queue.exchange),
        "routing_key": queue.routing_key or queue.name,
        "queue_arguments": arguments,
        "binding_arguments": None,
        "consumer_arguments": None,
        "durable": queue.durable,
        "exclusive": queue.exclusive,
        "auto_delete": queue.auto_delete,
        "no_ack": False,
        "alias": None,
        "bindings": [
            {"exchange": binding.source.name, "routing_key": binding.routing_key, "arguments": dict(binding.arguments)}
            for binding in queue.bindings
        ],
        "no_declare": queue.passive or None,
        "expires": _seconds(arguments.get("x-expires")),
        "message_ttl": _seconds(arguments.get("x-message-ttl")),
        "max_length": arguments.get("x-max-length"),
        "max_length_bytes": arguments.get("x-max-length-bytes"),
        "max_priority": arguments.get("x-max-priority"),
    }


def _exchange_info(exchange: Exchange | None) -> JsonObject:
    return {
        "name": exchange.name if exchange else "",
        "type": exchange.type if exchange else "direct",
        "arguments": dict(exchange.arguments) if exchange else None,
        "durable": exchange.durable if exchange else True,
        "passive": exchange.passive if exchange else False,
        "auto_delete": exchange.auto_delete if exchange else False,
        "delivery_mode": None,
        "no_declare": False,
    }


def _seconds(milliseconds: object) -> float | None:
    return milliseconds / 1000 if isinstance(milliseconds, (int, float)) else None


def registered_info(name: str, task: Any, fields: Any) -> str:
    """`name [attribute=value …]` with the attributes that the task has; without private ones."""
    names = [field for field in fields or TASK_FIELDS if isinstance(field, str) and not field.startswith("_")]
    values = [f"{field}={getattr(task, field)}" for field in names if getattr(task, field, None) is not None]
    return f"{name} [{' '.join(values)}]" if values else name


def rusage() -> Mapping[str, float]:
    """The resource usage of the main process (getrusage(2))."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {name: getattr(used, f"ru_{name}") for name in RUSAGE}


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

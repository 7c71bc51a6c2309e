"""The options of tasks and of calls: what each may be, once for decorators, classes, `apply_async` and signatures.

None leaves an option to the task, and then to the settings. Options that are not here are not looked at: they belong to the
application or to a library, which read them from the task, or to a workflow, which has made them itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from amqtask.ground.near_names import near_names
from amqtask.options import value_types
from amqtask.options.value_types import Kind, checked
from amqtask.protocol.entities import Exchange, Queue, as_exchange, as_queue

if TYPE_CHECKING:
    from amqtask.ground.shapes import Options

_BACKOFF = value_types.either(
    "True, False, or a number of seconds from 0 on", value_types.instance("", bool), value_types.SECONDS
)
_QUEUE = value_types.either(
    "the name of a queue, or a Queue", Queue, value_types.NAME, Kind("a queue of kombu's", as_queue)
)
_EXCHANGE = value_types.either(
    "the name of an exchange, or an Exchange", Exchange, value_types.KEY, Kind("an exchange of kombu's", as_exchange)
)
_LINKS = value_types.Kind("a signature, or a list of them", value_types.signatures)
_SERIALIZER = value_types.NAME  # a name or content type; the serialization knows which there are

_SWITCHES = (
    "typing", "retry_jitter", "store_errors_even_if_ignored", "store_eager_result", "track_started", "acks_late",
    "acks_on_failure_or_timeout", "acks_on_failure", "acks_on_timeout", "reject_on_worker_lost", "send_events", "trail",
)  # fmt: skip
_NAMES = (
    "group_id", "root_id", "parent_id", "message_id", "type", "user_id", "app_id", "content_type", "content_encoding",
    "correlation_id", "origin",
)  # fmt: skip

# Options of a task for its calls, which a call may override.
_BOTH: dict[str, Kind] = {
    "expires": value_types.EXPIRY,
    "priority": value_types.PRIORITY,
    "serializer": _SERIALIZER,
    "compression": value_types.NAME,
    "queue": _QUEUE,
    "exchange": _EXCHANGE,
    "routing_key": value_types.KEY,
    "delivery_mode": value_types.DELIVERY_MODE,
    "time_limit": value_types.SECONDS,
    "soft_time_limit": value_types.SECONDS,
    "ignore_result": value_types.BOOLEAN,
}
# The attributes of Task.
TASK: dict[str, Kind] = {
    **_BOTH,
    "name": value_types.NAME,
    "max_retries": value_types.ATTEMPTS,
    "default_retry_delay": value_types.SECONDS,
    "autoretry_for": value_types.EXCEPTIONS,
    "dont_autoretry_for": value_types.EXCEPTIONS,
    "throws": value_types.EXCEPTIONS,
    "retry_kwargs": value_types.TABLE,
    "retry_backoff": _BACKOFF,
    "retry_backoff_max": value_types.SECONDS,
    "resultrepr_maxsize": value_types.COUNT,
    "rate_limit": value_types.RATE,
    **dict.fromkeys(_SWITCHES, value_types.BOOLEAN),
}
# Options of `apply_async` and of signatures.
CALL: dict[str, Kind] = {
    **_BOTH,
    "task_id": value_types.NAME,
    "eta": value_types.MOMENT,
    "countdown": value_types.FROM_NOW,
    "retries": value_types.COUNT,
    "shadow": value_types.TEXT,
    "reply_to": value_types.KEY,
    "headers": value_types.HEADERS,
    "link": _LINKS,
    "link_error": _LINKS,
    "timeout": value_types.SECONDS,
    "confirm_timeout": value_types.SECONDS,
    "retry": value_types.BOOLEAN,
    "retry_policy": value_types.MAPPING,
    "add_to_parent": value_types.BOOLEAN,
    "exchange_type": value_types.NAME,
    "argsrepr": value_types.TEXT,
    "kwargsrepr": value_types.TEXT,
    **dict.fromkeys(_NAMES, value_types.KEY),
}


def of_call(task: str, options: Options) -> Options:
    """The options of a call as they are used. Raises: WrongValue, which names the task, the option and what is wanted."""
    return checked(f"task {task}", CALL, options)


def of_task(task: str, options: Options) -> Options:
    """The options of a task's definition as they are used. Raises: WrongValue."""
    return checked(f"task {task}", TASK, options)


def near_option(name: str) -> str | None:
    """The option of a task that was meant, if it is one: `max_retries` for `max_retires`."""
    return next(iter(near_names(name, (*TASK, "bind", "base", "pydantic"), alike=0.8)), None)

"""The options of tasks and of calls: what each may be, once for decorators, classes, `apply_async` and signatures.

None leaves an option to the task, and then to the settings. Options that are not here are not looked at: they belong to the
application or to a library, which read them from the task, or to a workflow, which has made them itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from amqtask import kinds
from amqtask.entities import Exchange, Queue
from amqtask.kinds import Kind, checked

_BACKOFF = kinds.either("True, False, or a number of seconds from 0 on", kinds.instance("", bool), kinds.SECONDS)
_QUEUE = kinds.either("the name of a queue, or a Queue", Queue, kinds.NAME)
_EXCHANGE = kinds.either("the name of an exchange, or an Exchange", Exchange, kinds.KEY)
_LINKS = kinds.Kind("a signature, or a list of them", kinds.signatures)
_SERIALIZER = kinds.NAME  # a name or content type; the serialization knows which there are

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
    "expires": kinds.EXPIRY,
    "priority": kinds.PRIORITY,
    "serializer": _SERIALIZER,
    "compression": kinds.NAME,
    "queue": _QUEUE,
    "exchange": _EXCHANGE,
    "routing_key": kinds.KEY,
    "delivery_mode": kinds.DELIVERY_MODE,
    "time_limit": kinds.SECONDS,
    "soft_time_limit": kinds.SECONDS,
    "ignore_result": kinds.BOOLEAN,
}
# The attributes of Task.
TASK: dict[str, Kind] = {
    **_BOTH,
    "name": kinds.NAME,
    "max_retries": kinds.ATTEMPTS,
    "default_retry_delay": kinds.SECONDS,
    "autoretry_for": kinds.EXCEPTIONS,
    "dont_autoretry_for": kinds.EXCEPTIONS,
    "throws": kinds.EXCEPTIONS,
    "retry_kwargs": kinds.TABLE,
    "retry_backoff": _BACKOFF,
    "retry_backoff_max": kinds.SECONDS,
    "resultrepr_maxsize": kinds.COUNT,
    "rate_limit": kinds.RATE,
    **dict.fromkeys(_SWITCHES, kinds.BOOLEAN),
}
# Options of `apply_async` and of signatures.
CALL: dict[str, Kind] = {
    **_BOTH,
    "task_id": kinds.NAME,
    "eta": kinds.MOMENT,
    "countdown": kinds.FROM_NOW,
    "retries": kinds.COUNT,
    "shadow": kinds.TEXT,
    "reply_to": kinds.KEY,
    "headers": kinds.HEADERS,
    "link": _LINKS,
    "link_error": _LINKS,
    "timeout": kinds.SECONDS,
    "confirm_timeout": kinds.SECONDS,
    "retry": kinds.BOOLEAN,
    "retry_policy": kinds.MAPPING,
    "add_to_parent": kinds.BOOLEAN,
    "exchange_type": kinds.NAME,
    "argsrepr": kinds.TEXT,
    "kwargsrepr": kinds.TEXT,
    **dict.fromkeys(_NAMES, kinds.KEY),
}


def of_call(task: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of a call as they are used. Raises: WrongValue, which names the task, the option and what is wanted."""
    return checked(f"task {task}", CALL, options)


def of_task(task: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of a task's definition as they are used. Raises: WrongValue."""
    return checked(f"task {task}", TASK, options)


def near_option(name: str) -> str | None:
    """The option of a task that was meant, if it is one: `max_retries` for `max_retires`."""
    near = difflib.get_close_matches(name, (*TASK, "bind", "base", "pydantic"), n=1, cutoff=0.8)
    return near[0] if near else None

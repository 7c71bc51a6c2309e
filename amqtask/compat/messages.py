"""Task messages as Celery's parts hand them around: made by `app.amqp`, read by `worker.strategy`; not what is published here."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from amqtask.client.message_builder import eta_of
from amqtask.exceptions import InvalidTaskError
from amqtask.protocol.task import TaskCall, saferepr, task_headers

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonObject

# Options of calls that TaskCall has under other names; and those that are no part of a message.
_RENAMED = {"group_id": "group"}
_NOT_WRITTEN = frozenset({"countdown", "eta", "expires", "create_sent_event", "now", "timezone", "stamped_headers"})


class task_message(NamedTuple):
    """The four parts of a message; the body is what would be encoded."""

    headers: dict[str, Any]
    properties: dict[str, Any]
    body: Any
    sent_event: dict[str, Any] | None


def as_task_v2(task_id: str, name: str, args: Any = None, kwargs: Any = None, **options: Any) -> task_message:
    """Protocol 2. Raises: TypeError."""
    args, kwargs = _checked(args, kwargs)
    stamps = options.get("stamped_headers")
    call = TaskCall(
        task_id,
        name,
        args,
        kwargs,
        eta=eta_of(options.get("eta"), options.get("countdown")),
        expires=_expiry(options.get("expires")),
        argsrepr=options.pop("argsrepr", None) or saferepr(args),
        kwargsrepr=options.pop("kwargsrepr", None) or saferepr(kwargs),
        stamped_headers=stamps,
        stamps={header: options.pop(header) for header in stamps or ()},
        **{_RENAMED.get(key, key): value for key, value in options.items() if key not in _NOT_WRITTEN},
    )
    headers = task_headers(call)
    event = {key: headers[key] for key in ("root_id", "parent_id", "retries", "eta", "expires")}
    event |= {"uuid": task_id, "name": name, "args": headers["argsrepr"], "kwargs": headers["kwargsrepr"]}
    return task_message(
        headers,
        _properties(task_id, call.reply_to),
        (args, kwargs, call.embed),
        event if options.get("create_sent_event") else None,
    )


def as_task_v1(task_id: str, name: str, args: object = None, kwargs: object = None, **options: Any) -> task_message:
    """Protocol 1: all of it is in the body. Raises: TypeError."""
    args, kwargs = _checked(args, kwargs)
    eta, expires = eta_of(options.get("eta"), options.get("countdown")), _expiry(options.get("expires"))
    group = options.get("group_id")
    body = {
        "task": name,
        "id": task_id,
        "args": args,
        "kwargs": kwargs,
        "group": group,
        "group_index": options.get("group_index"),
        "retries": options.get("retries") or 0,
        "eta": eta and eta.isoformat(),
        "expires": expires and expires.isoformat(),
        "utc": True,
        "callbacks": options.get("callbacks"),
        "errbacks": options.get("errbacks"),
        "timelimit": (options.get("time_limit"), options.get("soft_time_limit")),
        "taskset": group,
        "chord": options.get("chord"),
    }
    event = {key: body[key] for key in ("retries", "eta", "expires")}
    event |= {"uuid": task_id, "name": name, "args": saferepr(args), "kwargs": saferepr(kwargs)}
    properties = _properties(task_id, options.get("reply_to"))
    return task_message({}, properties, body, event if options.get("create_sent_event") else None)


def _checked(args: object, kwargs: object) -> tuple[object, object]:
    args, kwargs = args or (), kwargs or {}
    if not isinstance(args, (list, tuple)):
        raise TypeError("task args must be a list or tuple")
    if not isinstance(kwargs, Mapping):
        raise TypeError("task keyword arguments must be a mapping")
    return args, kwargs


def _properties(task_id: str, reply_to: str | None) -> JsonObject:
    return {"correlation_id": task_id, "reply_to": reply_to or ""}


def _expiry(expires: object) -> datetime | None:
    """Seconds from now, or a time."""
    return eta_of(None, expires) if isinstance(expires, (int, float)) else eta_of(expires, None)


# -- reading protocol 1, as (body, headers, whether the body is decoded, whether times are UTC)

Read = tuple[tuple[Any, Any, dict[str, Any]], dict[str, Any], bool, bool]
_IN_HEADERS = (
    "lang", "task", "id", "root_id", "parent_id", "group", "meth", "shadow", "eta", "expires", "argsrepr", "kwargsrepr", "origin",
)  # fmt: skip


def hybrid_to_proto2(message: Any, body: dict[str, Any]) -> Read:
    """Of a message with everything in its body, and perhaps headers that say more. Raises: InvalidTaskError."""
    headers = {name: body.get(name) for name in _IN_HEADERS}
    headers |= {"retries": body.get("retries", 0), "timelimit": body.get("timelimit", (None, None))}
    return _embedded(body), {**headers, **(message.headers or {})}, True, body.get("utc", True)


def proto1_to_proto2(message: Any, body: dict[str, Any]) -> Read:
    """The same; the body becomes the headers. Raises: InvalidTaskError."""
    embedded = _embedded(body)
    body.update(argsrepr=saferepr(embedded[0]), kwargsrepr=saferepr(embedded[1]), headers=message.headers)
    if "taskset" in body:
        body["group"] = body["taskset"]
    return embedded, body, True, body.get("utc", True)


def _embedded(body: Any) -> tuple[object, object, dict[str, object]]:
    if not isinstance(body, Mapping):
        raise InvalidTaskError("Message does not have args/kwargs")
    kwargs = body.get("kwargs", {})
    if not isinstance(kwargs, Mapping):
        raise InvalidTaskError("Task keyword arguments must be a mapping")
    embed = {name: body.get(name) for name in ("callbacks", "errbacks", "chord")} | {"chain": None}
    return body.get("args", ()), kwargs, embed

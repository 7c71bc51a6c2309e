"""Task messages: Celery's protocol v2, written and read; v1 read (celery/app/amqp.py, docs/internals/protocol)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any

from amqtask.exceptions import InvalidTaskError
from amqtask.message import Properties, strip_transit_headers
from amqtask.serialization import compress, decompress, dumps, loads

_REPR_LENGTH = 1024  # protocol: argsrepr and kwargsrepr hold 1024 characters at most
# When a message was published, Unix time in milliseconds; RabbitMQ writes this header too, when it is told to
# (https://www.rabbitmq.com/docs/message-interceptors).
PUBLISHED_AT = "timestamp_in_ms"
# Ours, on messages that carry the rest of a chain: which run of it this is. Results of steps that a worker went on with by
# itself bear it too, so that a redelivery can tell them from those of another run under the same ids.
RUN_HEADER = "amqtask-run"
_SMALL = (int, float, bool, type(None))
# JSON writes a signature as the dictionary that it is.
_WRITES_SIGNATURES = frozenset({"json", "application/json"})
_EMPTY_EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


@dataclass(slots=True)
class TaskCall:
    """One call of a task, before it is a message. `eta` and `expires` are aware datetimes; limits are seconds.

    `chain` is stored reversed: the next step is the last element. `headers` are the caller's own.
    """

    id: str
    task: str
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    eta: datetime | None = None
    expires: datetime | None = None
    expires_seconds: float | None = None
    retries: int = 0
    time_limit: float | None = None
    soft_time_limit: float | None = None
    group: str | None = None
    group_index: int | None = None
    root_id: str | None = None
    parent_id: str | None = None
    shadow: str | None = None
    origin: str | None = None
    ignore_result: bool | None = None
    reply_to: str = ""
    correlation_id: str | None = None
    priority: int = 0
    delivery_mode: int = 2
    replaced_task_nesting: int = 0
    stamped_headers: list[str] | None = None
    stamps: dict[str, Any] | None = None
    callbacks: list[Any] | None = None
    errbacks: list[Any] | None = None
    chain: list[Any] | None = None
    chord: Any = None
    headers: dict[str, Any] | None = None
    argsrepr: str | None = None
    kwargsrepr: str | None = None
    extra_properties: dict[str, Any] | None = None

    @property
    def embed(self) -> dict[str, Any]:
        """The third element of the body."""
        if not (self.callbacks or self.errbacks or self.chain or self.chord):
            return _EMPTY_EMBED
        return {
            "callbacks": self.callbacks or None,
            "errbacks": self.errbacks or None,
            "chain": self.chain or None,
            "chord": self.chord,
        }


def encode_task(
    call: TaskCall, *, serializer: str = "json", compression: str | None = None
) -> tuple[bytes, Properties]:
    """The body and properties of a protocol v2 message. Raises: EncodeError, ConfigurationError."""
    embed = call.embed
    if embed is not _EMPTY_EMBED and serializer not in _WRITES_SIGNATURES:
        embed = plain(embed)
    body, content_type, content_encoding = dumps((tuple(call.args), call.kwargs, embed), serializer)
    headers = task_headers(call)
    if compression:
        body, headers["compression"] = compress(body, compression)
    properties = Properties(
        content_type=content_type,
        content_encoding=content_encoding,
        headers=headers,
        delivery_mode=call.delivery_mode,
        priority=call.priority,
        correlation_id=call.correlation_id or call.id,
        reply_to=call.reply_to,
        expiration=_expiration(call.expires_seconds),
    )
    for name, value in (call.extra_properties or {}).items():
        setattr(properties, name, value)
    return body, properties


def plain(value: Any) -> Any:
    """Signatures as the plain dictionaries that every serializer writes, and every worker reads."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else value
    return value


def task_headers(call: TaskCall) -> dict[str, Any]:
    """The application headers, in the order in which Celery writes them."""
    headers: dict[str, Any] = {
        "lang": "py",
        "task": call.task,
        "id": call.id,
        "shadow": call.shadow,
        "eta": call.eta.isoformat() if call.eta is not None else None,
        "expires": call.expires.isoformat() if call.expires is not None else None,
        "group": call.group,
        "group_index": call.group_index,
        "retries": call.retries,
        # [hard, soft]; the protocol page of Celery's docs has it the other way round, the code decides
        "timelimit": [call.time_limit, call.soft_time_limit],
        "root_id": call.root_id or call.id,
        "parent_id": call.parent_id,
        "argsrepr": call.argsrepr if call.argsrepr is not None else saferepr(tuple(call.args)),
        "kwargsrepr": call.kwargsrepr if call.kwargsrepr is not None else saferepr(call.kwargs),
        "origin": call.origin or origin(),
        "ignore_result": call.ignore_result,
        "replaced_task_nesting": call.replaced_task_nesting,
        "stamped_headers": call.stamped_headers,
        "stamps": call.stamps or {},
    }
    if call.headers:
        headers.update(call.headers)
    return headers


def origin() -> str:
    """Who publishes: `gen<pid>@<host>`, Celery's anonymous node name."""
    return _origin(os.getpid())


@lru_cache(maxsize=1)
def _origin(pid: int) -> str:
    return f"gen{pid}@{os.uname().nodename}"


def _expiration(seconds: float | None) -> str | None:
    return None if seconds is None else str(max(0, int(seconds * 1000)))


def decode_body(
    body: bytes,
    content_type: str | None,
    content_encoding: str | None,
    headers: Mapping[str, Any],
    accept: frozenset[str],
) -> tuple[Any, Any, dict[str, Any]]:
    """The (args, kwargs, embed) of a protocol v2 body.

    Raises: ContentDisallowed, Undecodable, InvalidTaskError (it decodes, but to something else).
    """
    if headers.get("compression"):
        body = decompress(body, headers["compression"])
    found = loads(body, content_type, content_encoding, accept)
    try:
        args, kwargs, embed = found
    except (TypeError, ValueError):
        raise InvalidTaskError(
            f"the body is a {type(found).__name__}, not the [args, kwargs, embed] of a task message"
        ) from None
    return _checked(args, kwargs, {} if embed is None else embed)


def _checked(args: Any, kwargs: Any, embed: Any) -> tuple[Any, Any, dict[str, Any]]:
    if isinstance(args, (list, tuple)) and isinstance(kwargs, dict) and isinstance(embed, dict):
        return args, kwargs, embed
    kinds = ", ".join(type(part).__name__ for part in (args, kwargs, embed))
    raise InvalidTaskError(f"args, kwargs and embed of a task message are a list and two mappings, not {kinds}")


def read_v1(
    body: bytes, content_type: str | None, content_encoding: str | None, accept: frozenset[str]
) -> tuple[dict[str, Any], tuple[Any, Any, dict[str, Any]]]:
    """The v2 headers and the (args, kwargs, embed) of a protocol v1 message, which has everything in its body.

    Raises: ContentDisallowed, Undecodable, InvalidTaskError.
    """
    found = loads(body, content_type, content_encoding, accept)
    if not isinstance(found, dict) or not (isinstance(found.get("task"), str) and isinstance(found.get("id"), str)):
        raise InvalidTaskError("no task message: no `task` header (protocol v2), no mapping with `task` and `id` (v1)")
    timelimit = found.get("timelimit") or (None, None)
    headers = {
        "lang": "py",
        "task": found["task"],
        "id": found["id"],
        "shadow": None,
        "eta": found.get("eta"),
        "expires": found.get("expires"),
        "group": found.get("group") or found.get("taskset"),
        "group_index": found.get("group_index"),
        "retries": found.get("retries") or 0,
        "timelimit": list(timelimit),
        "root_id": found["id"],
        "parent_id": None,
        "origin": None,
        "ignore_result": None,
    }
    embed = {name: found.get(name) for name in ("callbacks", "errbacks", "chain", "chord")}
    return headers, _checked(found.get("args") or [], found.get("kwargs") or {}, embed)


def strip_death_headers(headers: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without what the broker wrote about earlier deaths, deliveries and delays; for every republish."""
    return strip_transit_headers(headers)


def saferepr(value: Any, limit: int = _REPR_LENGTH) -> str:
    """A repr of at most `limit` characters that never raises and does not format megabytes first."""
    kind = type(value)
    if kind in _SMALL:
        return repr(value)
    if kind is str or kind is bytes:
        return repr(value) if len(value) <= limit else _cut(repr(value[:limit]), limit)
    if kind is tuple or kind is list or kind is dict:
        return _cut(_container(value, limit, 3), limit)
    try:
        return _cut(repr(value), limit)
    except Exception as error:  # noqa: BLE001 - a user's __repr__; what it raised is in the text
        return f"<{kind.__name__}: repr() raised {type(error).__name__}>"


def _container(value: Any, limit: int, depth: int) -> str:
    kind = type(value)
    if kind not in (tuple, list, dict):
        return saferepr(value, limit)
    if depth == 0:
        return {"tuple": "(...)", "list": "[...]", "dict": "{...}"}[kind.__name__] if value else repr(value)
    parts: list[str] = []
    room = limit
    for item in value.items() if kind is dict else value:
        if room <= 0:
            parts.append("...")
            break
        text = (
            f"{_container(item[0], room, depth - 1)}: {_container(item[1], room, depth - 1)}"
            if kind is dict
            else _container(item, room, depth - 1)
        )
        parts.append(text)
        room -= len(text) + 2
    inner = ", ".join(parts)
    if kind is dict:
        return f"{{{inner}}}"
    if kind is list:
        return f"[{inner}]"
    return f"({inner},)" if len(value) == 1 else f"({inner})"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."

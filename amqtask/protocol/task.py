"""Task messages: Celery's protocol v2, written and read; v1 read (celery/app/amqp.py, docs/internals/protocol)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import InvalidTaskError
from amqtask.ground.printable import described, printable, with_article
from amqtask.protocol.compression import compress, decompress
from amqtask.protocol.message import Properties, strip_transit_headers
from amqtask.protocol.serialization import (
    JSON,
    LARGEST_BODY,
    MSGPACK,
    PICKLE,
    check_size,
    dumps,
    is_own,
    is_private,
    loads,
)

if TYPE_CHECKING:
    from amqtask.ground.shapes import (
        HeaderDict,
        Headers,
        JsonFields,
        JsonObject,
        Keywords,
        SignatureFields,
        StampDict,
        TaskBody,
    )

_REPR_LENGTH = 1024  # protocol: argsrepr and kwargsrepr hold 1024 characters at most
# When a message was published, Unix time in milliseconds; RabbitMQ adds this header too, when it is configured to
# (https://www.rabbitmq.com/docs/message-interceptors).
PUBLISHED_AT = "timestamp_in_ms"
# Our header on messages that carry the rest of a chain: an id of this run of the chain. Results of steps that a worker ran
# without a message have it too, so that a redelivery can tell them from results of another run with the same ids.
RUN_HEADER = "amqtask-run"
# The header with the name of the periodic task that a message is a run of (django_celery_beat/schedulers.py).
PERIODIC = "periodic_task_name"
# Headers that encode_task writes itself; the others of a message are its caller's own, or a broker's, a delay's and a worker's.
PROTOCOL_HEADERS = frozenset(
    {
        "lang", "task", "id", "shadow", "eta", "expires", "group", "group_index", "retries", "timelimit", "root_id",
        "parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result", "replaced_task_nesting", "stamped_headers",
        "stamps", "compression", PUBLISHED_AT,
    }
)  # fmt: skip
_OUR_HEADERS = ("amqtask-", "x-amqtask-")
# JSON writes a signature as the dictionary that it is.
_WRITES_SIGNATURES = frozenset({"json", "application/json"})
_SMALL = (float, bool, type(None))
_LONG_NUMBER = 10_000
# Characters of a task's id, which is also the correlation id, an AMQP short string.
LONGEST_ID = 255
_LONGEST_NAME, _LONGEST_TIME = 1000, 100
# A limit of so many seconds (31 years) or more is none; timers take no more than some centuries.
_ENDLESS = 1e9
# The largest body, in bytes, that is decoded on a worker's I/O loop; YAML is slow. To unpack one takes longer by this factor.
_LIGHT = {JSON: 4 * 1024 * 1024, MSGPACK: 4 * 1024 * 1024, PICKLE: 4 * 1024 * 1024}
_LIGHT_ELSE = 64 * 1024
_UNPACKING = 8
# The headers that the worker works with are of these types, or absent.
_TEXT_HEADERS = ("group", "root_id", "parent_id", "shadow", "x-amqtask-chord", RUN_HEADER)
_NUMBER_HEADERS = ("retries", "group_index", "replaced_task_nesting")
_usual_headers = itemgetter(
    "root_id", "parent_id", "group", "group_index", "shadow", "retries", "replaced_task_nesting", "stamped_headers"
)
_TEXT_TYPES, _NUMBER_TYPES = frozenset({type(None), str}), frozenset({type(None), int})
NO_FOLLOW_UPS = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


@dataclass(slots=True, eq=False)
class TaskCall:
    """One call of a task, before it is a message. `eta` and `expires` are aware datetimes; limits are seconds.

    `expires` is in the headers only: a worker that gets an expired task stores REVOKED, which the broker's expiry would not.
    `chain` is stored reversed: the next step is the last element. `headers` are the caller's own.
    """

    id: str
    task: str
    args: Sequence[object] = ()
    kwargs: Keywords = field(default_factory=dict)
    eta: datetime | None = None
    expires: datetime | None = None
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
    stamps: StampDict | None = None
    callbacks: list[SignatureFields] | None = None
    errbacks: list[SignatureFields] | None = None
    chain: list[SignatureFields] | None = None
    chord: SignatureFields | None = None
    headers: HeaderDict | None = None
    argsrepr: str | None = None
    kwargsrepr: str | None = None
    extra_properties: dict[str, object] | None = None

    @property
    def embed(self) -> JsonObject:
        """The third element of the body."""
        if not (self.callbacks or self.errbacks or self.chain or self.chord):
            return NO_FOLLOW_UPS
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
    if embed is not NO_FOLLOW_UPS and serializer not in _WRITES_SIGNATURES:
        embed = plain(embed)
    is_hidden = is_private(serializer)
    headers = task_headers(call, is_hidden=is_hidden)
    body, content_type, content_encoding = dumps((tuple(call.args), call.kwargs, embed), serializer, headers)
    if compression and not is_hidden:  # what is encrypted has no pattern to compress
        body, headers["compression"] = compress(body, compression)
    properties = Properties(
        content_type=content_type,
        content_encoding=content_encoding,
        headers=headers,
        delivery_mode=call.delivery_mode,
        priority=call.priority,
        correlation_id=call.correlation_id or call.id,
        reply_to=call.reply_to,
    )
    for name, value in (call.extra_properties or {}).items():
        setattr(properties, name, value)
    return body, properties


def plain(value: object) -> Any:
    """Signatures as the plain dictionaries that every serializer writes, and every worker reads."""
    if isinstance(value, Mapping):
        return {key: plain(element) for key, element in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else value
    return value


def task_headers(call: TaskCall, *, is_hidden: bool = False) -> HeaderDict:
    """The application headers, in the order in which Celery writes them; `is_hidden`: without the text of the arguments."""
    if is_hidden:
        args_repr, kwargs_repr = call.argsrepr, call.kwargsrepr
    else:
        args_repr = call.argsrepr if call.argsrepr is not None else saferepr(tuple(call.args))
        kwargs_repr = call.kwargsrepr if call.kwargsrepr is not None else saferepr(call.kwargs)
    headers: HeaderDict = {
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
        "argsrepr": args_repr,
        "kwargsrepr": kwargs_repr,
        "origin": call.origin or origin(),
        "ignore_result": call.ignore_result,
        "replaced_task_nesting": call.replaced_task_nesting,
        "stamped_headers": call.stamped_headers,
        "stamps": call.stamps or {},
    }
    if call.headers:
        headers.update(call.headers)
    return headers


def callers_headers(headers: Headers) -> HeaderDict:
    """The headers that a call was given. Some libraries write theirs, and the call's, once more in a header `headers`."""
    call_headers = {
        name: value
        for name, value in strip_transit_headers(headers).items()
        if name not in PROTOCOL_HEADERS and not name.startswith(_OUR_HEADERS)
    }
    nested = call_headers.pop("headers", None)
    return {**call_headers, **nested} if isinstance(nested, Mapping) else call_headers


def origin() -> str:
    """The publishing process as `gen<pid>@<host>`, Celery's anonymous node name."""
    return _origin(os.getpid())


@lru_cache(maxsize=1)
def _origin(pid: int) -> str:
    return f"gen{pid}@{os.uname().nodename}"


def decode_body(
    body: bytes,
    content_type: str | None,
    content_encoding: str | None,
    headers: Headers,
    accept: frozenset[str],
    limit: int = LARGEST_BODY,
) -> TaskBody:
    """The (args, kwargs, embed) of a body of protocol v2 or v1, which may have `limit` bytes; embed is NO_FOLLOW_UPS where it
    has none.

    Raises: ContentDisallowed, Undecodable, InvalidTaskError (it decodes, but to something else, or its headers do).
    """
    _check_headers(headers)
    compression = headers.get("compression")
    if compression or len(body) > limit:
        body = _unpacked(body, compression, limit)
    decoded = loads(body, content_type, content_encoding, accept, headers)
    if decoded.__class__ is dict and "task" in decoded and "id" in decoded:
        embed = {name: decoded.get(name) for name in NO_FOLLOW_UPS}
        return _checked(decoded.get("args") or [], decoded.get("kwargs") or {}, embed)
    try:
        args, kwargs, embed = decoded
    except (TypeError, ValueError):
        raise InvalidTaskError(
            f"the body is {described(decoded)}, not the [args, kwargs, embed] of a task message"
        ) from None
    return _checked(args, kwargs, {} if embed is None else embed)


def _unpacked(body: bytes, compression: object, limit: int) -> bytes:
    if compression:
        return decompress(body, compression, limit)
    check_size(body, limit)
    return body


def _check_headers(headers: Headers) -> None:
    """Written out for the headers that nearly all messages have: this runs for every message."""
    try:
        root_id, parent_id, group, group_index, shadow, retries, nesting, stamped = _usual_headers(headers)
    except KeyError:
        _check_each_header(headers)
        return
    if not (
        root_id.__class__ is str
        and (parent_id is None or parent_id.__class__ is str)
        and (group is None or group.__class__ is str)
        and (group_index is None or (group_index.__class__ is int and group_index >= 0))
        and shadow is None
        and retries.__class__ is nesting.__class__ is int
        and retries >= 0 <= nesting
        and not stamped
        and "x-amqtask-chord" not in headers
        and RUN_HEADER not in headers
    ):
        _check_each_header(headers)


def _check_each_header(headers: Headers) -> None:
    get = headers.get
    if not _TEXT_TYPES.issuperset(map(type, map(get, _TEXT_HEADERS))):
        raise _wrong_type(headers, _TEXT_HEADERS, str)
    numbers = [*map(get, _NUMBER_HEADERS)]
    if not _NUMBER_TYPES.issuperset(map(type, numbers)) or (any(numbers) and min(filter(None, numbers)) < 0):
        raise _wrong_type(headers, _NUMBER_HEADERS, int)
    if get("stamped_headers"):
        _check_stamps(headers)


def _wrong_type(headers: Headers, names: Sequence[str], expected_type: type) -> InvalidTaskError:
    wrong = next(
        (name for name in names if headers.get(name) is not None and headers[name].__class__ is not expected_type), None
    )
    if wrong is None:
        return InvalidTaskError(f"a header of the message is below 0: {', '.join(names)}")
    return InvalidTaskError(
        f"the header `{wrong}` is {described(headers[wrong])}, not {with_article(expected_type.__name__)}"
    )


def _check_stamps(headers: Headers) -> None:
    names = headers["stamped_headers"]
    if not (isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)):
        raise InvalidTaskError("the header `stamped_headers` is not a list of names")
    if not isinstance(headers.get("stamps") or {}, dict):
        raise InvalidTaskError("the header `stamps` is not a mapping")


def light_limit(content_type: str | None, compression: object = None) -> int:
    """The largest body, in bytes, that may be unpacked and decoded on a worker's I/O loop."""
    limit = _LIGHT.get(content_type or JSON, _LIGHT_ELSE)
    return limit // _UNPACKING if compression else limit


def checked_id(task_id: object) -> str:
    """A task's id as it may stand in logs, keys and properties. Raises: InvalidTaskError."""
    if task_id.__class__ is int:
        task_id = saferepr(task_id)
    if not isinstance(task_id, str):
        raise InvalidTaskError(f"the id of the task is {described(task_id)}, not a text")
    if len(task_id) > LONGEST_ID or not task_id.isprintable():
        raise InvalidTaskError(
            f"the id of the task is not a line of at most {LONGEST_ID} characters: {printable(task_id, 60)}"
        )
    return task_id


def _checked(args: object, kwargs: object, embed: object) -> TaskBody:
    if isinstance(args, (list, tuple)) and isinstance(kwargs, dict) and isinstance(embed, dict):
        if not any(embed.values()):
            return args, kwargs, NO_FOLLOW_UPS
        try:
            _check_embed(embed)
        except RecursionError:
            raise InvalidTaskError("the follow-ups of the task are nested too deep") from None
        return args, kwargs, embed
    kinds = ", ".join(type(part).__name__ for part in (args, kwargs, embed))
    raise InvalidTaskError(f"args, kwargs and embed of a task message are a list and two mappings, not {kinds}")


def _check_embed(embed: JsonFields) -> None:
    for name in ("callbacks", "errbacks"):
        signatures = embed.get(name)
        if signatures and not (isinstance(signatures, (list, tuple)) and all(map(is_signature, signatures))):
            raise InvalidTaskError(f"`{name}` of the message is not a list of signatures")
    chain = embed.get("chain")
    # Each message of a long chain carries all later steps: only the next step (the last element) is checked now.
    if chain and not (isinstance(chain, (list, tuple)) and is_signature(chain[-1])):
        raise InvalidTaskError("`chain` of the message is not a list of signatures")
    if embed.get("chord") and not is_signature(embed["chord"]):
        raise InvalidTaskError("`chord` of the message is not a signature")


_LISTS_IN_OPTIONS = ("chain", "link_error")
_NAMES_IN_OPTIONS = ("task_id", "root_id", "parent_id", "group_id", "reply_to")
# An instance of dict costs no look at the abstract class.
MAPPING = (dict, Mapping)


def is_signature(candidate: object) -> bool:
    """Whether it looks like a signature that can be published; its parts are checked when they are published."""
    if not isinstance(candidate, MAPPING):
        return False
    get = candidate.get
    task, args, kwargs, options = get("task"), get("args") or (), get("kwargs") or {}, get("options") or {}
    if not (isinstance(task, str) and isinstance(args, (list, tuple)) and isinstance(kwargs, MAPPING)):
        return False
    if not isinstance(options, MAPPING) or (options and not _are_options(options)):
        return False
    match task:
        case "celery.chain" | "celery.group":
            tasks = kwargs.get("tasks") or ()
            return isinstance(tasks, (list, tuple)) and all(map(is_signature, tasks))
        case "celery.chord":
            return not kwargs.get("body") or is_signature(kwargs["body"])
    return True


def _are_options(options: Mapping[str, Any]) -> bool:
    get = options.get
    for name in _LISTS_IN_OPTIONS:
        value = get(name)
        if value and not isinstance(value, (list, tuple, *MAPPING)):
            return False
    for name in _NAMES_IN_OPTIONS:
        value = get(name)
        if value is not None and value.__class__ is not str and isinstance(value, (list, tuple, set, *MAPPING)):
            return False
    chord = get("chord")
    return not chord or isinstance(chord, MAPPING)


def read_v1(
    body: bytes,
    content_type: str | None,
    content_encoding: str | None,
    accept: frozenset[str],
    *,
    compression: object = None,
) -> HeaderDict:
    """The v2 headers of a protocol v1 message, which has everything in its body (`decode_body` reads the rest of it).

    Raises: ContentDisallowed, Undecodable, InvalidTaskError.
    """
    limit = light_limit(content_type, compression)
    if not compression and len(body) > limit:
        raise InvalidTaskError(
            f"no `task` header (protocol v2), and {len(body)} bytes: as a protocol v1 message {limit} at most are read"
        )
    decoded = loads(_unpacked(body, compression, limit), content_type, content_encoding, accept)
    if not isinstance(decoded, dict) or not (
        isinstance(decoded.get("task"), str) and isinstance(decoded.get("id"), str)
    ):
        raise InvalidTaskError("no task message: no `task` header (protocol v2), no mapping with `task` and `id` (v1)")
    if len(decoded["task"]) > _LONGEST_NAME:
        raise InvalidTaskError(f"the name of the task has {len(decoded['task'])} characters")
    for name in ("eta", "expires"):
        if not isinstance(decoded.get(name) or "", str) or len(decoded.get(name) or "") > _LONGEST_TIME:
            raise InvalidTaskError(f"`{name}` is no ISO 8601 time: {printable(saferepr(decoded[name], 200))}")
    timelimit = decoded.get("timelimit")
    headers = {
        "lang": "py",
        "task": decoded["task"],
        "id": checked_id(decoded["id"]),
        "shadow": None,
        "eta": decoded.get("eta"),
        "expires": decoded.get("expires"),
        "group": decoded.get("group") or decoded.get("taskset"),
        "group_index": decoded.get("group_index"),
        "retries": decoded.get("retries") or 0,
        "timelimit": timelimit if isinstance(timelimit, (list, tuple)) and len(timelimit) == 2 else [None, None],
        "root_id": decoded["id"],
        "parent_id": None,
        "origin": None,
        "ignore_result": None,
        "compression": compression or None,
    }
    _check_headers(headers)
    return headers


def limits_in(headers: Headers) -> tuple[float | None, float | None]:
    """The message's own (hard, soft) time limit."""
    limits = headers.get("timelimit")
    if not isinstance(limits, (list, tuple)) or len(limits) != 2:
        return None, None
    hard, soft = limits
    return as_limit(hard), as_limit(soft)


def as_limit(seconds: object) -> float | None:
    """A time limit as pools get it: a finite number above 0, or None for no limit (0, and values that are no number)."""
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool):
        return None
    # A NaN compares as false.
    return seconds if 0 < seconds < _ENDLESS else None


def timestamp(value: str | datetime) -> float:
    """Unix time of an ISO 8601 text; without an offset it is UTC."""
    # Python 3.10's fromisoformat does not know "Z".
    moment = value if isinstance(value, datetime) else datetime.fromisoformat(value.replace("Z", "+00:00"))
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return moment.timestamp()


def saferepr(value: Any, limit: int = _REPR_LENGTH) -> str:
    """A repr of at most `limit` characters that never raises and does not format megabytes first."""
    value_type = type(value)
    if value_type in _SMALL:
        return repr(value)
    if value_type is int:
        # Python refuses to format a number of more than some thousand digits.
        return _cut(repr(value), limit) if value.bit_length() < _LONG_NUMBER else f"<int of {value.bit_length()} bits>"
    if value_type is str or value_type is bytes:
        return repr(value) if len(value) <= limit else _cut(repr(value[:limit]), limit)
    if value_type is tuple or value_type is list or value_type is dict:
        return _cut(_container(value, limit, 3), limit)
    try:
        return _cut(repr(value), limit)
    except Exception as error:  # a user's __repr__; its error is in the text
        if not is_own(error, lambda: repr(value)):
            raise
        return f"<{value_type.__name__}: repr() raised {type(error).__name__}>"


def _container(value: Any, limit: int, depth: int) -> str:
    value_type = type(value)
    if value_type not in (tuple, list, dict):
        return saferepr(value, limit)
    if depth == 0:
        return {"tuple": "(...)", "list": "[...]", "dict": "{...}"}[value_type.__name__] if value else repr(value)
    parts: list[str] = []
    room = limit
    for element in value.items() if value_type is dict else value:
        if room <= 0:
            parts.append("...")
            break
        text = (
            f"{_container(element[0], room, depth - 1)}: {_container(element[1], room, depth - 1)}"
            if value_type is dict
            else _container(element, room, depth - 1)
        )
        parts.append(text)
        room -= len(text) + 2
    inner = ", ".join(parts)
    if value_type is dict:
        return f"{{{inner}}}"
    if value_type is list:
        return f"[{inner}]"
    return f"({inner},)" if len(value) == 1 else f"({inner})"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."

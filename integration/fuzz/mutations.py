"""Task messages made from recorded ones (Celery's, protocol v2 and v1, and our own), each wrong in one to four places."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import msgpack
import yaml

from amqtask.protocol.task import TaskCall, encode_task
from integration.fuzz import values
from integration.fuzz.amqp import ROOM, Pairs, RawMessage, encode_properties
from integration.fuzz.chance import Chance
from tests.protocol.recordings import names, recorded

QUEUE, NODE, GROUP = "fuzzed", "fuzz@fuzz", "fuzz-group"
TASKS = ("recorded.add", "recorded.echo", "recorded.early", "recorded.fail", "recorded.again", "recorded.coroutine")
HEADERS = (
    "lang", "task", "id", "shadow", "eta", "expires", "group", "group_index", "retries", "timelimit", "root_id", "parent_id",
    "argsrepr", "kwargsrepr", "origin", "ignore_result", "replaced_task_nesting", "stamped_headers", "stamps", "compression",
    "meth", "clock", "timestamp_in_ms", "traceparent", "amqtask-run", "x-amqtask-chord", "x-amqtask-reason", "x-amqtask-attempts",
    "x-delivery-count", "x-death", "x-first-death-queue", "periodic_task_name", "amqtask-delay-to", "amqtask-delay-0",
    "amqtask-delay-5", "amqtask-delay-priority", "amqtask-delay-until", "headers", "delivery_info", "more", "tenant",
)  # fmt: skip
# What a header's own meaning makes dangerous.
SPECIFIC: dict[str, tuple[Any, ...]] = {
    "task": ("recorded.ad", "recorded.add ", "celery.chord", "celery.group", "celery.chain", "celery.map"),
    "eta": values.MOMENTS,
    "expires": (*values.MOMENTS, "2026-01-01T00:00:00", 1, -1.5, 1e300),
    "timelimit": (
        [-5, -5], [0, 0], [1e300, 1e300], [5e-324, None], [None, 0.001], ["x", "y"], [1], [1, 2, 3], [True, True], [[], {}],
        [2**63 - 1, -(2**63)], {}, "12", [0.01, 0.02], [1e9, 1e9],
    ),
    "retries": (-1, 2**31, 2**63 - 1, 1.5, "3", [1], True),
    "stamped_headers": (["status"], ["task_id", "result"], ["stamps"], "status", [[]], [1, None], ["x"] * 2_000),
    "stamps": ({"status": "SUCCESS", "task_id": ["x"]}, {"result": 1}, [1], "x", {"method": "shutdown"}),
    "group": (GROUP, "", "x" * 255, "x" * 300, values.FORGED),
    "id": ("x" * 300, "x" * 20_000, values.FORGED, values.ESCAPES, ""),
    "x-death": ([{"count": "x", "queue": 5, "reason": []}], [5], [{}]),
    "x-delivery-count": (-1, 3, 10**9, "x", [1]),
    "amqtask-delay-to": ("", "no such", 5),
}  # fmt: skip
MAILBOXES = (
    f"{NODE}.celery.pidbox",
    "celery.pidbox",
    QUEUE,
    f"{QUEUE}.dead",
    "nobody",
    "amq.gen-x",
    "x" * 255,
    b"\xff\xfe",
    values.FORGED,
)
KEPT = ("content_type", "content_encoding", "delivery_mode", "priority")
V1 = tuple(name for name in names("task") if name.startswith("v1"))
V2 = tuple(name for name in names("task") if not name.startswith("v1"))
_DUMPS: dict[str, Callable[[Any], bytes]] = {
    "application/json": lambda value: json.dumps(value).encode(),
    "application/x-yaml": lambda value: yaml.safe_dump(value).encode("utf-8", "surrogatepass"),
    "application/x-msgpack": lambda value: bytes(msgpack.packb(value, unicode_errors="surrogatepass")),
}


@dataclass(slots=True)
class Draft:
    """A message that is being made. `body` is (args, kwargs, embed), a v1 mapping, or bytes; `headers` may repeat a name."""

    properties: dict[str, Any]
    headers: list[tuple[Any, Any]]
    body: Any
    done: list[str] = field(default_factory=list)

    def set(self, header: Any, value: Any) -> None:
        """In the place of the first of that name, or at the end."""
        for place, (name, _) in enumerate(self.headers):
            if name == header:
                self.headers[place] = (header, value)
                return
        self.headers.append((header, value))

    def message(self) -> RawMessage:
        """The message. Raises: ValueError where its headers do not fit a frame."""
        kind = self.properties.get("content_type")
        body = self.body if isinstance(self.body, bytes) else _dumped(self.body, kind)
        made = RawMessage({**self.properties, "headers": _table(self)}, body, "", QUEUE)
        made.frames()
        return made


def _dumped(body: Any, kind: Any) -> bytes:
    try:
        return _DUMPS.get(kind, _DUMPS["application/json"])(body)
    except (ValueError, OverflowError, TypeError, yaml.YAMLError):  # not each of them can say everything
        return _DUMPS["application/json"](body)


@lru_cache(maxsize=1)
def _sources() -> tuple[tuple[dict[str, Any], dict[str, Any], bytes], ...]:
    """(properties, headers, body): Celery's recordings, then our own messages."""
    found = [
        (dict(message.properties), dict(message.headers), message.body)
        for name in (*V2, *V1)
        for message in recorded("task", name)
    ]
    for task in TASKS:
        call = TaskCall(id="own", task=task, args=(1, 2), group=GROUP, group_index=1, origin="gen1@fuzz")
        body, properties = encode_task(call)
        found.append(({name: getattr(properties, name) for name in KEPT}, dict(properties.headers or {}), body))
    return tuple(found)


def task_draft(number: int, chance: Chance) -> Draft:
    """A recorded message that says in four places which one it is; not every mutation leaves all of them."""
    properties, headers, body = chance.choice(_sources())
    tag = f"fz-{number}"
    kept = {name: properties[name] for name in KEPT if properties.get(name) is not None}
    properties = {**kept, "correlation_id": tag, "message_id": tag, "reply_to": "nobody"}
    plain: Any = body
    if properties["content_type"] == "application/json" and "compression" not in headers:
        plain = json.loads(body)
    if isinstance(plain, dict):
        plain = {**plain, "id": tag, "eta": None, "expires": None}
        return Draft(properties, [("fuzz", tag)], plain)
    fields = {**headers, "id": tag, "fuzz": tag, "eta": None, "expires": None}
    if chance.one_in(5):
        fields["task"] = chance.choice(TASKS)
    return Draft(properties, list(fields.items()), plain)


# -- mutations: each does one thing to a draft


def _header(draft: Draft, chance: Chance) -> str:
    name = chance.choice(HEADERS)
    own = SPECIFIC.get(name)
    value = chance.choice(own) if own and chance.one_in(2) else chance.field()
    draft.set(name, value)
    return f"header {name}"


def _lost_header(draft: Draft, chance: Chance) -> str:
    name = chance.choice(("task", "id", "retries", "timelimit", "lang", "root_id", "argsrepr"))
    draft.headers = [found for found in draft.headers if found[0] != name]
    return f"without {name}"


def _twice(draft: Draft, chance: Chance) -> str:
    draft.headers.append((chance.choice(HEADERS), chance.field()))
    return "a header twice"


def _named(draft: Draft, chance: Chance) -> str:
    name = chance.choice((b"\xff\xfe", b"", b"x" * 255, b"\x1b[2J", b"\xed\xa0\x80", b"task\0", "ＴＡＳＫ".encode()))
    draft.headers.append((name, chance.field()))
    return "an odd header name"


def _filled(draft: Draft, chance: Chance) -> str:
    """Headers that leave no room in their frame: with one more they do not fit."""
    left = ROOM - 12 - len(encode_properties({**draft.properties, "headers": _table(draft)}))
    draft.headers.append(("padding", "x" * max(0, left - 13 - chance.choice((0, 1, 20, 200, 2_000)))))
    return "a full frame of headers"


def _table(draft: Draft) -> Pairs:
    return Pairs((name.encode() if isinstance(name, str) else name, value) for name, value in draft.headers)


def _property(draft: Draft, chance: Chance) -> str:
    name, found = chance.choice(
            (
                ("content_type", values.CONTENT_TYPES), ("content_encoding", values.ENCODINGS), ("reply_to", MAILBOXES),
                ("correlation_id", (b"\xff\xfe", "", "x" * 255, values.FORGED)), ("priority", (0, 1, 9, 10, 255)),
                ("delivery_mode", (1, 2)), ("timestamp", (0, 2**63, 2**64 - 1, 253_402_300_800)),
                ("type", ("x" * 255, b"\xff")), ("app_id", ("x" * 255, b"\xff", values.ESCAPES)), ("cluster_id", (b"\xff",)),
            )
        )  # fmt: skip
    draft.properties[name] = chance.choice(found)
    return f"property {name}"


def _no_property(draft: Draft, chance: Chance) -> str:
    name = chance.choice(
        ("content_type", "content_encoding", "correlation_id", "reply_to", "priority", "delivery_mode")
    )
    draft.properties.pop(name, None)
    return f"without property {name}"


def _compressed(draft: Draft, chance: Chance) -> str:
    draft.set("compression", chance.choice(values.COMPRESSIONS))
    return "compression"


def _bomb(draft: Draft, chance: Chance) -> str:
    method = chance.choice(("application/x-gzip", "application/x-bz2", "application/x-lzma"))
    size = chance.choice((1, 1, 8, 8, 64, 300))
    draft.set("compression", method)
    draft.body = values.bomb(method, size)
    draft.properties["content_type"] = "application/json"
    if chance.one_in(3):
        draft.set("task", "recorded.unknown")
    return f"bomb of {size} MB"


def _raw_body(draft: Draft, chance: Chance) -> str:
    draft.body = chance.choice(values.RAW_BODIES)
    if chance.one_in(3):
        draft.properties["content_type"] = chance.choice(values.CONTENT_TYPES[1:6])
    return "raw body"


def _broken_body(draft: Draft, chance: Chance) -> str:
    """Bytes changed, cut off or put in."""
    body = bytearray(draft.body if isinstance(draft.body, bytes) else _dumped(draft.body, "application/json"))
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(body) + 1)
        match chance.randrange(3):
            case 0:
                del body[at : at + chance.randint(1, 40)]
            case 1:
                body[at:at] = chance.randbytes(chance.randint(1, 6))
            case _:
                body[at : at + 1] = chance.randbytes(1)
    draft.body = bytes(body)
    return "broken body"


def _argument(draft: Draft, chance: Chance) -> str:
    value = chance.json()
    if isinstance(draft.body, dict):
        name = chance.choice(
            (
                "task",
                "id",
                "args",
                "kwargs",
                "retries",
                "eta",
                "expires",
                "timelimit",
                "taskset",
                "chord",
                "callbacks",
                "group",
            )
        )
        draft.body[name] = value
        return f"v1 {name}"
    if not isinstance(draft.body, list):
        return "nothing"
    place = chance.choice(("arg", "args", "kwarg", "kwargs", "self", "embed"))
    args, kwargs, embed = draft.body
    match place:
        case "arg":
            args = [value]
        case "args":
            args = value
        case "kwarg":
            kwargs = {chance.choice(("x", "", "\x1b", "0")): value}
        case "kwargs":
            kwargs = value
        case "self":
            kwargs = {"self": value}
        case _:
            embed = value
    draft.body = [args, kwargs, embed]
    return place


def _follow_up(draft: Draft, chance: Chance) -> str:
    kind = chance.choice(("callbacks", "errbacks", "chain", "chord"))
    several = kind != "chord"
    if chance.one_in(4):
        value = chance.json()
    else:
        one = signature(chance)
        count = chance.choice((1, 1, 1, 2, 30))
        value = [one] * count if several else one
    if kind == "chord":
        draft.set("group", GROUP)
        if isinstance(value, dict):
            value["chord_size"] = chance.json() if chance.one_in(3) else chance.choice((0, -1, 1, 2, 10**9, 2**70, 1.5))
    if isinstance(draft.body, dict):
        draft.body["chord" if kind == "chord" else "callbacks" if kind == "callbacks" else "errbacks"] = value
    elif isinstance(draft.body, list):
        args, kwargs, embed = draft.body
        draft.body = [args, kwargs, {**(embed if isinstance(embed, dict) else {}), kind: value}]
    return kind


def signature(chance: Chance, depth: int = 2) -> dict[str, Any]:
    """A call that is to follow, wrong in some option."""
    options: dict[str, Any] = {"task_id": "id-2"}
    for name in chance.some(tuple(OPTIONS), 2):
        own = OPTIONS[name]
        options[name] = chance.choice(own) if not chance.one_in(4) else chance.json()
    if depth and chance.one_in(5):
        options[chance.choice(("link", "link_error", "chord"))] = signature(chance, depth - 1)
    found: dict[str, Any] = {
        "task": chance.choice(("recorded.echo", "recorded.add", "recorded.nobody", "elsewhere.task")),
        "args": [], "kwargs": {}, "options": options, "subtask_type": None, "immutable": True,
    }  # fmt: skip
    if depth and chance.one_in(4):
        kind = chance.choice(("chain", "group", "chord", "map", "chunks"))
        inner = (
            chance.json() if chance.one_in(3) else [signature(chance, depth - 1) for _ in range(chance.randint(0, 2))]
        )
        found |= {
            "task": f"celery.{kind}",
            "subtask_type": kind,
            "kwargs": {"tasks": inner, "header": inner, "body": found},
        }
    if chance.one_in(6):
        found[chance.choice(tuple(found))] = chance.json()
    return found


OPTIONS: dict[str, tuple[Any, ...]] = {
    "queue": ("fuzz-side", "", "x" * 255, "x" * 256, "amq.mine", "a\nb", 5),
    "exchange": ("no such", "amq.fanout", "amq.headers", "x" * 256, "celery.pidbox"),
    "routing_key": ("x" * 256, "x" * 255, "", 5, f"{NODE}.celery.pidbox"),
    "priority": (300, -1, 255, "x", 1.5),
    "countdown": (0.2, -1, 1e300, 2**40, "x", float("nan"), float("inf")),
    "eta": values.MOMENTS,
    "expires": (*values.MOMENTS, 0, -1, 1e300, float("nan")),
    "headers": ({"x": float("nan")}, {"x": "x" * 140_000}, {"x" * 300: 1}, {"x": 2**70}, [1], "x", {"": {"": []}}),
    "task_id": ("x" * 300, values.FORGED, 5, None, []),
    "reply_to": (f"{NODE}.celery.pidbox", QUEUE, "x" * 256, 5),
    "serializer": ("no such", "pickle", "yaml", 5),
    "compression": ("no such", "gzip", 5),
    "time_limit": (-1, 0, 1e300, "x", float("nan")),
    "group_id": (GROUP, 5, "x" * 300),
    "chord": ({"task": "recorded.add"}, 5, []),
    "delivery_mode": (0, 3, 300, "x"),
    "stamped_headers": (["status"], "x", [1]),
    "expiration": ("x", -1, 5, 1e300),
    "correlation_id": ("x" * 256, 5),
    "user_id": ("somebody else", "guest"),
    "retries": (-1, "x", 2**70),
    "declare": ([1], "x"),
    "ignore_result": ("x", True, None),
}  # fmt: skip

MUTATIONS: tuple[Callable[[Draft, Chance], str], ...] = (
    _header, _header, _header, _header, _header, _lost_header, _twice, _named, _property, _property, _no_property, _compressed,
    _raw_body, _broken_body, _argument, _argument, _follow_up, _follow_up, _follow_up,
)  # fmt: skip
# Those that cost the worker most, or that must come last.
RARE: tuple[Callable[[Draft, Chance], str], ...] = (_bomb, _filled)


def mutate(draft: Draft, chance: Chance) -> None:
    """One to four of them."""
    for mutation in chance.choices(MUTATIONS, k=chance.randint(1, 4)):
        draft.done.append(mutation(draft, chance))
    if chance.one_in(60):
        draft.done.append(chance.choice(RARE)(draft, chance))

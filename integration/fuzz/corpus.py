"""The messages of one run: a seed says which. Most are task messages; the others go to the worker's other doors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from integration.fuzz import values
from integration.fuzz.amqp import Field, RawMessage
from integration.fuzz.chance import Chance
from integration.fuzz.mutations import GROUP, QUEUE, mutate, task_draft
from tests.protocol.recordings import names, recorded

CHORDS = f"amqtask.chord.{GROUP}"
RESULTS = tuple(name for name in names("result") if name.startswith(("rpc", "pickle", "extended")))
QUESTIONS = (
    "ping", "report", "stats", "active", "scheduled", "reserved", "revoked", "registered", "query_task", "conf", "active_queues",
    "clock", "hello", "memsample", "memdump", "objgraph", "heartbeat", "no such", "",
)  # fmt: skip
# With garbage only: with good arguments they do what an operator asks for, and that is another test's business.
ORDERS = (
    "revoke", "terminate", "revoke_by_stamped_headers", "rate_limit", "time_limit", "add_consumer", "cancel_consumer", "election",
    "autoscale", "enable_events", "pool_restart",
)  # fmt: skip
ARGUMENTS = (
    "task_id", "task_name", "n", "min", "max", "signal", "soft", "hard", "rate_limit", "queue", "exchange", "exchange_type",
    "routing_key", "headers", "terminate", "destination", "num", "type", "ids", "args", "id", "topic", "action", "modules",
    "from_node", "revoked", "samples", "with_defaults", "taskinfoitems", "reply",
)  # fmt: skip
GARBAGE: tuple[Any, ...] = (
    None, "", "x", -1, 1.5, math.nan, math.inf, 1e300, [], {}, [[]], {"a": {}}, "x" * 300, "x" * 60_000, values.FORGED,
    values.ESCAPES, [None], {"": None}, "(a+)+$", "\ud800", [5, "x"], True,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Hostile:
    """One message. `ends`: it goes to the work queue, so that it must end in one place; `alone`: the broker may refuse it."""

    number: int
    kind: str
    raw: RawMessage
    ends: bool = True
    alone: bool = False

    def __str__(self) -> str:
        shown = {name: _shortened(value) for name, value in self.raw.properties.items() if name != "headers"}
        table = self.raw.properties.get("headers", {})
        headers = [(name, _shortened(value)) for name, value in (table.items() if isinstance(table, dict) else table)]
        where = f"{self.raw.exchange}/{self.raw.routing_key}"
        return (
            f"{self.number} ({self.kind}) to {where}\n    {shown}\n    {headers}\n    {_shortened(self.raw.body, 300)}"
        )


def _shortened(value: Any, most: int = 120) -> Any:
    text = repr(value)
    return value if len(text) <= most else f"{text[: most // 2]}…({len(text)} characters)"


def corpus(seed: int, numbers: Iterable[int]) -> list[Hostile]:
    """The messages of these numbers; each depends on the seed and its own number alone."""
    return [_hostile(seed, number) for number in numbers]


def _hostile(seed: int, number: int) -> Hostile:
    chance = Chance(seed, number)
    while True:
        try:
            return chance.choice(KINDS)(number, chance)
        except ValueError:  # headers that no frame holds
            continue


def _task(number: int, chance: Chance) -> Hostile:
    draft = task_draft(number, chance)
    mutate(draft, chance)
    kind = ", ".join(draft.done)
    # RabbitMQ looks into CC, and at what `x-death` says when it has to add to it.
    return Hostile(number, kind, draft.message(), alone=any("x-death" in done for done in draft.done))


def _refusable(number: int, chance: Chance) -> Hostile:
    """What RabbitMQ itself refuses, or routes by."""
    draft = task_draft(number, chance)
    what = chance.choice(("expiration", "user_id", "CC", "BCC", "field type", "table", "delivery_mode"))
    match what:
        case "expiration":
            draft.properties["expiration"] = chance.choice(("0", "1", "-1", "x", "4294967296", "1" * 200, "60000"))
        case "user_id":
            draft.properties["user_id"] = chance.choice(("guest", "root", b"\xff"))
        case "delivery_mode":
            draft.properties["delivery_mode"] = chance.choice((0, 3, 255))
        case "CC" | "BCC":
            draft.headers.append((what, chance.choice((["nobody"], [], "nobody", [5], ["x" * 300], {"a": 1}))))
        case "field type":
            kind = chance.choice((b"L", b"U", b"Z", b"\0", b"d", b"S", b"A", b"F"))
            draft.headers.append(
                ("odd", Field(kind, chance.choice((b"", b"\x7f\xf8" + bytes(6), b"\xff" * 8, b"\x7f\xf0" + bytes(6)))))
            )
        case _:
            draft.headers.append(("odd", Field(b"F", chance.randbytes(chance.randint(0, 20)))))
    return Hostile(number, f"refusable: {what}", draft.message(), alone=True)


def _control(number: int, chance: Chance) -> Hostile:
    """To every mailbox."""
    is_order = chance.one_in(2)
    method: Any = chance.choice(ORDERS if is_order else QUESTIONS)
    chosen = chance.some(ARGUMENTS, 4)
    body: Any = {"method": method, "arguments": {name: chance.choice(GARBAGE) for name in chosen}}
    for name in chance.some(("destination", "pattern", "matcher", "ticket", "arguments", "method", "reply_to"), 3):
        body[name] = chance.choice(GARBAGE) if chance.one_in(2) else chance.json()
    if chance.one_in(4):
        key = chance.choice(("nobody", "x" * 255, "x" * 300, "", 5, values.FORGED))
        exchange = chance.choice(("reply.celery.pidbox", "", "no such", "celery.pidbox", "amq.fanout", "x" * 300, 5))
        body |= {"ticket": "t", "reply_to": {"exchange": exchange, "routing_key": key}}
    if chance.one_in(6):
        body |= {
            "pattern": chance.choice(("(a+)+$", "(", 5, "[", "x" * 60_000, "*" * 3_000)),
            "matcher": chance.choice(("pcre", "glob", 5)),
        }
    raw = chance.choice(values.RAW_BODIES) if chance.one_in(8) else json.dumps(body).encode()
    properties: dict[str, Any] = {"content_type": "application/json", "content_encoding": "utf-8", "headers": {}}
    for name in chance.some(("clock", "expires", "ticket"), 2):
        properties["headers"][name] = chance.field()
    if chance.one_in(6):
        properties["content_type"] = chance.choice(values.CONTENT_TYPES)
        properties["content_encoding"] = chance.choice(values.ENCODINGS)
    return _elsewhere(number, f"control {method}", properties, raw, "celery.pidbox", "")


def _result(number: int, chance: Chance) -> Hostile:
    """To the producer's reply queue (the run fills its name in), as the parts of a chord, or as a control reply."""
    message = chance.choice([found for name in RESULTS for found in recorded("result", name)])
    body = chance.choice(values.RAW_BODIES) if chance.one_in(3) else message.body
    if body is message.body and chance.one_in(2) and body.startswith(b"{"):
        found = json.loads(body)
        for name in chance.choices((*found, "extra"), k=chance.randint(1, 3)):
            found[name] = chance.json()
        body = json.dumps(found).encode()
    properties: dict[str, Any] = {
        "content_type": chance.choice(("application/json", "application/json", *values.CONTENT_TYPES)),
        "content_encoding": chance.choice(("utf-8", "utf-8", *values.ENCODINGS)),
        "correlation_id": chance.choice(("rpc-failure", "", b"\xff\xfe", "x" * 255)),
        "headers": {},
    }
    for name in chance.some(("compression", "group_index", "more", "ticket", "x-death"), 2):
        own: tuple[Any, ...] = values.COMPRESSIONS if name == "compression" else values.TEXTS
        properties["headers"][name] = chance.field() if chance.one_in(2) else chance.choice(own)
    exchange, key = chance.choice((("", REPLIES), ("", CHORDS), ("reply.celery.pidbox", "nobody")))
    return _elsewhere(number, f"result to {key}", properties, body, exchange, key)


# Stands for the name of the producer's reply queue.
REPLIES = "replies"


def _delay(number: int, chance: Chance) -> Hostile:
    """Into the delay levels, with headers that do not say what `DelayPlan` says."""
    draft = task_draft(number, chance)
    level = chance.randint(0, 3)
    for name in ("to", "until", "priority", *range(level + 1)):
        if not chance.one_in(6):
            own = UNTIL if name == "until" else ("", "0", "1", "f", "g", 1)
            draft.set(f"amqtask-delay-{name}", chance.field() if chance.one_in(4) else chance.choice(own))
    if chance.one_in(2):
        draft.properties["priority"] = chance.choice((0, 1, 255))
    message = draft.message()
    message.exchange = chance.choice((f"amqtask.delay.level.{level}", "amqtask.delay.out"))
    # An exchange that no delay has made yet is not there.
    return Hostile(number, f"delay level {level}", message, ends=False, alone=True)


# Moments in milliseconds: long ago, soon after the epoch's end, never.
UNTIL = (0, -1, 1, 1_800_000_000_000, 4_000_000_000_000, 2**63 - 1, -(2**63), 1e300, "soon")


def _elsewhere(number: int, kind: str, properties: dict[str, Any], body: bytes, exchange: str, key: str) -> Hostile:
    raw = RawMessage({**properties, "message_id": f"fz-{number}"}, body, exchange, key)
    raw.frames()
    return Hostile(number, kind, raw, ends=False)


KINDS: tuple[Callable[[int, Chance], Hostile], ...] = (
    *(_task,) * 28, _refusable, _control, _control, _control, _result, _result, _delay,
)  # fmt: skip


def batches(messages: Sequence[Hostile], size: int) -> Iterator[list[Hostile]]:
    """In order; what the broker may refuse goes alone."""
    batch: list[Hostile] = []
    for message in messages:
        if message.alone:
            if batch:
                yield batch
            yield [message]
            batch = []
            continue
        batch.append(message)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


__all__ = ["CHORDS", "QUEUE", "REPLIES", "Hostile", "batches", "corpus"]

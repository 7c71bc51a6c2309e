"""Delay levels: a message waits for any time in broker queues and then goes to where it was addressed.

The model. The wait is rounded up to units of 125 ms and written in base 16. Each digit that is not zero is one
queue, `<prefix>.<level>.<digit>`, whose message TTL is that digit's share of the wait; when it is over, the
queue dead-letters the message to the exchange of the next lower level. Each level has one *headers* exchange,
`<prefix>.<level>`, that looks at the header `amqtask-delay-<level>`: the digit's queue, or, for "0", the next level's
exchange (exchange to exchange: no hop). Below the last level stands the headers exchange `<prefix>.out`, which
looks at `amqtask-delay-to`, the name of the exchange that the message is for. A named exchange is bound to it
directly. The default exchange cannot be bound, so its messages pass one more queue, `<prefix>.to`, with a TTL of 0
and the default exchange as its dead-letter exchange.

Invariants, and why:

- The routing key is the target's all the way, so no queue has to know where a message goes; any exchange type and
  queues declared later work.
- All messages of one queue have the same TTL and the same priority, so the one at the head is always the next to
  expire: a queue expires from its head only, and since RabbitMQ 4 a quorum queue's head is its highest priority. So
  messages with another priority than 0 have queues of their own, `<prefix>.<level>.<digit>.p<priority>`, by the header
  `amqtask-delay-priority`. For the same reason the `expiration` property is taken off: RabbitMQ would use the smaller
  of the two and the message would leave its level early. The `expires` header stays, and the worker keeps it.
- Many messages that were published at once leave the queue of their longest digit at once too, and each hop is a wait of
  its own: what a queue cannot hand on in time makes its messages late for good. One queue hands 14,000 messages per second
  on and four hand 33,000 on (RabbitMQ 3.10, two cores). So the digits of half a minute and more have four queues each,
  `<prefix>.<level>.<digit>.<lane>`, by the header `amqtask-delay-lane`.
- A message passes a queue at most once per publish, always downwards, so the broker's cycle detection (it drops a
  message that comes back to a queue by expiry alone, x-death tells it) has no reason to act; each republish
  strips what the last journey wrote.
- The queues are quorum queues that dead-letter at least once: until the next queue has confirmed a message, the last
  one keeps it. `reject-publish` is what that asks for, and lets a publisher see a refusal.
- Nothing is declared before it is needed, and everything may be declared again by anyone: names say what it is.
- RabbitMQ takes TTLs below 2**32 ms. Six levels fit (24.3 days at most); who asks for more gets 24 days, and the
  worker sends a message that is still early back here, by its `eta` header.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from zlib import crc32

from amqtask.entities import Binding, Declaration, Exchange, Queue, arguments
from amqtask.message import Message, strip_transit_headers

UNIT_MS = 125
LEVELS = 6
MAX_UNITS = 16**LEVELS - 1
MAX_SECONDS = MAX_UNITS * UNIT_MS / 1000

TO_HEADER = "amqtask-delay-to"
_LEVEL_HEADER = "amqtask-delay-"
_PRIORITY_HEADER = "amqtask-delay-priority"
_LANE_HEADER = "amqtask-delay-lane"
LANES = 4
# The lowest level whose queues have lanes: 16 ** 2 units, 32 s.
FIRST_LEVEL_WITH_LANES = 2


def units(seconds: float) -> int:
    """How many units of 125 ms a message waits: never less than asked for, but for the longest wait there is."""
    if seconds <= 0:
        return 0
    exact = seconds * 1000 / UNIT_MS
    # Half a microsecond of float noise must not cost a unit (0.1 + 0.2 is not 0.3).
    return MAX_UNITS if exact >= MAX_UNITS else math.ceil(exact - 4e-6)


def longest_wait(headers: Mapping[str, Any], level: int) -> float:
    """The most, in seconds, that a message in a queue of that level has still to wait, by its delay headers."""
    left = sum(int(str(headers.get(f"{_LEVEL_HEADER}{lower}") or "0"), 16) << (4 * lower) for lower in range(level + 1))
    return left * UNIT_MS / 1000


def digits(count: int) -> tuple[tuple[int, int], ...]:
    """(level, digit) from the highest level in use down to 0; zeros in between are listed."""
    found: list[tuple[int, int]] = []
    level = 0
    while count:
        count, digit = divmod(count, 16)
        found.append((level, digit))
        level += 1
    return tuple(reversed(found))


@dataclass(frozen=True, slots=True)
class DelayPlan:
    """Puts messages on the way through the delay levels. `queue_type` is "quorum" or "classic"."""

    prefix: str = "amqtask.delay"
    queue_type: str = "quorum"

    def delayed(self, message: Message, seconds: float) -> Message:
        """The message that arrives at this one's exchange after `seconds` (rounded up), under the same routing key.

        With nothing to wait for it is the message itself. Longer than 24 days is cut to that.
        """
        path = digits(units(seconds))
        if not path:
            return message
        headers = strip_transit_headers(message.properties.headers or {})
        priority = message.properties.priority
        headers[TO_HEADER] = message.exchange
        headers[_PRIORITY_HEADER] = _class(priority)
        lane = "0"
        if path[0][0] >= FIRST_LEVEL_WITH_LANES:
            headers[_LANE_HEADER] = lane = _lane(message)
        for level, digit in path:
            headers[f"{_LEVEL_HEADER}{level}"] = f"{digit:x}"
        return replace(
            message,
            properties=replace(message.properties, headers=headers, expiration=None),
            exchange=self.level_name(path[0][0]),
            declare=(*message.declare, *self.declarations(path, message.exchange, priority, lane)),
        )

    def undelayed(self, message: Message) -> Message:
        """The message as it was before `delayed`, but for its `expiration`; one that is not delayed is itself."""
        headers = message.properties.headers or {}
        if TO_HEADER not in headers:
            return message
        target, levels = headers[TO_HEADER], range(LEVELS - 1, -1, -1)
        path = tuple(
            (level, int(headers[f"{_LEVEL_HEADER}{level}"], 16))
            for level in levels
            if f"{_LEVEL_HEADER}{level}" in headers
        )
        added = self.declarations(path, target, message.properties.priority, headers.get(_LANE_HEADER, "0"))
        return replace(
            message,
            properties=replace(message.properties, headers=strip_transit_headers(headers)),
            exchange=target,
            declare=message.declare[: len(message.declare) - len(added)],
        )

    def level_name(self, level: int) -> str:
        """The exchange of a level; level -1 is the way out."""
        return f"{self.prefix}.{level}" if level >= 0 else f"{self.prefix}.out"

    def declarations(
        self, path: tuple[tuple[int, int], ...], target: str, priority: int | None = 0, lane: str = "0"
    ) -> tuple[Declaration, ...]:
        """What a message on that path needs, lowest level first (a queue's way on exists before the queue)."""
        return _path_declarations(self, path, target, _class(priority), lane)

    def queue_names(self, priorities: Iterable[int | None]) -> Iterator[tuple[int, str]]:
        """(level, queue) where messages of these priorities may wait, the longest waits first; not all of them exist."""
        classes = list(dict.fromkeys(_class(priority) for priority in priorities))
        for level in reversed(range(LEVELS)):
            lanes = range(LANES) if level >= FIRST_LEVEL_WITH_LANES else (0,)
            for digit in reversed(range(1, 16)):
                for priority in classes:
                    for lane in lanes:
                        yield level, self._queue_name(level, digit, priority, str(lane))

    def level_of(self, queue: str) -> int | None:
        """The level whose queue this is; None for another queue."""
        match = re.fullmatch(re.escape(self.prefix) + r"\.(\d+)\.[0-9a-f](\.p\w+)?(\.\d+)?", queue)
        return int(match[1]) if match else None

    def _way_out(self, target: str) -> Iterator[Declaration]:
        out = self._exchange(-1)
        yield out
        match = arguments({"x-match": "all", TO_HEADER: target})
        if target:
            yield Binding(out, target, arguments=match, to_exchange=True)
        else:
            release = f"{self.prefix}.to"
            yield self._queue(release, ttl=0, onwards="")
            yield Binding(out, release, arguments=match)

    def _level(self, level: int, digit: int, priority: str, lane: str) -> Iterator[Declaration]:
        exchange, lower = self._exchange(level), self.level_name(level - 1)
        yield exchange
        yield Binding(exchange, lower, arguments=_match(level, 0), to_exchange=True)
        if digit:
            chosen = {_PRIORITY_HEADER: priority}
            name = self._queue_name(level, digit, priority, lane)
            if level >= FIRST_LEVEL_WITH_LANES:
                chosen[_LANE_HEADER] = lane
            yield self._queue(name, ttl=digit * 16**level * UNIT_MS, onwards=lower)
            yield Binding(exchange, name, arguments=_match(level, digit, chosen))

    def _queue_name(self, level: int, digit: int, priority: str, lane: str) -> str:
        of_priority = "" if priority == "0" else f".p{priority}"
        of_lane = f".{lane}" if level >= FIRST_LEVEL_WITH_LANES else ""
        return f"{self.prefix}.{level}.{digit:x}{of_priority}{of_lane}"

    def _exchange(self, level: int) -> Exchange:
        return Exchange(self.level_name(level), type="headers")

    def _queue(self, name: str, *, ttl: int, onwards: str) -> Queue:
        asked: dict[str, Any] = {
            "x-queue-type": self.queue_type,
            "x-message-ttl": ttl,
            "x-dead-letter-exchange": onwards,
        }
        if self.queue_type == "quorum":
            asked["x-overflow"] = "reject-publish"
            asked["x-dead-letter-strategy"] = "at-least-once"
        return Queue(name, arguments=arguments(asked))


def _match(level: int, digit: int, also: Mapping[str, str] | None = None) -> tuple[tuple[str, Any], ...]:
    return arguments({"x-match": "all", f"{_LEVEL_HEADER}{level}": f"{digit:x}", **(also or {})})


def _lane(message: Message) -> str:
    properties = message.properties
    found = properties.correlation_id or properties.message_id or ""
    return str(crc32(found.encode()) % LANES)


def _class(priority: int | None) -> str:
    return "none" if priority is None else str(priority)


# Publishers publish one message after another with the same countdown; the tuple is the same then.
@lru_cache(maxsize=1024)
def _path_declarations(
    plan: DelayPlan, path: tuple[tuple[int, int], ...], target: str, priority: str, lane: str
) -> tuple[Declaration, ...]:
    found: list[Declaration] = list(plan._way_out(target))
    for level, digit in reversed(path):
        found.extend(plan._level(level, digit, priority, lane))
    return tuple(found)

"""Delayed messages: in which queue a message waits for any time in the broker, and how it gets to its destination.

The model. A delayed message waits in one of 42 queues, which stand on nine levels. Level 0 has sixteen, `<prefix>.0s`,
`<prefix>.4s` … `<prefix>.60s`; a message that has to wait for 20 to 24 s is in `<prefix>.20s`. The higher levels have three or
five: 64, 128 and 192 s, 256 to 1,280 s, and so on. Each level has one *headers* exchange, `<prefix>.level.<n>`, that looks at the
header `amqtask-delay-<n>`: the digit's queue, or, for "0", the next lower level's exchange (exchange to exchange: no hop). The
moment at which the message is due is in the header `amqtask-delay-until`, milliseconds of Unix time.

Workers forward it (`services.forwarder`). They consume the queues of the levels 0 to 2, hold the messages at their heads
unacknowledged, and when one is due they publish it to its destination and acknowledge it once that is confirmed. Nearly every
message needs one queue and one worker, whatever its digits; only messages beyond what workers may hold go down level by level.

The broker is the fallback. When a queue's message TTL is over, it dead-letters to the next lower level's exchange, and the
last queue to the headers exchange `<prefix>.out`, which looks at `amqtask-delay-to`, the name of the exchange that the message
is for. A named exchange is bound to it directly. The default exchange cannot be bound, so its messages pass one more queue,
`<prefix>.to`, with a TTL of 0 and the default exchange as its dead-letter exchange. So a fleet of Celery workers gets the
messages that our producers delay, 6 to 10 s late, and no worker of ours can lose a message.

Why the broker does not do it alone: a queue dead-letters at least once through a process that runs on the queue's leader. When
a node dies that leads both the queue and the next one, the new leader's process asks the dead node first; RabbitMQ 3.10
treats that as a refusal of the message, tries again 180 s later (`dead_letter_worker_publisher_confirm_timeout`), and forwards
nothing meanwhile (rabbit_fifo_client:enqueue, rabbit_fifo_dlx_worker:redeliver_messages). At-most-once dead-lettering would lose
it instead. A message that a worker holds does not expire, so as long as a worker runs the broker has nothing to forward.

Invariants, and why:

- The routing key stays the destination's, so no queue has to know where a message goes; any exchange type and queues
  declared later work.
- The TTL of a level 0 queue is 6 s longer than its longest wait: a worker may need so long to reconnect after a node's death,
  before the broker forwards. Workers empty the queues of level 1 and 2 5 s before their TTL is over.
- All messages of one queue have the same TTL and no priority, so the one at the head is always the next to expire: a queue
  expires from its head only, and since RabbitMQ 4 a quorum queue's head is its highest priority. The priority waits in the header
  `amqtask-delay-priority`; when the broker forwards, it is lost. For the same reason the `expiration` property is removed:
  RabbitMQ would use the smaller of the two. The `expires` header stays, and the worker keeps it.
- Longer waits than 23 minutes are left to the broker: no consumer may hold a message for longer than `consumer_timeout` (30 min).
  The last 400 s of them, more than the broker's longest stop, are spent on the levels that workers consume.
- Whatever delays messages have, there are 43 queues, and no others.
- A message passes a queue at most once per publish, always downwards, so the broker's cycle detection (it drops a
  message that comes back to a queue by expiry alone, which x-death shows) has no reason to act; each republish
  removes the headers of the last one.
- The queues are quorum queues that dead-letter at least once: until the next queue has confirmed a message, the last
  one keeps it. `reject-publish` is required for that, and lets a publisher see a refusal.
- Any client may declare all of these entities again: their names say what they are. `amqtask topology declare` makes all of them.
- RabbitMQ takes TTLs below 2**32 ms; the levels have room for 47 days. A message with a longer delay comes out early, and is
  delayed again.

Clocks. A message is due by the clock of the process that published it, and leaves by the clock of the worker that holds it. A
message that is early by the clock of the worker that gets it is delayed again; `second_delay` doubles the wait when the other
clock may be ahead, so that the message does not come back forever.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from amqtask.protocol.entities import Binding, Declaration, Exchange, Queue, arguments
from amqtask.protocol.message import Message, Properties, properties_of_copy, strip_transit_headers
from amqtask.topology.declarations import DISCONNECTED

if TYPE_CHECKING:
    from amqtask.ground.shapes import HeaderDict, Headers, QueueArgumentDict
    from amqtask.protocol.message import Delivery, PropertiesLike


# The delay queues of earlier versions, in which messages may wait for weeks after an update. A broker that has them forwards
# their messages by itself: each queue, `<prefix>.<level>.<digit>`, dead-letters to the exchange `<prefix>.<level - 1>`, the
# last one to `<prefix>.out`, which later versions use too. Nothing publishes to them any more; these functions find the
# messages that still wait: digits of base 16, units of 125 ms, a queue for each priority but 0 (`.p<priority>`, `.pnone`), and
# from level 2 on four lanes.
FORMER_UNIT_MS = 125
FORMER_LEVELS = 6
FORMER_LANES = 4
_FIRST_FORMER_LEVEL_WITH_LANES = 2
# For how many seconds a digit of each level stands, and the highest digit.
SIZES = (4, 64, 256, 1000, 4000, 16000, 64000, 256000, 1024000)
HIGHEST = (15, 3, 5, 3, 3, 3, 3, 3, 3)
LEVELS = len(SIZES)
STEP_SECONDS = SIZES[0]
# Levels whose queues workers consume.
HELD_LEVELS = 3
_FAR = SIZES[HELD_LEVELS]
# Of a wait that begins on higher levels, at least so many seconds are spent on those that workers consume.
_SLACK_SECONDS = 400
MAX_SECONDS = _FAR * 4 ** (LEVELS - HELD_LEVELS) - STEP_SECONDS
# Between the longest wait of a level 0 queue and its TTL, when the broker forwards.
MARGIN_SECONDS = 6
# Workers take messages out of a queue of a higher level so long before the broker does.
EARLY_SECONDS = 5
# A due time that is no 64-bit number must not keep a message from being published.
_LONGEST = 10 * 366 * 86400.0
# A message that comes early by less than this was forwarded by a worker whose clock is ahead.
_MOST_AHEAD = 60.0

TO_HEADER = "amqtask-delay-to"
UNTIL_HEADER = "amqtask-delay-until"
TRIES_HEADER = "amqtask-delay-tries"
_LEVEL_HEADER = "amqtask-delay-"
_PRIORITY_HEADER = "amqtask-delay-priority"

Path = tuple[tuple[int, int], ...]
# Where a message is to go: an exchange ("": the default one) and a routing key.
Address = tuple[str, str]


# -- the delay queues of earlier versions


def former_queue_names(prefix: str, priorities: Iterable[int | None]) -> Iterator[tuple[int, str]]:
    """(level, queue) of the queues in which messages of these priorities may wait, the longest waits first."""
    classes = dict.fromkeys(priorities)
    for level in reversed(range(FORMER_LEVELS)):
        lanes = [f".{lane}" for lane in range(FORMER_LANES)] if level >= _FIRST_FORMER_LEVEL_WITH_LANES else [""]
        for digit in reversed(range(1, 16)):
            for priority in classes:
                of_priority = "" if priority == 0 else f".p{'none' if priority is None else priority}"
                for lane in lanes:
                    yield level, f"{prefix}.{level}.{digit:x}{of_priority}{lane}"


def former_exchange(prefix: str, level: int) -> str:
    """The exchange of a level."""
    return f"{prefix}.{level}"


def former_level_of(prefix: str, queue: str) -> int | None:
    """The level whose queue this is; None for another queue."""
    match = re.fullmatch(re.escape(prefix) + r"\.(\d+)\.[0-9a-f](\.p\w+)?(\.\d+)?", queue)
    return int(match[1]) if match else None


def longest_former_wait(headers: Headers, level: int) -> float:
    """The longest time, in seconds, that a message in a queue of that level still waits, by its headers."""
    digits = {lower: headers.get(f"amqtask-delay-{lower}") for lower in range(level + 1)}
    return sum(
        (int(digit, 16) << (4 * lower)) * FORMER_UNIT_MS / 1000
        for lower, digit in digits.items()
        if isinstance(digit, str) and re.fullmatch("[0-9a-f]", digit)
    )


def digits(seconds: float) -> Path:
    """(level, digit) from the highest level in use down to 0, for a wait above 0; zeros in between are listed."""
    seconds = min(seconds, MAX_SECONDS)
    far = max(0, int((seconds - _SLACK_SECONDS) // _FAR))
    near = seconds - far * _FAR
    path: list[tuple[int, int]] = []
    for level in range(LEVELS - 1, HELD_LEVELS - 1, -1):
        path.append((level, far // (SIZES[level] // _FAR) % 4))
    for level in range(HELD_LEVELS - 1, -1, -1):
        digit = min(int(near // SIZES[level]), HIGHEST[level])
        near -= digit * SIZES[level]
        path.append((level, digit))
    while len(path) > 1 and not path[0][1]:
        del path[0]
    return tuple(path)


def second_delay(headers: Headers, seconds: float) -> float:
    """How long to delay a message with these headers again, when it arrived `seconds` early.

    If a worker forwarded it, that worker's clock is ahead by `seconds`: with twice the delay it comes in time from there.
    """
    return seconds * 2 if UNTIL_HEADER in headers and seconds < _MOST_AHEAD else seconds


class HeldQueue(NamedTuple):
    """A queue that workers consume: its level, the longest wait of its messages, in seconds, and its declarations."""

    queue: Queue
    level: int
    longest: float
    declare: tuple[Declaration, ...]


class DelayPlan(NamedTuple):
    """Makes delayed messages, and the messages that forward them. `queue_type` is "quorum" or "classic"."""

    prefix: str = "amqtask.delay"
    queue_type: str = "quorum"
    clock: Callable[[], float] = time.time

    # -- messages

    def delayed(self, message: Message, seconds: float, *, now: float | None = None) -> Message:
        """A message that arrives at this one's exchange `seconds` after `now`, with the same routing key.

        The message itself when `seconds` is not above 0.
        """
        if not seconds > 0:
            return message
        headers = strip_transit_headers(message.properties.headers or {})
        due = (self.clock() if now is None else now) + min(seconds, _LONGEST)
        headers[TO_HEADER] = message.exchange
        headers[UNTIL_HEADER] = math.ceil(due * 1000)
        if message.properties.priority is not None:
            headers[_PRIORITY_HEADER] = message.properties.priority
        path = digits(seconds)
        for level, digit in path:
            headers[f"{_LEVEL_HEADER}{level}"] = f"{digit:x}"
        return replace(
            message,
            properties=replace(message.properties, headers=headers, expiration=None, priority=None),
            exchange=self.level_name(path[0][0]),
            declare=(*message.declare, *self.declarations(path, message.exchange)),
        )

    def undelayed(self, message: Message) -> Message:
        """The message as it was before `delayed`, without its `expiration`; a message that is not delayed stays as it is."""
        headers = message.properties.headers or {}
        if TO_HEADER not in headers:
            return message
        added = self.declarations(_path(headers), headers[TO_HEADER])
        return replace(
            message,
            properties=replace(
                message.properties, headers=strip_transit_headers(headers), priority=headers.get(_PRIORITY_HEADER)
            ),
            exchange=headers[TO_HEADER],
            declare=message.declare[: len(message.declare) - len(added)],
        )

    def addressed(self, delivery: Delivery) -> Message:
        """The message of a delayed delivery, for its destination.

        A message for a named exchange goes through `<prefix>.out`: its producer had the right to bind that exchange, and the
        worker that forwards it needs no right to the named exchange itself.
        """
        properties = delivery.properties
        before = properties.headers or {}
        target = _text(before.get(TO_HEADER))
        headers = strip_transit_headers(before)
        if UNTIL_HEADER in before:
            headers[UNTIL_HEADER] = before[UNTIL_HEADER]
        if target:
            headers[TO_HEADER] = target
        exchange = self.level_name(-1) if target else ""
        return Message(delivery.body, _copied(properties, headers), exchange, delivery.routing_key)

    def released(self, delivery: Delivery, *, revoked: bool = False) -> Message:
        """The message of a delayed delivery, to run now. `revoked`: as one that has expired, which no worker runs."""
        message = self.addressed(delivery)
        headers = {**message.properties.headers, "eta": None}
        headers.pop(UNTIL_HEADER, None)
        if revoked:
            headers["expires"] = _LONG_AGO
        return replace(message, properties=replace(message.properties, headers=headers))

    def through_the_net(self, delivery: Delivery) -> Message:
        """Like `addressed`, but always through `<prefix>.out`, for a user who may not publish to the default exchange."""
        message = self.addressed(delivery)
        message.properties.headers[TO_HEADER] = _text((delivery.properties.headers or {}).get(TO_HEADER))
        return replace(message, exchange=self.level_name(-1))

    def delayed_on(self, delivery: Delivery, seconds: float) -> Message:
        """The message of a delayed delivery, delayed for `seconds` more, with the same due time."""
        before = delivery.properties.headers or {}
        message = replace(self.addressed(delivery), exchange=_text(before.get(TO_HEADER)))
        later = self.delayed(message, seconds)
        due = due_at(before)
        if due is not None:
            later.properties.headers[UNTIL_HEADER] = math.ceil(due * 1000)
        return later

    def delayed_again(self, delivery: Delivery) -> Message:
        """The message of a delayed delivery that could not be published, delayed again: for 10 s, then each time for twice as
        long, an hour at most."""
        before = delivery.properties.headers or {}
        tries_header = before.get(TRIES_HEADER)
        tries = tries_header if isinstance(tries_header, int) and 0 <= tries_header < 20 else 0
        message = replace(self.addressed(delivery), exchange=_text(before.get(TO_HEADER)))
        later = self.delayed(message, min(10.0 * 2**tries, 3600.0))
        later.properties.headers[TRIES_HEADER] = tries + 1
        return later

    # -- entities

    def level_name(self, level: int) -> str:
        """The exchange of a level; level -1 is the last exchange, `<prefix>.out`."""
        return f"{self.prefix}.level.{level}" if level >= 0 else f"{self.prefix}.out"

    def declarations(self, path: Path, target: str) -> tuple[Declaration, ...]:
        """The declarations for a message on that path, lowest level first (a queue's dead-letter exchange comes before it)."""
        return _path_declarations(self, path, target)

    def held(self) -> Iterator[HeldQueue]:
        """The queues that workers consume."""
        for level, digit in _level_digits(range(HELD_LEVELS)):
            longest = (digit + 1) * SIZES[level]
            yield HeldQueue(self._queue(level, digit), level, longest, self.declarations(_single(level, digit), ""))

    def everything(self, targets: Iterable[str] = ()) -> tuple[Declaration, ...]:
        """All declarations for delays, for messages to the default exchange and to these exchanges."""
        declarations: dict[Declaration, None] = {}
        for level, digit in _level_digits(range(LEVELS)):
            declarations.update(dict.fromkeys(self.declarations(_single(level, digit), "")))
        for target in targets:
            declarations.update(dict.fromkeys(self.way_out(target)))
        return tuple(declarations)

    def queue_names(self, priorities: Iterable[int | None]) -> Iterator[tuple[int, str]]:
        """(level, queue) of all queues in which messages may wait, the longest waits first; not all of them exist.

        They include the queues of earlier versions, which had one for each priority.
        """
        for level, digit in reversed(list(_level_digits(range(LEVELS)))):
            yield level, self.queue_name(level, digit)
        yield from former_queue_names(self.prefix, priorities)

    def level_of(self, queue: str) -> int | None:
        """The level whose queue this is; None for another queue."""
        levels = (level for level, digit in _level_digits(range(LEVELS)) if self.queue_name(level, digit) == queue)
        return next(levels, former_level_of(self.prefix, queue))

    def exchange_of(self, queue: str) -> str:
        """The exchange that a delay queue is bound to."""
        former = former_level_of(self.prefix, queue)
        return self.level_name(self.level_of(queue) or 0) if former is None else former_exchange(self.prefix, former)

    def queue_name(self, level: int, digit: int) -> str:
        """The queue of a digit."""
        return f"{self.prefix}.{digit * SIZES[level]}s"

    def way_out(self, target: str) -> Iterator[Declaration]:
        """The last exchange, and how messages for `target` ("": the default exchange) leave it."""
        out = self._exchange(-1)
        yield out
        match = arguments({"x-match": "all", TO_HEADER: target})
        if target:
            yield Binding(out, target, arguments=match, to_exchange=True)
        else:
            release = f"{self.prefix}.to"
            yield Queue(release, arguments=self._arguments(0, ""))
            yield Binding(out, release, arguments=match)

    def level(self, level: int, digit: int) -> Iterator[Declaration]:
        """The exchange of a level, and the queue of one of its digits."""
        exchange = self._exchange(level)
        yield exchange
        if level:
            yield Binding(exchange, self.level_name(level - 1), arguments=_match(level, 0), to_exchange=True)
        if digit or not level:
            queue = self._queue(level, digit)
            yield queue
            yield Binding(exchange, queue.name, arguments=_match(level, digit))

    def _queue(self, level: int, digit: int) -> Queue:
        seconds = digit * SIZES[level] + (0 if level else STEP_SECONDS + MARGIN_SECONDS)
        queue_arguments = self._arguments(seconds * 1000, self.level_name(level - 1))
        if self.queue_type == "quorum":
            # A worker that stops requeues the messages that it holds; RabbitMQ 4 would dead-letter a message the twentieth time.
            queue_arguments = arguments({**dict(queue_arguments), "x-delivery-limit": _NO_LIMIT, **DISCONNECTED})
        return Queue(self.queue_name(level, digit), arguments=queue_arguments)

    def _exchange(self, level: int) -> Exchange:
        return Exchange(self.level_name(level), type="headers")

    def _arguments(self, ttl: int, onwards: str) -> tuple[tuple[str, object], ...]:
        queue_arguments: QueueArgumentDict = {
            "x-queue-type": self.queue_type,
            "x-message-ttl": ttl,
            "x-dead-letter-exchange": onwards,
        }
        if self.queue_type == "quorum":
            queue_arguments["x-overflow"] = "reject-publish"
            queue_arguments["x-dead-letter-strategy"] = "at-least-once"
        return arguments(queue_arguments)


_NO_LIMIT = 1_000_000
_LONG_AGO = "2000-01-01T00:00:00+00:00"


def due_at(headers: Headers) -> float | None:
    """Unix time at which a delayed message is due; None where its header is missing or unreadable."""
    until = headers.get(UNTIL_HEADER)
    # In Redis a header may be any number.
    return until / 1000 if isinstance(until, int) and not isinstance(until, bool) and abs(until) < 2**63 else None


def address_of(delivery: Delivery) -> Address:
    """The destination of a delayed message: (exchange, routing key)."""
    return _text((delivery.properties.headers or {}).get(TO_HEADER)), delivery.routing_key


def addresses(queue: Queue) -> tuple[Address, ...]:
    """The addresses of messages that come to this queue and to no other: the queue's name, or its key on a direct exchange.

    A topic, fanout or headers exchange may have more queues for the same message."""
    queue_binding = (Binding(queue.exchange, queue.name, queue.routing_key),) if queue.exchange else ()
    direct = [
        (binding.source.name, binding.routing_key)
        for binding in (*queue_binding, *queue.bindings)
        if binding.source.name and binding.source.type == "direct"
    ]
    return tuple(dict.fromkeys([("", queue.name), *direct]))


def leaves_at(headers: Headers, queue_level: int) -> float | None:
    """Unix time at which a message should leave a queue of that level for a lower one, if workers hold too many there."""
    due = due_at(headers)
    if due is None or not queue_level:
        return due
    lower = sum(digit * SIZES[level] for level, digit in _path(headers) if level < queue_level)
    return due - lower - STEP_SECONDS - EARLY_SECONDS


def seconds_left(headers: Headers, level: int, now: float) -> float:
    """The longest time, in seconds, that a message in a queue of that level still waits, by its delay headers."""
    due = due_at(headers)
    return longest_former_wait(headers, level) if due is None else due - now


def _level_digits(levels: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(level, digit) of the queues on these levels: only level 0 has one for the digit 0."""
    return ((level, digit) for level in levels for digit in range(1 if level else 0, HIGHEST[level] + 1))


def _path(headers: Headers) -> Path:
    path = []
    for level in reversed(range(LEVELS)):
        digit = headers.get(f"{_LEVEL_HEADER}{level}")
        if isinstance(digit, str) and re.fullmatch("[0-9a-f]", digit):
            path.append((level, int(digit, 16)))
    return tuple(path)


def _single(level: int, digit: int) -> Path:
    return ((level, digit), *((lower, 0) for lower in reversed(range(level))))


def _match(level: int, digit: int) -> tuple[tuple[str, object], ...]:
    return arguments({"x-match": "all", f"{_LEVEL_HEADER}{level}": f"{digit:x}"})


def _copied(properties: PropertiesLike, headers: HeaderDict) -> Properties:
    copy = properties_of_copy(properties, headers)
    copy.priority = waiting_priority(properties)
    return copy


def waiting_priority(properties: PropertiesLike) -> int | None:
    """The priority that a delayed message will have at its destination."""
    priority = (properties.headers or {}).get(_PRIORITY_HEADER, properties.priority)
    return priority if isinstance(priority, int) and 0 <= priority <= 255 else None


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


# Producers often publish many messages with the same countdown: those share one tuple.
@lru_cache(maxsize=1024)
def _path_declarations(plan: DelayPlan, path: Path, target: str) -> tuple[Declaration, ...]:
    declarations: list[Declaration] = list(plan.way_out(target))
    for level, digit in reversed(path):
        declarations.extend(plan.level(level, digit))
    return tuple(declarations)

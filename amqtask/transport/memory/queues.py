"""What the memory broker holds: exchanges and whom they route to, queues, messages and dead letters; and what it refuses."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import pika

from amqtask.protocol.entities import Binding, Exchange, Queue
from amqtask.protocol.message import REJECTED, dead_headers, deaths_in
from amqtask.transport.contract import OFFSET
from amqtask.transport.errors import ACCESS_REFUSED, NOT_FOUND, PRECONDITION_FAILED

if TYPE_CHECKING:
    from amqtask.ground.shapes import FieldTable, HeaderDict, Headers, JsonObject, QueueArguments

RESOURCE_LOCKED, NOT_IMPLEMENTED = 405, 540
_CODES = {
    NOT_FOUND: "NOT_FOUND",
    ACCESS_REFUSED: "ACCESS_REFUSED",
    RESOURCE_LOCKED: "RESOURCE_LOCKED",
    PRECONDITION_FAILED: "PRECONDITION_FAILED",
    NOT_IMPLEMENTED: "NOT_IMPLEMENTED",
}
PREDECLARED = {
    f"amq.{name}": Exchange(f"amq.{name}", exchange_type)
    for name, exchange_type in (("direct", "direct"), ("topic", "topic"), ("fanout", "fanout"), ("headers", "headers"),
                       ("match", "headers"))
}  # fmt: skip
# The priority of a message without one in a quorum queue (RabbitMQ 4.3).
QUORUM_DEFAULT_PRIORITY = 4
HIGHEST_PRIORITY = 31


class Verdict(Enum):
    """The broker's answer to a publish."""

    STORED = "ack"
    RETURNED = "basic.return, then ack"
    REFUSED = "nack"


@dataclass(slots=True)
class Stored:
    """One message in one queue. `expires_at` is the broker's clock; `properties` are encoded as on the wire."""

    body: bytes
    properties: bytes
    exchange: str
    routing_key: str
    headers: HeaderDict
    priority: int | None
    expiration: float | None
    is_persistent: bool
    number: int = 0
    expires_at: float | None = None
    deliveries: int = 0
    # How many of them count towards a quorum queue's delivery limit.
    failures: int = 0

    def decoded(self) -> Any:
        """A new properties object for each delivery; the delivery count is in the headers."""
        properties = pika.BasicProperties()
        properties.decode(self.properties)
        if self.failures:
            properties.headers = {**(properties.headers or {}), "x-delivery-count": self.failures}
        return properties

    def encoded(self) -> bytes:
        """The properties of one delivery, as on the wire."""
        return b"".join(self.decoded().encode()) if self.failures else self.properties


def received(body: bytes, encoded: bytes, exchange: str, routing_key: str) -> Stored:
    """A message as the broker receives it; `encoded` are its properties. Raises: Refused for an invalid expiration."""
    properties = pika.BasicProperties()
    properties.decode(encoded)
    return Stored(
        body,
        encoded,
        exchange,
        routing_key,
        properties.headers or {},
        properties.priority,
        _seconds(properties.expiration),
        properties.delivery_mode == 2,
    )


def _seconds(expiration: str | None) -> float | None:
    if expiration is None:
        return None
    if not expiration.isdecimal():
        raise invalid_expiration(expiration)
    return int(expiration) / 1000


def copied(stored: Stored) -> Stored:
    """The same message for another queue."""
    return replace(stored, number=0, expires_at=None, deliveries=0, failures=0)


def dead(stored: Stored, queue: str, reason: str, exchange: str, routing_key: str | None) -> Stored:
    """The message for the dead-letter exchange; it keeps its routing key where the queue sets none."""
    properties = stored.decoded()
    properties.headers = dead_headers(
        stored.headers,
        queue,
        reason,
        exchange=stored.exchange,
        routing_key=stored.routing_key,
        expiration=properties.expiration,
    )
    # Without an expiration, or it would expire in that queue again.
    properties.expiration = None
    key = stored.routing_key if routing_key is None else routing_key
    return received(stored.body, b"".join(properties.encode()), exchange, key)


def is_cycle(stored: Stored, queue: str) -> bool:
    """Whether the broker drops the message: it comes back to a queue and was not rejected in between."""
    deaths = deaths_in(stored.headers)
    names = [entry.get("queue") for entry in deaths]
    if queue not in names:
        return False
    return all(entry.get("reason") != REJECTED for entry in deaths[: names.index(queue) + 1])


class Refused(Exception):
    """The broker closes the channel with this; `reply_code` and `reply_text` as in `channel.close`."""

    def __init__(self, reply_code: int, reason: str) -> None:
        self.reply_code = reply_code
        self.reply_text = f"{_CODES[reply_code]} - {reason}"
        super().__init__(f"{reply_code} {self.reply_text}")


def not_found(entity_type: str, name: str) -> Refused:
    """No such queue or exchange."""
    return Refused(NOT_FOUND, f"no {entity_type} '{name}' in vhost '/'")


def resource_locked(queue: str) -> Refused:
    """An exclusive queue of another connection."""
    return Refused(RESOURCE_LOCKED, f"cannot obtain exclusive access to locked queue '{queue}' in vhost '/'")


def too_large(size: int, limit: int) -> Refused:
    """A body over max_message_size."""
    return Refused(
        PRECONDITION_FAILED,
        f"message size {size} is larger than configured max size {limit}",
    )


def invalid_expiration(text: str) -> Refused:
    """A message whose expiration is no number of milliseconds."""
    return Refused(PRECONDITION_FAILED, f"invalid expiration '{text}'")


def consumed_exclusively(queue: str) -> Refused:
    """A consumer that the queue's other consumers leave no room for."""
    return Refused(ACCESS_REFUSED, f"queue '{queue}' in vhost '/' in exclusive use")


def in_use(queue: str) -> Refused:
    """A queue that was to be deleted if it had no consumers or no messages."""
    return Refused(PRECONDITION_FAILED, f"queue '{queue}' in vhost '/' in use or not empty")


def not_implemented(method: str) -> Refused:
    """A method that this broker has not."""
    return Refused(NOT_IMPLEMENTED, f"the in-memory broker has no {method}")


def unknown_tag(tag: int) -> Refused:
    """An answer to a delivery that was answered already, or never made."""
    return Refused(PRECONDITION_FAILED, f"unknown delivery tag {tag}")


def check_valid(queue: Queue) -> None:
    """Raises: Refused for properties that the queue's type does not allow."""
    queue_type = queue.argument_map.get("x-queue-type", "classic")
    if queue_type not in ("classic", "quorum", "stream"):
        raise Refused(PRECONDITION_FAILED, f"the in-memory broker has no {queue_type} queues")
    if queue_type != "classic":
        for name, is_wrong in (("durable", not queue.durable), ("exclusive", queue.exclusive),
                               ("auto-delete", queue.auto_delete)):  # fmt: skip
            if is_wrong:
                raise Refused(PRECONDITION_FAILED, f"invalid property '{name}' for queue '{queue.name}' in vhost '/'")


def check_same(declared: Queue | Exchange, existing: Queue | Exchange) -> None:
    """Raises: Refused when the existing entity has other properties or arguments."""
    declared_properties, existing_properties = _properties(declared), _properties(existing)
    for name in sorted({*declared_properties, *existing_properties}):
        if declared_properties.get(name) != existing_properties.get(name):
            entity_type = "queue" if isinstance(declared, Queue) else "exchange"
            raise Refused(
                PRECONDITION_FAILED,
                f"inequivalent arg '{name}' for {entity_type} '{declared.name}' in vhost '/': "
                f"received {_shown(declared_properties.get(name))} but current is {_shown(existing_properties.get(name))}",
            )


def _properties(entity: Queue | Exchange) -> JsonObject:
    arguments = dict(entity.arguments)
    if isinstance(entity, Exchange):
        # A client that only uses an exchange need not know whether it deletes itself.
        return {"type": entity.type, "durable": entity.durable, **arguments}
    queue_type = arguments.pop("x-queue-type", "classic")
    return {
        "durable": entity.durable,
        "exclusive": entity.exclusive,
        "auto_delete": entity.auto_delete,
        "x-queue-type": queue_type,
        **arguments,
    }


def _shown(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"'{str(value).lower()}'"
    type_name = "longstr" if isinstance(value, str) else "signedint"
    return f"the value '{value}' of type '{type_name}'"


@lru_cache(maxsize=4096)
def matches_topic(pattern: str, routing_key: str) -> bool:
    """`*` is one word, `#` any number of words. Goes back to the last `#` only: many of them would take for ever."""
    wanted, words = (text.split(".") if text else [] for text in (pattern, routing_key))
    at = word = tried = 0
    after: int | None = None
    while word < len(words):
        if at < len(wanted) and wanted[at] == "#":
            at += 1
            after, tried = at, word
        elif at < len(wanted) and wanted[at] in ("*", words[word]):
            at, word = at + 1, word + 1
        elif after is not None:
            tried += 1
            at, word = after, tried
        else:
            return False
    return all(rest == "#" for rest in wanted[at:])


def matches_headers(arguments: QueueArguments, headers: Headers) -> bool:
    """`x-match`: all (default), any, all-with-x, any-with-x; an argument without a value asks for presence."""
    mode = str(arguments.get("x-match", "all"))
    with_x = mode.endswith("-with-x")
    required = {name: value for name, value in arguments.items() if name != "x-match" and (with_x or name[:2] != "x-")}
    hits = [name in headers and (value is None or headers[name] == value) for name, value in required.items()]
    return any(hits) if mode.startswith("any") else all(hits)


def is_match(exchange: Exchange, binding: Binding, routing_key: str, headers: Headers) -> bool:
    """Whether a binding of this exchange takes the message."""
    match exchange.type:
        case "fanout":
            return True
        case "topic":
            return matches_topic(binding.routing_key, routing_key)
        case "headers":
            return matches_headers(dict(binding.arguments), headers)
        case _:
            return binding.routing_key == routing_key


@dataclass(eq=False)
class Subscriber:
    """A consumer of one queue; `deliver` gets each message. `prefetch` 0 is no limit."""

    tag: str
    deliver: Callable[[Subscriber, Stored], None]
    on_cancelled: Callable[[Subscriber], None]
    prefetch: int
    no_ack: bool
    exclusive: bool = False
    unacked: int = 0
    # Of a stream: the offset of the next message.
    position: int = 0

    @property
    def has_room(self) -> bool:
        """Whether it takes one more delivery."""
        return self.no_ack or not self.prefetch or self.unacked < self.prefetch


@dataclass(eq=False)
class MemoryQueue:
    """Messages, consumers and limits of one queue. `owner` is the connection of an exclusive queue."""

    declared: Queue
    owner: object | None = None
    subscribers: deque[Subscriber] = field(default_factory=deque)
    _ready: list[tuple[int, int, Stored]] = field(default_factory=list)

    def __post_init__(self) -> None:
        arguments = self.declared.argument_map
        self.is_quorum = arguments.get("x-queue-type") == "quorum"
        self.delivery_limit: int | None = arguments.get("x-delivery-limit") if self.is_quorum else None
        self.max_length: int | None = arguments.get("x-max-length")
        self.refuses_overflow = str(arguments.get("x-overflow", "")).startswith("reject-publish")
        self.has_one_consumer = bool(arguments.get("x-single-active-consumer"))
        self.dead_letter_exchange: str | None = arguments.get("x-dead-letter-exchange")
        self.dead_letter_routing_key: str | None = arguments.get("x-dead-letter-routing-key")
        self._ttl: float | None = arguments["x-message-ttl"] / 1000 if "x-message-ttl" in arguments else None
        self._max_priority: int = arguments.get("x-max-priority", 0)

    def __len__(self) -> int:
        return len(self._ready)

    @property
    def is_full(self) -> bool:
        """Whether one more message would exceed x-max-length."""
        return self.max_length is not None and len(self._ready) >= self.max_length

    def put(self, stored: Stored, number: int, now: float) -> None:
        """Add a new message, after the other messages of its priority."""
        stored.number = number
        lives = [seconds for seconds in (stored.expiration, self._ttl) if seconds is not None]
        stored.expires_at = now + min(lives) if lives else None
        self._push(stored)

    def give_back(self, stored: Stored) -> None:
        """Put an unanswered message back, at the position that it had."""
        self._push(stored)

    def _push(self, stored: Stored) -> None:
        heapq.heappush(self._ready, (-self._priority(stored), stored.number, stored))

    def _priority(self, stored: Stored) -> int:
        if self.is_quorum:
            return QUORUM_DEFAULT_PRIORITY if stored.priority is None else min(stored.priority, HIGHEST_PRIORITY)
        return min(stored.priority or 0, self._max_priority)

    @property
    def head(self) -> Stored | None:
        """The next message to be delivered; the only one that can expire."""
        return self._ready[0][2] if self._ready else None

    def pop(self) -> Stored:
        """Remove and return the head."""
        return heapq.heappop(self._ready)[2]

    def messages(self) -> list[Stored]:
        """All ready messages, in order."""
        return [stored for _, _, stored in sorted(self._ready, key=lambda entry: entry[:2])]

    def keep(self, is_kept: Callable[[Stored], bool]) -> int:
        """Drop the messages that `is_kept` returns False for; how many."""
        before = len(self._ready)
        self._ready = [entry for entry in self._ready if is_kept(entry[2])]
        heapq.heapify(self._ready)
        return before - len(self._ready)

    def next_subscriber(self) -> Subscriber | None:
        """The next subscriber in turn that has room; with a single active consumer always the first one."""
        if self.has_one_consumer:
            first = self.subscribers[0] if self.subscribers else None
            return first if first is not None and first.has_room else None
        for _ in range(len(self.subscribers)):
            subscriber = self.subscribers[0]
            self.subscribers.rotate(-1)
            if subscriber.has_room:
                return subscriber
        return None


# -- Streams (https://www.rabbitmq.com/docs/streams): messages stay, and each consumer reads from its own position.
#
# Left out: x-max-age, filters, and positions by time, which mean the first message.


class StreamQueue(MemoryQueue):
    """Nothing is taken out of it: for those who look for a head to deliver or to let expire, it has none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.max_length = None
        self._max_bytes: int | None = self.declared.argument_map.get("x-max-length-bytes")
        self._bytes = 0
        self._next_offset = 0

    @property
    def head(self) -> Stored | None:
        """None."""
        return None

    def put(self, stored: Stored, number: int, now: float) -> None:
        """Add a message; its offset is in its headers."""
        properties = stored.decoded()
        properties.headers = {**(properties.headers or {}), OFFSET: self._next_offset}
        stored.properties = b"".join(properties.encode())
        self._ready.append((0, self._next_offset, stored))
        self._next_offset += 1
        self._bytes += len(stored.body)
        while self._max_bytes is not None and self._bytes > self._max_bytes and len(self._ready) > 1:
            self._bytes -= len(self._ready.pop(0)[2].body)

    def give_back(self, stored: Stored) -> None:
        """It has not left."""

    def begin_at(self, position: object) -> int:
        """The offset that a consumer begins with: `first`, `last`, `next` (also None), or a number."""
        if position is None or position == "next":
            return self._next_offset
        if position == "last":
            return max(0, self._next_offset - 1)
        return position if isinstance(position, int) else 0

    def feed(self) -> None:
        """Deliver to every consumer what it has room for."""
        for subscriber in list(self.subscribers):
            index = bisect_left(self._ready, subscriber.position, key=itemgetter(1))
            while subscriber.has_room and index < len(self._ready):
                _, offset, stored = self._ready[index]
                subscriber.position, index = offset + 1, index + 1
                subscriber.deliver(subscriber, copied(stored))


def subscribe(queue: MemoryQueue, subscriber: Subscriber, arguments: FieldTable | None) -> None:
    """Set where a consumer of a stream begins. Raises: Refused without a prefetch."""
    if not isinstance(queue, StreamQueue):
        return
    if not subscriber.prefetch:
        name = queue.declared.name
        raise Refused(PRECONDITION_FAILED, f"consumer prefetch count is not set for stream '{name}'")
    subscriber.position = queue.begin_at((arguments or {}).get(OFFSET))

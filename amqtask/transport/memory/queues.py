"""One queue of the in-process broker: order, priorities, TTL, limits, consumers in turn."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from amqtask.protocol.entities import Queue
from amqtask.transport.memory.stored import Stored

# The priority of a message without one in a quorum queue (RabbitMQ 4.3).
QUORUM_DEFAULT_PRIORITY = 4
HIGHEST_PRIORITY = 31


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

    def drop_oldest(self) -> Stored:
        """Remove and return the message that an overflow drops."""
        return self.pop()

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

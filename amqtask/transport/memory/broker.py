"""MemoryBroker: the server's end. Exchanges, bindings, queues, confirms, acks, dead letters, TTL; its clock is injected.

It behaves like RabbitMQ 4.3 where versions differ: quorum queues have strict priorities 0 to 31, and `basic.nack` does
not count towards their delivery limit (`nack_counts=True` for older ones). Left out: x-expires, x-max-length-bytes,
single active consumer, consumer priorities, and the retries of at-least-once dead-lettering.

Everything happens under one lock, in the calling thread, which leaves the frames for other connections with their ends (peer.py).
Messages expire with each operation, and by the timers of a loop that has a connection.
"""

from __future__ import annotations

import errno
import itertools
import math
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from amqtask.protocol.entities import Binding, Declaration, Exchange, Queue
from amqtask.protocol.message import DELIVERY_LIMIT, EXPIRED, MAXLEN
from amqtask.transport.memory.queues import (
    PREDECLARED,
    MemoryQueue,
    Stored,
    StreamQueue,
    Verdict,
    check_same,
    check_valid,
    copied,
    dead,
    is_cycle,
    is_match,
    not_found,
    resource_locked,
    too_large,
)

if TYPE_CHECKING:
    from amqtask.ground.loop import TurnLoop
    from amqtask.protocol.message import PropertiesLike


MAX_MESSAGE_SIZE = 16 * 1024 * 1024


class Connection(Protocol):
    """The broker's end of a connection; called under the broker's lock."""

    # The client's, if it has one.
    loop: TurnLoop | None

    def go_on(self) -> None:
        """Handle the frames that have come, as far as no alarm keeps publishes back."""

    def cut(self) -> None:
        """The connection ends; unanswered deliveries go back to their queues."""


class MemoryBroker:
    """One broker with one virtual host, shared by all publishers and consumers that are given it."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_message_size: int = MAX_MESSAGE_SIZE,
        nack_counts: bool = False,
    ) -> None:
        self.nack_counts = nack_counts
        self._clock = clock
        self._max_message_size = max_message_size
        self.lock = threading.RLock()
        self.is_up = True
        self.blocked_reason: str | None = None
        self._exchanges: dict[str, Exchange] = dict(PREDECLARED)
        self._bindings: dict[str, list[Binding]] = {}
        self._queues: dict[str, MemoryQueue] = {}
        self._connections: list[Connection] = []
        # Small texts, by name (transport.contract.Note).
        self.notes: dict[str, str] = {}
        self._numbers = itertools.count(1)
        self._driver: TurnLoop | None = None
        self._armed_at: float | None = None
        # The time to expire messages at, while messages expire that were due earlier.
        self._as_of: float | None = None

    # -- connections

    def connected(self, connection: Connection) -> None:
        """A new connection. The timers of its loop let messages expire, on time, without an operation.

        Raises: ConnectionRefusedError when the broker is stopped.
        """
        with self.lock:
            if not self.is_up:
                raise ConnectionRefusedError(errno.ECONNREFUSED, "the in-memory broker is stopped")
            self._connections.append(connection)
            self._choose_driver()

    def disconnected(self, connection: object) -> None:
        """A connection has ended: its exclusive queues are deleted."""
        self._connections = [other for other in self._connections if other is not connection]
        for name in [name for name, queue in self._queues.items() if queue.owner is connection]:
            self.delete_queue(name)
        self._choose_driver()

    def _choose_driver(self) -> None:
        # The latest: an earlier loop may have ended without closing its connections.
        loops = (connection.loop for connection in reversed(self._connections))
        driver = next((loop for loop in loops if loop is not None), None)
        if driver is not self._driver:
            self._driver, self._armed_at = driver, None
            self._arm()

    # -- entities

    def declare(self, entity: Declaration, owner: object = None, *, passive: bool = False) -> None:
        """Declare an exchange, queue or binding. Raises: Refused."""
        with self.lock:
            if isinstance(entity, Queue):
                self._declare_queue(entity, owner, passive=passive or entity.passive)
            elif isinstance(entity, Exchange):
                self._declare_exchange(entity, passive=passive or entity.passive)
            else:
                self._bind(entity)

    def _declare_queue(self, queue: Queue, owner: object, *, passive: bool) -> None:
        existing = self._queues.get(queue.name)
        if existing is not None and existing.owner not in (None, owner):
            raise resource_locked(queue.name)
        if existing is None and passive:
            raise not_found("queue", queue.name)
        if existing is None:
            check_valid(queue)
            queue_class = StreamQueue if queue.argument_map.get("x-queue-type") == "stream" else MemoryQueue
            self._queues[queue.name] = queue_class(queue, owner if queue.exclusive else None)
        elif not passive:
            check_same(queue, existing.declared)

    def _declare_exchange(self, exchange: Exchange, *, passive: bool) -> None:
        existing = self._exchanges.get(exchange.name)
        if existing is None and passive:
            raise not_found("exchange", exchange.name)
        if existing is None:
            self._exchanges[exchange.name] = exchange
        elif not passive:
            check_same(exchange, existing)

    def _bind(self, binding: Binding) -> None:
        if binding.source.name not in self._exchanges:
            raise not_found("exchange", binding.source.name)
        if binding.to_exchange and binding.destination not in self._exchanges:
            raise not_found("exchange", binding.destination)
        if not binding.to_exchange and binding.destination not in self._queues:
            raise not_found("queue", binding.destination)
        bindings = self._bindings.setdefault(binding.source.name, [])
        if _route_of(binding) not in map(_route_of, bindings):
            bindings.append(binding)

    def unbind(self, binding: Binding) -> None:
        """Remove a binding, if it is there."""
        bindings = self._bindings.get(binding.source.name, [])
        bindings[:] = [other for other in bindings if _route_of(other) != _route_of(binding)]

    def delete_exchange(self, name: str) -> None:
        """Delete an exchange and its bindings, if it is there."""
        with self.lock:
            self._exchanges.pop(name, None)
            self._bindings.pop(name, None)
            for bindings in self._bindings.values():
                bindings[:] = [
                    binding for binding in bindings if not binding.to_exchange or binding.destination != name
                ]

    def delete_queue(self, name: str) -> None:
        """Delete a queue and its messages; its consumers are cancelled."""
        with self.lock:
            queue = self._queues.pop(name, None)
            if queue is None:
                return
            for bindings in self._bindings.values():
                bindings[:] = [binding for binding in bindings if binding.to_exchange or binding.destination != name]
            for subscriber in list(queue.subscribers):
                subscriber.on_cancelled(subscriber)

    def queue(self, name: str, owner: object = None) -> MemoryQueue:
        """A queue by name. Raises: Refused."""
        queue = self._queues.get(name)
        if queue is None:
            raise not_found("queue", name)
        if queue.owner not in (None, owner):
            raise resource_locked(name)
        return queue

    # -- publishing

    def publish(self, stored: Stored, *, mandatory: bool) -> Verdict:
        """Route and store. Raises: Refused (no such exchange, too large)."""
        with self.lock:
            if len(stored.body) > self._max_message_size:
                raise too_large(len(stored.body), self._max_message_size)
            if stored.exchange and stored.exchange not in self._exchanges:
                raise not_found("exchange", stored.exchange)
            self.expire()
            queues = self._route(stored.exchange, stored, set())
            if not queues:
                return Verdict.RETURNED if mandatory else Verdict.STORED
            refused = [queue for queue in queues if queue.is_full and queue.refuses_overflow]
            for queue in queues:
                if queue not in refused:
                    self._enqueue(queue, copied(stored))
            self.expire()
            return Verdict.REFUSED if refused else Verdict.STORED

    def _route(self, exchange: str, stored: Stored, visited: set[str]) -> list[MemoryQueue]:
        if not exchange:
            named_queue = self._queues.get(stored.routing_key)
            return [named_queue] if named_queue is not None else []
        if exchange in visited:
            return []
        visited.add(exchange)
        declared = self._exchanges[exchange]
        queues: dict[int, MemoryQueue] = {}
        for binding in self._bindings.get(exchange, ()):
            if not is_match(declared, binding, stored.routing_key, stored.headers):
                continue
            reached = (
                self._route(binding.destination, stored, visited)
                if binding.to_exchange
                else [self._queues[binding.destination]]
            )
            queues.update((id(queue), queue) for queue in reached)
        alternate = dict(declared.arguments).get("alternate-exchange")
        if not queues and alternate in self._exchanges:
            return self._route(alternate, stored, visited)
        return list(queues.values())

    def _enqueue(self, queue: MemoryQueue, stored: Stored) -> None:
        if queue.is_full:
            self.dead_letter(queue, queue.pop(), MAXLEN)
        queue.put(stored, next(self._numbers), self._now())
        self.pump(queue)

    # -- deliveries

    def pump(self, queue: MemoryQueue) -> None:
        """Deliver ready messages to consumers with room, in turn; those of a stream to each of them."""
        if isinstance(queue, StreamQueue):
            queue.feed()
            return
        now = self._now()
        while (head := queue.head) is not None and (head.expires_at is None or head.expires_at >= now):
            subscriber = queue.next_subscriber()
            if subscriber is None:
                return
            subscriber.deliver(subscriber, queue.pop())

    def returned(self, queue: MemoryQueue, stored: Stored, *, counts: bool) -> None:
        """Requeue a message: it was unanswered, or nacked with requeue."""
        if self._queues.get(queue.declared.name) is not queue:
            return  # deleted meanwhile
        if counts and queue.is_quorum:
            stored.failures += 1
            if queue.delivery_limit is not None and stored.failures > queue.delivery_limit:
                self.dead_letter(queue, stored, DELIVERY_LIMIT)
                return
        queue.give_back(stored)

    def unsubscribed(self, queue: MemoryQueue) -> None:
        """Delete an auto-delete queue with its last consumer."""
        if queue.declared.auto_delete and not queue.subscribers:
            self.delete_queue(queue.declared.name)

    def dead_letter(self, queue: MemoryQueue, stored: Stored, reason: str) -> None:
        """A message has died: to the dead-letter exchange with it, if the queue has one."""
        exchange = queue.dead_letter_exchange
        if exchange is None or (exchange and exchange not in self._exchanges):
            return
        letter = dead(stored, queue.declared.name, reason, exchange, queue.dead_letter_routing_key)
        for target in self._route(exchange, letter, set()):
            if not (is_cycle(letter, target.declared.name) or (target.is_full and target.refuses_overflow)):
                self._enqueue(target, copied(letter))

    # -- time

    def expire(self) -> None:
        """Dead-letter expired messages at the heads of queues, each at its own time, until none is left."""
        with self.lock:
            now = self._clock()
            while (queue := self._next_to_expire()) is not None:
                due = _due(queue)
                if due > now:
                    break
                # When the clock was advanced by days, each hop of a delay must not be late by days.
                self._as_of = due
                self.dead_letter(queue, queue.pop(), EXPIRED)
            self._as_of = None
            for queue in list(self._queues.values()):
                self.pump(queue)
            self._arm()

    def _now(self) -> float:
        return self._clock() if self._as_of is None else self._as_of

    def _next_to_expire(self) -> MemoryQueue | None:
        queue = min(self._queues.values(), key=_due, default=None)
        return queue if queue is not None and _due(queue) < math.inf else None

    def _arm(self) -> None:
        loop, queue = self._driver, self._next_to_expire()
        if loop is None or queue is None:
            return
        due = _due(queue)
        if self._armed_at is not None and self._armed_at <= due:
            return
        self._armed_at = due
        loop.call_soon_threadsafe(lambda: self._set_timer(loop, due))

    def _set_timer(self, loop: TurnLoop, due: float) -> None:
        loop.call_later(max(0.0, due - self._clock()), self._fire)

    def _fire(self) -> None:
        with self.lock:
            self._armed_at = None
            self.expire()

    # -- for tests: faults, and looking into queues

    def cut(self) -> None:
        """End all connections; new ones work."""
        with self.lock:
            for connection in list(self._connections):
                connection.cut()

    def stop(self) -> None:
        """Stop like a node: durable queues and their persistent messages stay."""
        with self.lock:
            self.is_up = False
            self.cut()
            for name in [name for name, queue in self._queues.items() if not queue.declared.durable]:
                self.delete_queue(name)
            for queue in self._queues.values():
                queue.keep(lambda stored, queue=queue: stored.is_persistent or queue.is_quorum)  # type: ignore[misc]

    def start(self) -> None:
        """Start again."""
        self.is_up = True

    def block(self, reason: str = "low on memory") -> None:
        """A memory or disk alarm: publishes wait."""
        with self.lock:
            self.blocked_reason = reason

    def unblock(self) -> None:
        """End the alarm."""
        with self.lock:
            self.blocked_reason = None
            for connection in list(self._connections):
                connection.go_on()

    def count(self, name: str) -> int:
        """How many messages are ready; 0 for a queue that does not exist."""
        with self.lock:
            self.expire()
            return len(self._queues[name]) if name in self._queues else 0

    def queue_names(self) -> list[str]:
        """The names of all queues."""
        with self.lock:
            return list(self._queues)

    def messages(self, name: str) -> list[tuple[PropertiesLike, bytes]]:
        """(properties, body) of all ready messages, in order; they stay."""
        with self.lock:
            self.expire()
            return [(stored.decoded(), stored.body) for stored in self._queues[name].messages()]

    def purge(self, name: str) -> int:
        """Drop all ready messages; how many."""
        with self.lock:
            return self._queues[name].keep(lambda _: False)


def _route_of(binding: Binding) -> object:
    """Which binding it is: whatever else a client knows of its exchange."""
    return binding.source.name, binding.destination, binding.to_exchange, binding.routing_key, binding.arguments


def _due(queue: MemoryQueue) -> float:
    head = queue.head
    return math.inf if head is None or head.expires_at is None else head.expires_at


class ManualClock:
    """Seconds that pass when `advance` says so; give it to a MemoryBroker and to its clients' loop."""

    def __init__(self, now: float = 1_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

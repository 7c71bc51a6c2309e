"""How a worker divides its slots among its queues (`-Q reports:2,web:2+`), and queues among its pools.

Some slots are reserved: one that is not in use is kept free for its queue. The others are shared; all queues take turns for
them, and a queue that has its own in use, too. Of several pools each divides its slots among its own queues. What may not start
yet waits in its queue's line, where it holds up nobody. What is a queue's is its shards', too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import ConfigurationError
from amqtask.topology.declarations import base_of
from amqtask.topology.slots import QueueSlots

if TYPE_CHECKING:
    from amqtask.execution.request import Request
    from amqtask.ground.shapes import JsonObject
    from amqtask.pool import Pool

_SHARED = QueueSlots()


class CountedByQueue(dict[int, "Request"]):
    """The running requests by number; `count` has how many there are of each queue, its shards included."""

    def __init__(self, running: Mapping[int, Request]) -> None:
        super().__init__(running)
        self.count = Counter(base_of(request.queue) for request in running.values())

    def __setitem__(self, number: int, request: Request) -> None:
        super().__setitem__(number, request)
        self.count[base_of(request.queue)] += 1

    def __delitem__(self, number: int) -> None:
        self.count[base_of(self[number].queue)] -= 1
        super().__delitem__(number)

    def pop(self, number: int, *default: Any) -> Any:
        request = super().pop(number, *default)
        if request is not None:
            self.count[base_of(request.queue)] -= 1
        return request

    def clear(self) -> None:
        super().clear()
        self.count.clear()


def check_reserved(given: Mapping[str, QueueSlots], queues: Iterable[str], slots: int) -> None:
    """Raises: ConfigurationError, when so many slots are not enough for what these queues reserve and for the others of them."""
    owns = {queue: given.get(queue, _SHARED) for queue in queues}
    reserved = sum(own.reserved for own in owns.values())
    others = sorted(queue for queue, own in owns.items() if not own.reserved)
    if reserved > slots or (reserved == slots and others):
        asked = ", ".join(f"{queue}:{own}" for queue, own in sorted(owns.items()) if own.reserved)
        rest = f", and none would be left for {', '.join(others)}" if others else ""
        raise ConfigurationError(
            f"{asked} keeps {reserved} slots free, and there are {slots}{rest}: reserve fewer, or have more slots (-c)"
        )


class Division:
    """Which queues may take another slot; falsy while nothing is divided: one pool, and no queue has slots of its own.

    `given` are the slots of queues, also of some that this worker does not consume; for those in `consumed` slots are kept
    free. `most_slots` is autoscale's maximum, or None.
    """

    def __init__(
        self, pool: Pool, given: Mapping[str, QueueSlots], consumed: Iterable[str], most_slots: int | None
    ) -> None:
        self._pool = pool
        self._given = dict(given)
        self._consumed = set(map(base_of, consumed))
        self.most_slots = most_slots
        self._running = CountedByQueue({})
        self._is_used = len(pool.members) > 1 or not self._given.keys().isdisjoint(self._consumed)

    def __bool__(self) -> bool:
        return self._is_used

    @property
    def slots(self) -> int:
        """How many tasks may run at once (with autoscale: the maximum)."""
        return sum(map(self._slots_of, self._pool.members))

    def _slots_of(self, pool: Pool) -> int:
        """How many a pool has, or may get: autoscale is for the first."""
        return (self.most_slots if pool is self._pool.members[0] else None) or pool.slots

    def counted(self, running: dict[int, Request]) -> dict[int, Request]:
        """The running requests, counted from now on where it matters."""
        if isinstance(running, CountedByQueue) or not self:
            return running
        self._running = CountedByQueue(running)
        return self._running

    def give(self, queue: str, own: QueueSlots) -> None:
        """Give a queue slots of its own, or others than it had. Raises: ConfigurationError (so many cannot be kept free)."""
        pool = self._pool.member(queue := base_of(queue))
        check_reserved({**self._given, queue: own}, {queue, *self._queues_of(pool)}, self._slots_of(pool))
        self._given[queue] = own
        self._is_used = True

    def consumes(self, queue: str) -> None:
        self._consumed.add(base_of(queue))
        self._is_used |= base_of(queue) in self._given

    def leaves(self, queue: str) -> None:
        """The queue is not consumed any more: nothing is kept free for it."""
        self._consumed.discard(queue)

    # -- while it runs

    def has_room(self, queue: str) -> bool:
        """Whether a request of the queue can start now."""
        pool = self._pool.member(queue := base_of(queue))
        return pool.free > 0 and self._may_start(queue, pool)

    def is_full(self, queue: str) -> bool:
        """Whether tasks of the queue run, and no more may begin."""
        if not self._running.count[queue := base_of(queue)]:
            return False
        pool = self._pool.member(queue)
        # Not what the pool says is free: it takes more than it has slots while tasks are short.
        return self.running_in(pool) >= pool.slots or not self._may_start(queue, pool)

    def most(self, queue: str) -> int:
        """How many slots the queue may take at most."""
        queue = base_of(queue)
        pool, own = self._pool.member(queue), self._own(queue)
        slots, queues = self._slots_of(pool), self._queues_of(pool)
        most = max(1, min(slots, own.reserved + self._shared(queues, slots)))
        return most if own.most is None else min(most, own.most)

    def needed(self, waiting: Mapping[str, int]) -> int:
        """How many slots of the first pool would let all run that may: of what runs, and of so many of each queue that wait."""
        needed, first = 0, self._pool.members[0]
        for queue in {*self._running.count, *waiting, *(self._given.keys() & self._consumed)}:
            if self._pool.member(queue) is first:
                own, wanted = self._own(queue), self._running.count[queue] + waiting.get(queue, 0)
                needed += max(own.reserved, wanted if own.most is None else min(wanted, own.most))
        return needed

    def running_in(self, pool: Pool) -> int:
        """How many requests one of the pools has."""
        if len(self._pool.members) == 1:
            return len(self._running)
        return sum(count for queue, count in self._running.count.items() if self._pool.member(queue) is pool)

    def stats(self) -> JsonObject:
        """What each queue that has slots of its own may take, and takes."""
        return {
            name: {"slots": str(slots), "running": self._running.count[name]}
            for name, slots in sorted(self._given.items())
            if name in self._consumed
        }

    def _may_start(self, queue: str, pool: Pool) -> bool:
        own, running = self._own(queue), self._running.count
        if own.most is not None and running[queue] >= own.most:
            return False
        if running[queue] < own.reserved:
            return True
        queues = self._queues_of(pool)
        if not any(self._own(name).reserved for name in queues):
            return True
        in_reserved = sum(min(running[name], self._own(name).reserved) for name in queues)
        return self.running_in(pool) - in_reserved < self._shared(queues, pool.slots)

    def _own(self, queue: str) -> QueueSlots:
        own = self._given.get(queue, _SHARED)
        return own if queue in self._consumed else QueueSlots(most=own.most)

    def _queues_of(self, pool: Pool) -> list[str]:
        return [queue for queue in self._consumed if self._pool.member(queue) is pool]

    def _shared(self, queues: Iterable[str], slots: int) -> int:
        """The slots that are for all: at least one, if a queue has no other, also when the pool has shrunk."""
        reserved = [self._own(queue).reserved for queue in queues]
        return max(0 if all(reserved) else 1, slots - sum(reserved))

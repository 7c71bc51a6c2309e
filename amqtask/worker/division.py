"""How a worker divides its slots among its queues (`-Q reports:2,web:2+`).

Some slots are reserved: one that is not in use is kept free for its queue. The others are shared; all queues take turns for
them, and a queue that has its own in use, too. What may not start yet waits in its queue's line, where it holds up nobody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import ConfigurationError
from amqtask.topology.slots import QueueSlots

if TYPE_CHECKING:
    from amqtask.execution.request import Request
    from amqtask.ground.shapes import JsonObject

_SHARED = QueueSlots()


class CountedByQueue(dict[int, "Request"]):
    """The running requests by number; `count` has how many there are of each queue."""

    def __init__(self, running: Mapping[int, Request]) -> None:
        super().__init__(running)
        self.count = Counter(request.queue for request in running.values())

    def __setitem__(self, number: int, request: Request) -> None:
        super().__setitem__(number, request)
        self.count[request.queue] += 1

    def __delitem__(self, number: int) -> None:
        self.count[self[number].queue] -= 1
        super().__delitem__(number)

    def pop(self, number: int, *default: Any) -> Any:
        request = super().pop(number, *default)
        if request is not None:
            self.count[request.queue] -= 1
        return request

    def clear(self) -> None:
        super().clear()
        self.count.clear()


class Division:
    """Which queues may take another slot; falsy until one has slots of its own. `given` are the slots of queues, also of some
    that this worker does not consume; for those in `consumed` slots are kept free."""

    def __init__(self, given: Mapping[str, QueueSlots], consumed: Iterable[str]) -> None:
        self._given = dict(given)
        self._consumed = set(consumed)
        self._running = CountedByQueue({})
        self._is_used = not self._given.keys().isdisjoint(self._consumed)

    def __bool__(self) -> bool:
        return self._is_used

    def counted(self, running: dict[int, Request]) -> dict[int, Request]:
        """The running requests, counted from now on where it matters. They stay so: others may have them."""
        if isinstance(running, CountedByQueue) or not self:
            return running
        self._running = CountedByQueue(running)
        return self._running

    def give(self, queue: str, own: QueueSlots, slots: int) -> None:
        """Give a queue slots of its own, or others than it had. Raises: ConfigurationError, as `check` does."""
        Division({**self._given, queue: own}, {*self._consumed, queue}).check(slots)
        self._given[queue] = own
        self._is_used = True

    def consumes(self, queue: str) -> None:
        self._consumed.add(queue)
        self._is_used |= queue in self._given

    def leaves(self, queue: str) -> None:
        """The queue is not consumed any more: nothing is kept free for it."""
        self._consumed.discard(queue)

    def check(self, slots: int) -> None:
        """Raises: ConfigurationError, when a worker with so many slots cannot keep what is reserved."""
        reserved = self._reserved()
        open_queues = sorted(name for name in self._consumed if not self._slots(name).reserved)
        if reserved > slots or (reserved == slots and open_queues):
            asked = ", ".join(f"{name}:{self._given[name]}" for name in sorted(self._consumed & self._given.keys()))
            rest = f", and none would be left for {', '.join(open_queues)}" if open_queues else ""
            raise ConfigurationError(
                f"{asked} keeps {reserved} slots free, this worker has {slots}{rest}: reserve fewer, or raise -c"
            )

    # -- while it runs

    def has_room(self, queue: str, slots: int) -> bool:
        """Whether the queue may take another one of `slots`, if one is free."""
        own, running = self._slots(queue), self._running.count[queue]
        if own.most is not None and running >= own.most:
            return False
        if running < own.reserved:
            return True
        reserved = self._reserved()
        if not reserved:
            return True
        in_reserved = sum(min(self._running.count[name], self._slots(name).reserved) for name in self._consumed)
        return len(self._running) - in_reserved < self._shared(slots)

    def is_full(self, queue: str, slots: int) -> bool:
        """Whether tasks of the queue run, and no more may begin."""
        return self._running.count[queue] > 0 and not self.has_room(queue, slots)

    def most(self, queue: str, slots: int) -> int:
        """How many of `slots` the queue may take at most."""
        own = self._slots(queue)
        most = max(1, own.reserved + self._shared(slots)) if self._reserved() else slots
        return min(most, slots) if own.most is None else min(most, slots, own.most)

    def needed(self, waiting: Mapping[str, int]) -> int:
        """How many slots would let all run that may, of those that run and of so many of each queue that wait."""
        needed = 0
        for queue in {*self._running.count, *waiting, *(self._given.keys() & self._consumed)}:
            own, wanted = self._slots(queue), self._running.count[queue] + waiting.get(queue, 0)
            needed += max(own.reserved, wanted if own.most is None else min(wanted, own.most))
        return needed

    def stats(self) -> JsonObject:
        """What each queue that has slots of its own may take, and takes."""
        return {
            name: {"slots": str(slots), "running": self._running.count[name]}
            for name, slots in sorted(self._given.items())
            if name in self._consumed
        }

    def _slots(self, queue: str) -> QueueSlots:
        own = self._given.get(queue, _SHARED)
        return own if queue in self._consumed else QueueSlots(most=own.most)

    def _reserved(self) -> int:
        return sum(self._slots(name).reserved for name in self._consumed)

    def _shared(self, slots: int) -> int:
        """The slots that are for all: at least one, if a queue has no other, also when the pool has shrunk."""
        least = 0 if all(self._slots(name).reserved for name in self._consumed) else 1
        return max(least, slots - self._reserved())

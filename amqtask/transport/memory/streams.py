"""StreamQueue: a stream (https://www.rabbitmq.com/docs/streams). Its messages stay; each consumer reads from its own position.

Left out: x-max-age, filters, and positions by time, which mean the first message.
"""

from __future__ import annotations

from bisect import bisect_left
from operator import itemgetter
from typing import TYPE_CHECKING

from amqtask.transport.contract import OFFSET
from amqtask.transport.errors import PRECONDITION_FAILED
from amqtask.transport.memory.queues import MemoryQueue, Refused, Stored, Subscriber, copied

if TYPE_CHECKING:
    from amqtask.ground.shapes import FieldTable


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
        raise Refused(
            PRECONDITION_FAILED, f"PRECONDITION_FAILED - consumer prefetch count is not set for stream '{name}'"
        )
    subscriber.position = queue.begin_at((arguments or {}).get(OFFSET))

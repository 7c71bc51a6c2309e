"""The prefetch windows of all queues of a worker; changes the consumer's prefetch when a window changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from amqtask.worker.prefetch import Window

if TYPE_CHECKING:
    from amqtask.transport.contract import Consumer

# How often `look` really looks; it is called once per loop turn.
LOOK_SECONDS = 0.01
# The most extra deliveries per window while the broker confirms nothing.
MOST_ROOM = 4096


class Windows:
    """One Window per queue. `on_closed(queue)` is called when one closes because the tasks have become long, `on_opened(queue)`
    when it changes otherwise; `old_deliveries(queue)` is how many deliveries from before the closing are still here."""

    def __init__(
        self,
        consumer: Consumer,
        *,
        slots: int,
        pinned: int | None,
        on_closed: Callable[[str], None],
        on_opened: Callable[[str], None],
        old_deliveries: Callable[[str], int],
    ) -> None:
        self._consumer = consumer
        self._slots = slots
        self._pinned = pinned
        self._on_closed = on_closed
        self._on_opened = on_opened
        self._old_deliveries = old_deliveries
        self._has_old_deliveries = False
        self._next_look = 0.0
        self._room = 0
        # The worker adds each ended task's runtime to these directly.
        self.by_queue: dict[str, Window] = {}

    def add(self, queue: str) -> Window:
        """Add the window of a queue that is going to be consumed."""
        window = self.by_queue[queue] = Window(self._slots, self._pinned)
        window.held = self._room
        return window

    def remove(self, queue: str) -> None:
        self.by_queue.pop(queue, None)
        self._on_opened(queue)

    def resize(self, slots: int) -> None:
        """The pool has another number of slots."""
        self._slots = slots
        for window in self.by_queue.values():
            window.resize(slots)

    def shift(self, by: int) -> None:
        """Make each window larger (or smaller) by so many, by remote control."""
        for queue, window in self.by_queue.items():
            window.shift(by)
            self._consumer.set_prefetch(queue, window.room)

    def hold(self, count: int) -> None:
        """Make room for so many ended tasks that wait for confirms. In powers of two, and not down and up again, because a change
        costs a consumer."""
        if self._room >> 2 < count <= self._room:
            return
        self._room = min(MOST_ROOM, 1 << (count - 1).bit_length()) if count else 0
        for window in self.by_queue.values():
            window.held = self._room

    def look(self, now: float) -> None:
        """Change the windows that should change now."""
        if now < self._next_look and not self._has_old_deliveries:
            return
        self._next_look = now + LOOK_SECONDS
        self._has_old_deliveries = False
        for queue, window in self.by_queue.items():
            old_size = window.current
            new_size = window.look(now)
            if new_size is not None:
                self._changed(queue, window, has_closed=new_size < old_size and window.is_for_long_tasks)
            elif window.old_deliveries:
                self._set_prefetch(queue, window)

    def _changed(self, queue: str, window: Window, *, has_closed: bool) -> None:
        if has_closed and window.pinned is None:
            self._on_closed(queue)
        else:
            self._on_opened(queue)
        self._set_prefetch(queue, window)

    def _set_prefetch(self, queue: str, window: Window) -> None:
        """Set the prefetch to the window without the deliveries from before its closing."""
        window.old_deliveries = self._old_deliveries(queue)
        if window.room == window.current:
            window.old_deliveries = 0
        else:
            self._has_old_deliveries = True
        self._consumer.set_prefetch(queue, window.room)

    def are_long(self, queue: str) -> bool:
        """Whether the tasks of a queue are long now."""
        window = self.by_queue.get(queue)
        return window is not None and window.is_for_long_tasks

    def nothing_ends(self, seconds: float) -> None:
        """All slots have been busy for so long, and no task ended."""
        for window in self.by_queue.values():
            window.saw_nothing_end(seconds)

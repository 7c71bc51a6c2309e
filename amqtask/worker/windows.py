"""The prefetch windows of all queues of a worker, and telling the consumer when one changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from amqtask.worker.prefetch import Window

if TYPE_CHECKING:
    from amqtask.transport.contract import Consumer

# How often `look` really looks; it is called once per loop turn.
LOOK_SECONDS = 0.01
# While the broker takes nothing at all, no more than this runs on top of the windows.
MOST_ROOM = 4096


class Windows:
    """One Window per queue. `on_closed(queue)` is told when one closes because the tasks have become long, `on_opened(queue)`
    when it changes otherwise; `held(queue)` says how many deliveries from before the closing are still here."""

    def __init__(
        self,
        consumer: Consumer,
        *,
        slots: int,
        pinned: int | None,
        on_closed: Callable[[str], None],
        on_opened: Callable[[str], None],
        held: Callable[[str], int],
    ) -> None:
        self._consumer = consumer
        self._slots = slots
        self._pinned = pinned
        self._on_closed = on_closed
        self._on_opened = on_opened
        self._held = held
        self._is_burdened = False
        self._next_look = 0.0
        self._room = 0
        # The worker adds each ended task's runtime to these directly.
        self.by_queue: dict[str, Window] = {}

    def add(self, queue: str) -> Window:
        """A queue that is going to be consumed."""
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
        """So many more (or fewer) of each queue, by hand."""
        for queue, window in self.by_queue.items():
            window.shift(by)
            self._consumer.set_prefetch(queue, window.room)

    def hold(self, count: int) -> None:
        """So many ended tasks wait for the broker. In powers of two, and not down and up again: a change costs a consumer."""
        if self._room >> 2 < count <= self._room:
            return
        self._room = min(MOST_ROOM, 1 << (count - 1).bit_length()) if count else 0
        for window in self.by_queue.values():
            window.held = self._room

    def look(self, now: float) -> None:
        """Change what should change."""
        if now < self._next_look and not self._is_burdened:
            return
        self._next_look = now + LOOK_SECONDS
        self._is_burdened = False
        for queue, window in self.by_queue.items():
            before = window.current
            wanted = window.look(now)
            if wanted is not None:
                self._changed(queue, window, has_closed=wanted < before and window.is_for_long_tasks)
            elif window.burden:
                self._unburden(queue, window)

    def _changed(self, queue: str, window: Window, *, has_closed: bool) -> None:
        if has_closed and window.pinned is None:
            self._on_closed(queue)
        else:
            self._on_opened(queue)
        self._unburden(queue, window)

    def _unburden(self, queue: str, window: Window) -> None:
        """As much as the worker has room for, after what it holds from before."""
        window.burden = self._held(queue)
        if window.room == window.current:
            window.burden = 0
        else:
            self._is_burdened = True
        self._consumer.set_prefetch(queue, window.room)

    def are_long(self, queue: str) -> bool:
        """Whether the tasks of a queue are long now."""
        window = self.by_queue.get(queue)
        return window is not None and window.is_for_long_tasks

    def nothing_ends(self, seconds: float) -> None:
        """All slots have been busy for so long and nothing ended."""
        for window in self.by_queue.values():
            window.saw_nothing_end(seconds)

"""Time limits: the soft one is raised by a timer in the child, the hard one is watched by the parent."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from amqtask.exceptions import SoftTimeLimitExceeded
from amqtask.execution.thread_interrupt import ThreadInterrupt
from amqtask_pools._alarm import Alarm

if TYPE_CHECKING:
    from amqtask.pool import Loop, Timer


class SoftLimits:
    """In a child's main thread: `begin` before a task that has a soft limit, `end` after each task."""

    def __init__(self) -> None:
        # Raises the soft limit in the running task.
        self._strike: ThreadInterrupt | None = None
        # Made for the first task that needs it.
        self._alarm: Alarm | None = None

    def begin(self, seconds: float) -> None:
        """The task that begins now may run so long."""
        self._strike = ThreadInterrupt(SoftTimeLimitExceeded(seconds), self._set_timer)
        self._set_timer(max(seconds, 1e-6))

    def strike_now(self, reason: str, frame: FrameType | None) -> None:
        """Raise the soft limit in the running task now. In a coroutine it is raised later: the alarm rings again."""
        self._strike = ThreadInterrupt(SoftTimeLimitExceeded(reason), self._set_timer)
        self._strike(frame)

    def end(self) -> None:
        """The task has ended: nothing may be raised any more."""
        if self._strike is not None:
            self._strike.end()
            self._strike = None

    def _ring(self, frame: FrameType | None) -> None:
        if self._strike is not None:
            self._strike(frame)

    def _set_timer(self, seconds: float) -> None:
        if self._alarm is None:
            self._alarm = Alarm(self._ring)
        self._alarm.set(seconds)


class HardLimits:
    """One timer for all hard limits: it is due at the earliest deadline, and `look` returns the next one."""

    def __init__(self, loop: Loop, look: Callable[[], float | None]) -> None:
        self._loop = loop
        self._look = look
        self._timer: Timer | None = None
        self._due = 0.0

    def watch(self, deadline: float) -> None:
        """Look no later than at this time (of time.monotonic)."""
        if self._timer is None or deadline < self._due:
            self.stop()
            self._due = deadline
            self._timer = self._loop.call_later(max(0.0, deadline - time.monotonic()), self._is_due)

    def stop(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _is_due(self) -> None:
        self._timer = None
        deadline = self._look()
        if deadline is not None:
            self.watch(deadline)

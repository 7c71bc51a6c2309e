"""Time limits: the soft one is raised by a timer in the child, the hard one is watched by the parent."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from amqtask.exceptions import SoftTimeLimitExceeded
from amqtask.execution.striking import Strike

if TYPE_CHECKING:
    from amqtask.pool import Loop, Timer

# The limit may strike in our own code, just before or after the task; it is tried again so often (seconds).
TRY_AGAIN = 0.01


class SoftLimit:
    """`with SoftLimit(seconds): executor.execute(…)` in a child's main thread."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._before: object = None
        self._strike = Strike(SoftTimeLimitExceeded(seconds), set_timer)

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGALRM, lambda _, frame: self._strike(frame))
        set_timer(max(self._seconds, 1e-6))

    def __exit__(self, *_: object) -> None:
        self._strike.end()
        set_timer(0)
        signal.signal(signal.SIGALRM, self._before)  # type: ignore[arg-type] # what signal.signal returned


def set_timer(seconds: float) -> None:
    """Have SIGALRM come in so many seconds, and again until it is turned off (0)."""
    signal.setitimer(signal.ITIMER_REAL, seconds, TRY_AGAIN)


class HardLimits:
    """One timer for all: it is due at the earliest deadline that it was told of, and `look` returns the next one."""

    def __init__(self, loop: Loop, look: Callable[[], float | None]) -> None:
        self._loop = loop
        self._look = look
        self._timer: Timer | None = None
        self._due = 0.0

    def watch(self, deadline: float) -> None:
        """Look at this time (of time.monotonic) at the latest."""
        if self._timer is None or deadline < self._due:
            self.stop()
            self._due = deadline
            self._timer = self._loop.call_later(max(0.0, deadline - time.monotonic()), self._is_due)

    def stop(self) -> None:
        """Watch no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _is_due(self) -> None:
        self._timer = None
        deadline = self._look()
        if deadline is not None:
            self.watch(deadline)

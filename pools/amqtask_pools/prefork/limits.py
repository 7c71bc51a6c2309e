"""The soft time limit inside a child: a timer whose signal raises SoftTimeLimitExceeded in the task."""

from __future__ import annotations

import signal
from typing import Any

from amqtask.exceptions import SoftTimeLimitExceeded


class SoftLimit:
    """`with SoftLimit(seconds): …` in the child's main thread; None is no limit."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        if self._seconds is not None:
            signal.signal(signal.SIGALRM, self._exceeded)
            signal.setitimer(signal.ITIMER_REAL, self._seconds)

    def __exit__(self, *_: object) -> None:
        if self._seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def _exceeded(self, *_: Any) -> None:
        raise SoftTimeLimitExceeded(self._seconds)

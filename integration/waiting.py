"""The one way to wait for what must happen, on a machine that may be slow, or stand still for a while.

Only the standard library is used: this runs before anything is installed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

# Seconds for what must happen, unless said otherwise. A test that passes does not wait for them.
LONG = 90.0
# A sleep that takes so many seconds longer than it was told to: nothing ran meanwhile, what is awaited neither.
STALL = 1.0
# Settings of a test's own client, which does not give up while the machine stands still: `AmqTask("client", **PATIENT)`.
PATIENT: dict[str, Any] = {"broker_publish_timeout": 60.0, "broker_connection_timeout": 60.0}


class NeverHappened(AssertionError):
    """What a test waited for did not come true before its deadline."""


class Patience:
    """Some seconds, without those in which the whole machine stood still."""

    def __init__(self, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._deadline = clock() + seconds
        self.stalled = 0.0

    @property
    def is_over(self) -> bool:
        """Whether they have passed."""
        return self._clock() > self._deadline

    def pause(self, seconds: float, sleep: Callable[[float], object] = time.sleep) -> None:
        """Sleep, and do not count what that took too long."""
        began = self._clock()
        sleep(seconds)
        lost = self._clock() - began - seconds
        if lost > STALL:
            self.stalled += lost
            self._deadline += lost


def eventually(
    condition: Callable[[], object],
    timeout: float = LONG,
    *,
    what: str | Callable[[], str] = "",
    every: float = 0.02,
    sleep: Callable[[float], object] = time.sleep,
) -> None:
    """Return once `condition()` is true; raises NeverHappened after `timeout` seconds.

    `what` is said then; give a function if it tells how things are, which is to be asked at the end, not before.
    """
    patience = Patience(timeout)
    while True:
        is_last = patience.is_over
        if condition():
            return
        if is_last:
            told = what if isinstance(what, str) else what()
            stood = f" (the machine stood still for {patience.stalled:.0f} s more)" if patience.stalled else ""
            raise NeverHappened(f"{told or 'still not so'}, after {timeout:g} s{stood}")
        patience.pause(every, sleep)

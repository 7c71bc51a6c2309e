"""A periodic call on the worker's loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amqtask.pool import Loop, Timer


class Ticker:
    """Calls `tick` every `seconds` between `start` and `stop`; both may be called twice."""

    def __init__(self, loop: Loop, seconds: float, tick: Callable[[], None]) -> None:
        self._loop = loop
        self._seconds = seconds
        self._tick = tick
        self._timer: Timer | None = None
        self._running = False

    def start(self) -> None:
        if not self._running:
            self._running = True
            self._timer = self._loop.call_later(self._seconds, self._fire)

    def stop(self) -> None:
        self._running = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fire(self) -> None:
        if self._running:
            self._timer = self._loop.call_later(self._seconds, self._fire)
            self._tick()

"""Timers by name: setting one again takes the place of the first."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amqtask.ground.loop import Timer, TurnLoop


class Timers:
    """After `stop` none runs any more."""

    def __init__(self, loop: TurnLoop) -> None:
        self._loop = loop
        self._timers: dict[str, Timer] = {}

    def later(self, name: str, seconds: float, call: Callable[[], None]) -> None:
        """Call after so many seconds."""
        before = self._timers.pop(name, None)
        if before is not None:
            before.cancel()

        def run() -> None:
            self._timers.pop(name, None)
            call()

        self._timers[name] = self._loop.call_later(seconds, run)

    def stop(self) -> None:
        """Cancel all."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

"""How fast missing children are replaced: at once, but slower and slower when they die as soon as they start."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from amqtask.ground.printable import bounded_logger

if TYPE_CHECKING:
    from amqtask.pool import Loop, Timer

logger = bounded_logger("amqtask.pools")
# After so many children in a row that died before their first outcome there is a pause; its first and longest length (seconds).
QUICK_DEATHS, FIRST_PAUSE, LONGEST_PAUSE = 10, 0.5, 30.0


class Respawn:
    """`fork` starts one child, `missing` tells how many are missing; `on_late` is called after one was started later."""

    def __init__(
        self, loop: Loop, *, fork: Callable[[], None], missing: Callable[[], int], on_late: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._fork = fork
        self._missing = missing
        self._on_late = on_late
        self._deaths = 0
        # How often in a row the system refused to fork.
        self._refusals = 0
        self._timer: Timer | None = None

    def works(self) -> None:
        """A child has answered."""
        self._deaths = 0

    def died_early(self) -> None:
        """A child is gone that had not sent an outcome, and ran no task."""
        self._deaths += 1

    def fill(self) -> None:
        """Start the missing children, now or after the pause."""
        if self._timer is not None:
            return
        if self._deaths < QUICK_DEATHS:
            for _ in range(self._missing()):
                if not self._forked():
                    return
        elif self._missing() > 0:
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self._deaths - QUICK_DEATHS, 16))
            logger.error(
                "%d pool processes in a row ended before they had run anything; the next starts in %g s",
                self._deaths,
                pause,
            )
            self._timer = self._loop.call_later(pause, self._try_one)

    def stop(self) -> None:
        """Start no more children."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _forked(self) -> bool:
        """Fork a child; False when the system refused, and another attempt follows."""
        try:
            self._fork()
        except OSError as error:
            self._refusals += 1
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self._refusals - 1, 16))
            logger.error("no pool process can be started (%s); the next attempt is in %g s", error, pause)
            self._timer = self._loop.call_later(pause, self._try_one)
            return False
        self._refusals = 0
        return True

    def _try_one(self) -> None:
        self._timer = None
        if self._missing() > 0 and self._forked():
            self.fill()
            self._on_late()

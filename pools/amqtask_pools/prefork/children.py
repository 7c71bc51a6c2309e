"""Which child gets the next request: an idle one, or while tasks are short the one with the fewest requests; and when missing
children are replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from amqtask.ground.loop import OneTimer, exponential_backoff
from amqtask.ground.printable import bounded_logger
from amqtask_pools.prefork.child import SHORT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from amqtask.execution.request import Outcome
    from amqtask.pool import Loop
    from amqtask_pools.prefork.process import ChildProcess

# A child may have so many requests at once, while the mean runtime is below SHORT.
LOOK_AHEAD = 32
# Requests with larger bodies (bytes) go to idle children only: LOOK_AHEAD smaller ones fit into the smallest socket buffer.
LARGE = 4 * 1024


class Children:
    """The children, and how many requests they have. Its methods only count and choose; they do not touch the children."""

    def __init__(self) -> None:
        # All live children, also those that are leaving.
        self.live: list[ChildProcess] = []
        # Of the children that take requests: how many there are, how many requests they have, and which of them are idle;
        # the last of these is the warmest, and the first are those that are not ready.
        self.taking = 0
        self.in_flight = 0
        self.idle: list[ChildProcess] = []
        # Children whose task takes long: they get no more requests before it ends.
        self.slow: set[ChildProcess] = set()
        self._mean = 1.0

    @property
    def room(self) -> int:
        """How many requests the children take now."""
        if self._mean >= SHORT:
            return len(self.idle)
        if self.slow:
            return sum(LOOK_AHEAD - len(child.requests) for child in self.live if self._is_open(child))
        return self.taking * LOOK_AHEAD - self.in_flight

    def choose(self, size: int) -> ChildProcess | None:
        """A child for a request whose body has `size` bytes; None when all are busy."""
        if self.idle:
            return self.idle[-1]
        if self._mean >= SHORT or size > LARGE:
            return None
        best: ChildProcess | None = None
        fewest = LOOK_AHEAD
        for child in self.live:
            if len(child.requests) < fewest and not child.is_full and self._is_open(child):
                best, fewest = child, len(child.requests)
        return best

    def _is_open(self, child: ChildProcess) -> bool:
        return not child.is_leaving and child not in self.slow

    def note_given(self, child: ChildProcess) -> None:
        """The child that `choose` chose is about to get the request."""
        if not child.requests:
            self.idle.pop()
        self.in_flight += 1

    def note_taken_back(self, child: ChildProcess, count: int) -> None:
        """So many requests were taken back from the child."""
        if not child.is_leaving:
            self.in_flight -= count
            if not child.requests:
                self.idle.insert(0, child)

    def note_outcomes(self, child: ChildProcess, outcomes: Sequence[Outcome]) -> None:
        """The child has sent these outcomes."""
        mean, ended = self._mean, len(outcomes)
        for outcome in outcomes:
            mean += (outcome.runtime - mean) * 0.1
            if outcome.going_on is not None:
                ended -= 1
        self._mean = mean
        self.slow.discard(child)
        if not child.is_leaving:
            self.in_flight -= ended
            if not child.requests:
                self.idle.append(child)

    # -- children come and go

    def add(self, child: ChildProcess) -> None:
        """Add a new child."""
        self.live.append(child)
        self.idle.insert(0, child)
        self.taking += 1

    def note_ready(self, child: ChildProcess) -> None:
        """The child has started."""
        if child in self.idle:
            self.idle.remove(child)
            self.idle.append(child)

    def note_retiring(self, child: ChildProcess) -> None:
        """The child takes no more requests; call this before `is_leaving` is set."""
        if child.is_leaving:
            return
        self.taking -= 1
        self.in_flight -= len(child.requests)
        self.slow.discard(child)
        if not child.requests:
            self.idle.remove(child)

    def clear(self) -> None:
        """All children are gone."""
        self.live.clear()
        self.idle.clear()
        self.slow.clear()
        self.taking = self.in_flight = 0


# -- How fast missing children are replaced: at once, but slower and slower when they die as soon as they start.

logger = bounded_logger("amqtask.pools")
# After so many children in a row that died before their first outcome there is a pause; its first and longest length
# (seconds).
QUICK_DEATHS, FIRST_PAUSE, LONGEST_PAUSE = 10, 0.5, 30.0


class Respawn:
    """`fork` starts one child, `missing` tells how many are missing; `on_late` is called after one was started later."""

    def __init__(
        self, loop: Loop, *, fork: Callable[[], None], missing: Callable[[], int], on_late: Callable[[], None]
    ) -> None:
        self._fork = fork
        self._missing = missing
        self._on_late = on_late
        self._deaths = 0
        # How often in a row the system refused to fork.
        self._refusals = 0
        self._timer = OneTimer(loop)

    def works(self) -> None:
        """A child has answered."""
        self._deaths = 0

    def died_early(self) -> None:
        """A child is gone that had not sent an outcome, and ran no task."""
        self._deaths += 1

    def fill(self) -> None:
        """Start the missing children, now or after the pause."""
        if self._timer.is_set:
            return
        if self._deaths < QUICK_DEATHS:
            for _ in range(self._missing()):
                if not self._forked():
                    return
        elif self._missing() > 0:
            pause = _pause(self._deaths - QUICK_DEATHS)
            logger.error(
                "%d pool processes in a row ended before they had run anything; the next starts in %g s",
                self._deaths,
                pause,
            )
            self._timer.set(pause, self._try_one)

    def stop(self) -> None:
        """Start no more children."""
        self._timer.cancel()

    def _forked(self) -> bool:
        """Fork a child; False when the system refused, and another attempt follows."""
        try:
            self._fork()
        except OSError as error:
            self._refusals += 1
            pause = _pause(self._refusals - 1)
            logger.error("no pool process can be started (%s); the next attempt is in %g s", error, pause)
            self._timer.set(pause, self._try_one)
            return False
        self._refusals = 0
        return True

    def _try_one(self) -> None:
        if self._missing() > 0 and self._forked():
            self.fill()
            self._on_late()


def _pause(failures: int) -> float:
    return exponential_backoff(failures, factor=FIRST_PAUSE, maximum=LONGEST_PAUSE)

"""Which child gets the next request: an idle one, or while tasks are short the one with the fewest requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amqtask_pools.prefork.child import SHORT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from amqtask.execution.request import Outcome
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

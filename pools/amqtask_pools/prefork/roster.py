"""Who gets the next request: an idle child, or while tasks are short the one with the least to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amqtask_pools.prefork.child import SHORT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from amqtask.execution.outcome import Outcome
    from amqtask_pools.prefork.process import ChildProcess

# A child may be given so many requests at once, while the mean runtime is below SHORT.
LOOK_AHEAD = 32
# Bodies above this (bytes) go to idle children only: so many smaller ones fit into the smallest of socket buffers.
LARGE = 4 * 1024


class Roster:
    """The children, and the books on those that take requests: none of its methods does more than write them up."""

    def __init__(self) -> None:
        # All that live, those that are leaving too.
        self.children: list[ChildProcess] = []
        # Of those that take requests: how many there are, how many requests they have, and which of them have none;
        # the last of these is the warmest, and first come those that are not ready.
        self.taking = 0
        self.in_flight = 0
        self.idle: list[ChildProcess] = []
        # Those whose task takes long: they get no more before it ends.
        self.slow: set[ChildProcess] = set()
        self._mean = 1.0

    @property
    def room(self) -> int:
        """How many requests they take now."""
        if self._mean >= SHORT:
            return len(self.idle)
        if self.slow:
            return sum(LOOK_AHEAD - len(child.requests) for child in self.children if self._is_open(child))
        return self.taking * LOOK_AHEAD - self.in_flight

    def choose(self, size: int) -> ChildProcess | None:
        """A child for a request whose body has so many bytes."""
        if self.idle:
            return self.idle[-1]
        if self._mean >= SHORT or size > LARGE:
            return None
        best: ChildProcess | None = None
        fewest = LOOK_AHEAD
        for child in self.children:
            if len(child.requests) < fewest and not child.is_full and self._is_open(child):
                best, fewest = child, len(child.requests)
        return best

    def _is_open(self, child: ChildProcess) -> bool:
        return not child.is_leaving and child not in self.slow

    def took(self, child: ChildProcess) -> None:
        """The child that `choose` chose is about to get the request."""
        if not child.requests:
            self.idle.pop()
        self.in_flight += 1

    def gave_back(self, child: ChildProcess, count: int) -> None:
        """So many requests were taken back from it."""
        if not child.is_leaving:
            self.in_flight -= count
            if not child.requests:
                self.idle.insert(0, child)

    def answered(self, child: ChildProcess, outcomes: Sequence[Outcome]) -> None:
        """Its requests ended with these."""
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

    def joins(self, child: ChildProcess) -> None:
        """A new one."""
        self.children.append(child)
        self.idle.insert(0, child)
        self.taking += 1

    def is_ready(self, child: ChildProcess) -> None:
        """It has started."""
        if child in self.idle:
            self.idle.remove(child)
            self.idle.append(child)

    def retires(self, child: ChildProcess) -> None:
        """It takes no more requests; call this before `is_leaving` is set."""
        if child.is_leaving:
            return
        self.taking -= 1
        self.in_flight -= len(child.requests)
        self.slow.discard(child)
        if not child.requests:
            self.idle.remove(child)

    def clear(self) -> None:
        """They are all gone."""
        self.children.clear()
        self.idle.clear()
        self.slow.clear()
        self.taking = self.in_flight = 0

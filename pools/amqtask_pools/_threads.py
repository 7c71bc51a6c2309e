"""What pools that run tasks beside the loop's thread share: outcomes go back in batches, one wake-up each."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amqtask.execution.outcome import Outcome
    from amqtask.pool import Loop, OnOutcomes


class Returns:
    """Outcomes on their way back to the loop. `put` from anywhere; the rest happens on the loop.

    The flag needs no lock: a batch that is being read when an outcome is put is either still to see it, or has cleared the
    flag before, and then `put` wakes the loop again (a wake-up too many does no harm, one too few cannot happen).
    """

    def __init__(self, loop: Loop, on_outcomes: OnOutcomes) -> None:
        self._loop = loop
        self._on_outcomes = on_outcomes
        self._outcomes: deque[Outcome] = deque()
        self._is_due = False

    def put(self, outcome: Outcome) -> None:
        """Hand one outcome over."""
        self._outcomes.append(outcome)
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_due = False
        outcomes = self._outcomes
        batch = []
        while outcomes:
            batch.append(outcomes.popleft())
        if batch:
            self._on_outcomes(batch)

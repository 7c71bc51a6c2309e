"""The common part of pools whose slots are in the worker's process: running requests, free slots, outcomes to the loop."""

from __future__ import annotations

import os
from collections import deque
from typing import TYPE_CHECKING

from amqtask.pool import PoolDefaults, Running

if TYPE_CHECKING:
    from amqtask.execution.executor import Executor
    from amqtask.execution.request import Outcome, Request
    from amqtask.ground.shapes import JsonObject
    from amqtask.pool import Loop, OnOutcomes, PoolOptions


class SlotPool(PoolDefaults):
    """The part of the pool contract that does not depend on what a slot is.

    A slot is taken from `submit` until its outcome is on the loop. An outcome whose request is not running any more (it was
    given up at its hard limit, or returned by `stop`) is dropped: the first outcome counts.
    """

    def __init__(self, executor: Executor, loop: Loop, on_outcomes: OnOutcomes, options: PoolOptions) -> None:
        self._executor = executor
        self._loop = loop
        self._on_outcomes = on_outcomes
        self._slots = options.slots
        self._running: dict[int, Request] = {}
        self._outcomes: deque[Outcome] = deque()
        self._is_delivery_due = False
        self._is_stopped = False
        self._total = 0

    @property
    def slots(self) -> int:
        """How many requests may run at once."""
        return self._slots

    @property
    def free(self) -> int:
        """How many more requests may run now (negative after shrinking)."""
        return self._slots - len(self._running)

    def take_back(self) -> list[Request]:
        """Always empty: each request begins at once."""
        return []

    def stats(self) -> JsonObject:
        """Numbers for `inspect stats`."""
        return {"max-concurrency": self._slots, "running": len(self._running), "total": self._total}

    def find(self, number: int) -> Running | None:
        """This process, for a running request."""
        return Running(os.getpid()) if number in self._running else None

    def _hand_back(self, outcome: Outcome) -> None:
        """Pass an outcome to the loop, from any thread or greenlet; outcomes that come together cost one wake-up of the loop.

        The flag needs no lock: `_deliver` clears it before it looks, so an outcome is seen or wakes the loop again.
        """
        self._outcomes.append(outcome)
        if not self._is_delivery_due:
            self._is_delivery_due = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_delivery_due = False
        outcomes, running = self._outcomes, self._running
        batch: list[Outcome] = []
        while outcomes:
            outcome = outcomes.popleft()
            if running.pop(outcome.number, None) is not None:
                batch.append(outcome)
        if batch:
            self._total += len(batch)
            self._on_outcomes(batch)

    def _give_back_all(self) -> list[Request]:
        """At the end: return the running requests to the caller; no outcome of them follows."""
        self._is_stopped = True
        requests = list(self._running.values())
        self._running.clear()
        return requests

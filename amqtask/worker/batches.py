"""The line of calls that a worker gathers for a task with `batch`, until there are enough of them or their time is up.

It stands among the dispatcher's lines, so a batch waits for a slot and takes turns as any other request. While it waits, more
calls join it. All of it is in memory only, as every request that waits here: the broker has the messages, which are unanswered.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from amqtask.execution.request import Calls, Request
from amqtask.ground.loop import OneTimer

if TYPE_CHECKING:
    from amqtask.pool import Loop
    from amqtask.worker.strategy import TaskStrategy


class BatchLine(deque[Request]):
    """Calls of one task from one queue. It is true while a batch is due, and `popleft` takes a whole one; `on_due` is called when
    one becomes due."""

    def __init__(
        self, loop: Loop, on_due: Callable[[BatchLine], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._on_due = on_due
        self._clock = clock
        self._timer = OneTimer(loop)
        # When each of them came.
        self._times: deque[float] = deque()
        self._is_due = False
        self._size, self._seconds = 1, 0.0
        self._limits: tuple[float | None, float | None] = None, None

    def __bool__(self) -> bool:
        return self._is_due

    def gather(self, request: Request, strategy: TaskStrategy) -> None:
        """Append a call."""
        assert strategy.batch is not None
        self._size, self._seconds = strategy.batch.size, strategy.batch.seconds
        self._limits = strategy.soft_limit, strategy.hard_limit
        self.append(request)
        self._times.append(self._clock())
        self._look()

    def popleft(self) -> Request:
        """One request for the oldest calls. Its number is no other request's: slots make others below -2**32 for chains."""
        first = self[0]
        calls = Calls()
        while len(self) and len(calls) < self._size:
            calls.append(super().popleft())
            self._times.popleft()
        soft, hard = self._limits
        batch = Request(
            number=-first.number,
            id=f"batch of {len(calls)}",
            task=first.task,
            queue=first.queue,
            priority=first.priority,
            soft_limit=soft,
            hard_limit=hard,
        )
        batch.decoded = calls  # type: ignore[assignment] # see Request
        self._is_due = False
        self._look(is_in_turns=True)
        return batch

    @property
    def batches(self) -> int:
        """How many batches the calls that are here would make."""
        return -(-len(self) // self._size)

    def clear(self) -> None:
        """Take all calls out."""
        super().clear()
        self._times.clear()
        self._timer.cancel()
        self._is_due = False

    def _look(self, *, is_in_turns: bool = False) -> None:
        """Whether a batch is due now, or when. Who takes a batch looks for the next one by itself."""
        if self._is_due or not len(self):
            return
        wait = self._times[0] + self._seconds - self._clock()
        if len(self) >= self._size or wait <= 0:
            self._timer.cancel()
            self._is_due = True
            if not is_in_turns:
                self._on_due(self)
        elif not self._timer.is_set:
            self._timer.set(wait, self._look)

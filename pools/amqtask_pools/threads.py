"""threads: a slot is a thread. No time limits: Python cannot end a thread that waits in a system call.

(An asynchronous exception would come only when the thread runs Python code again, and maybe in the next task. So a task
with a time limit is refused when the worker starts.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from amqtask_pools._crew import Crew
from amqtask_pools._slots import SlotPool

if TYPE_CHECKING:
    from amqtask.execution.executor import Executor
    from amqtask.execution.request import Request
    from amqtask.pool import Loop, OnOutcomes, PoolOptions


class ThreadsPool(SlotPool):
    """See amqtask.pool.Pool."""

    name: ClassVar[str] = "threads"
    limits: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, executor: Executor, loop: Loop, on_outcomes: OnOutcomes, options: PoolOptions) -> None:
        super().__init__(executor, loop, on_outcomes, options)
        self._crew = Crew(options.slots, "amqtask")

    def start(self) -> None:
        """Threads start with the first requests."""

    def submit(self, request: Request) -> None:
        """The next idle thread takes it."""
        running = self._running
        running[request.number] = request
        self._crew.call(self._run, request, busy=len(running))

    def _run(self, request: Request) -> None:
        self._hand_back(self._executor.execute(request))

    def resize(self, slots: int) -> None:
        """More threads when they are needed; fewer as they become idle."""
        self._slots = slots
        self._crew.resize(slots)

    def terminate(self, number: int, reason: str) -> bool:
        """Nobody can end a thread from outside."""
        return False

    def stop(self) -> list[Request]:
        """Running threads are daemons: they end with the process, and what they still say is not heard."""
        self._crew.stop()
        return self._give_back_all()

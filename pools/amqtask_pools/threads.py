"""threads: a slot is a thread. No time limits: Python cannot end a thread that waits in a system call.

(An asynchronous exception would come only when the thread runs Python code again, and maybe in the next task. So a task
with a time limit is refused when the worker starts.)

While tasks are short, more are submitted than there are threads: a thread that ends one takes the next without a wake-up
and without giving up the interpreter's lock. They wait in one queue for the first idle thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from amqtask_pools._slot_table import SlotPool
from amqtask_pools._thread_crew import ThreadCrew

if TYPE_CHECKING:
    from amqtask.execution.executor import Executor
    from amqtask.execution.request import Request
    from amqtask.pool import Loop, OnOutcomes, PoolOptions

# While the mean runtime is below SHORT (seconds), so many requests per thread are taken.
SHORT, LOOK_AHEAD = 0.001, 4


class ThreadsPool(SlotPool):
    """See amqtask.pool.Pool."""

    name: ClassVar[str] = "threads"
    limits: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, executor: Executor, loop: Loop, on_outcomes: OnOutcomes, options: PoolOptions) -> None:
        super().__init__(executor, loop, on_outcomes, options)
        self._crew = ThreadCrew(options.slots, "amqtask")
        self._mean = 1.0

    @property
    def free(self) -> int:
        """Idle threads; more while tasks are short."""
        return self._slots * (LOOK_AHEAD if self._mean < SHORT else 1) - len(self._running)

    def start(self) -> None:
        """Threads start with the first requests."""

    def submit(self, request: Request) -> None:
        """Queue the request for the next idle thread."""
        running = self._running
        running[request.number] = request
        self._crew.call(self._run, request, busy=len(running))

    def _run(self, request: Request) -> None:
        if request.number in self._running:  # else the pool was stopped while the request waited
            self._hand_back(self._executor.execute(request))

    def _deliver(self) -> None:
        mean = self._mean
        for outcome in tuple(self._outcomes):
            mean += (outcome.runtime - mean) * 0.1
        self._mean = mean
        super()._deliver()

    def resize(self, slots: int) -> None:
        """Change the limit: more threads when they are needed; fewer as they become idle."""
        self._slots = slots
        self._crew.resize(slots)

    def take_back(self) -> list[Request]:
        """The requests that no thread has taken yet."""
        taken = [arguments[0] for arguments in self._crew.take_back()]
        for request in taken:
            del self._running[request.number]
        return taken

    def terminate(self, number: int, reason: str, signum: int | None = None) -> bool:
        """Always False: Python cannot end a thread from outside."""
        return False

    def stop(self) -> list[Request]:
        """Return the requests. Running threads are daemons: they end with the process, and their outcomes are dropped."""
        self._crew.stop()
        return self._give_back_all()

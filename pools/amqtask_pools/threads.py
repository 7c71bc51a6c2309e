"""threads: a slot is a thread. No time limits: Python cannot end a thread that waits in a system call.

(An asynchronous exception would come only when the thread runs Python code again, and maybe in the next task. So a task
with a time limit is refused when the worker starts.)

While tasks are short, more are submitted than there are threads: a thread that ends one takes the next without a wake-up
and without giving up the interpreter's lock. They wait in one queue for the first idle thread.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from amqtask.ground.printable import bounded_logger
from amqtask_pools._slot_table import SlotPool

if TYPE_CHECKING:
    from amqtask.execution.executor import Executor
    from amqtask.execution.request import Request
    from amqtask.pool import Loop, OnOutcomes, PoolOptions


# -- Native daemon threads that take calls from one queue; another thread is started when all are busy.
#
# (concurrent.futures waits for its threads when the process ends: a task that hangs would keep the worker alive.)


logger = bounded_logger("amqtask.pools")


class ThreadCrew:
    """At most `limit` threads. `call` is for one thread only (the loop's). Each thread calls `on_rest` before it waits."""

    def __init__(self, limit: int, name: str, on_rest: Callable[[], None] | None = None) -> None:
        self.limit = limit
        self._name = name
        self._on_rest = on_rest
        self._calls: queue.SimpleQueue[tuple[Callable[..., object], tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._size = 0

    def call(self, function: Callable[..., object], *arguments: object, busy: int) -> None:
        """Make this call in a thread; `busy` is how many calls are running or waiting, this one included."""
        if self._size < busy and self._size < self.limit:
            self._size += 1
            threading.Thread(target=self._work, name=f"{self._name}-{self._size}", daemon=True).start()
        self._calls.put((function, arguments))

    def take_back(self) -> list[tuple[Any, ...]]:
        """Remove the calls that no thread has taken yet, and return their arguments."""
        taken: list[tuple[Any, ...]] = []
        words_to_go = 0
        try:
            while True:
                call = self._calls.get_nowait()
                if call is None:
                    words_to_go += 1
                else:
                    taken.append(call[1])
        except queue.Empty:
            for _ in range(words_to_go):
                self._calls.put(None)
        return taken

    def resize(self, limit: int) -> None:
        """Change the limit; surplus threads end when they are idle."""
        self.limit = limit
        while self._size > limit:
            self._size -= 1
            self._calls.put(None)

    def stop(self) -> None:
        """End idle threads now, busy ones after their call; does not wait for them."""
        self.resize(0)

    def _work(self) -> None:
        take: Callable[[], tuple[Callable[..., object], tuple[Any, ...]] | None] = self._calls.get
        if self._on_rest is not None:
            self._on_rest()
            take = self._take
        while (call := take()) is not None:
            function, arguments = call
            try:
                function(*arguments)
            except Exception:  # the thread goes on
                logger.exception("%s failed", function)
            del call, function, arguments
        if self._on_rest is not None:
            self._on_rest()

    def _take(self) -> tuple[Callable[..., object], tuple[Any, ...]] | None:
        assert self._on_rest is not None
        try:
            return self._calls.get_nowait()
        except queue.Empty:
            self._on_rest()
            return self._calls.get()


# While the mean runtime is below SHORT (seconds), so many requests per thread are taken.
SHORT, LOOK_AHEAD = 0.001, 4


class ThreadsPool(SlotPool):
    """See amqtask.pool.Pool."""

    name: ClassVar[str] = "threads"
    limits: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, executor: Executor, loop: Loop, on_outcomes: OnOutcomes, options: PoolOptions) -> None:
        super().__init__(executor, loop, on_outcomes, options)
        self._crew = ThreadCrew(options.slots, "amqtask", executor.rest)
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

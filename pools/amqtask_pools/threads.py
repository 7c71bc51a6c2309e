"""threads: a slot is a thread. No time limits: Python cannot end a thread that waits in a system call."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any, ClassVar

from amqtask.execution.coroutines import CoroutineRunner
from amqtask_pools._threads import Returns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from amqtask.execution.executor import Executor
    from amqtask.execution.outcome import Outcome
    from amqtask.execution.request import Request
    from amqtask.pool import Loop, OnOutcomes, PoolOptions


class ThreadsPool:
    """See amqtask.pool.Pool."""

    name: ClassVar[str] = "threads"
    limits: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, executor: Executor, loop: Loop, on_outcomes: OnOutcomes, options: PoolOptions) -> None:
        self._executor = executor
        self._returns = Returns(loop, self._back)
        self._on_outcomes = on_outcomes
        self._slots = options.slots
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._running: dict[int, Request] = {}
        self._threads: list[threading.Thread] = []
        self._total = 0
        self._is_stopped = False
        local = threading.local()

        def run_coroutine(coroutine: Any) -> Any:
            runner = getattr(local, "runner", None)
            if runner is None:
                runner = local.runner = CoroutineRunner()
            return runner(coroutine)

        executor.run_coroutine = run_coroutine

    @classmethod
    def prepare_process(cls) -> None:
        """Nothing to prepare."""

    def start(self) -> None:
        """Start the threads."""
        while len(self._threads) < self._slots:
            self._start_thread()

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._work, name=f"amqtask-{len(self._threads) + 1}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        get, execute, put = self._requests.get, self._executor.execute, self._returns.put
        while True:
            request = get()
            if request is None:
                return
            put(execute(request))

    @property
    def slots(self) -> int:
        """How many threads."""
        return self._slots

    @property
    def free(self) -> int:
        """How many of them are idle."""
        return self._slots - len(self._running)

    def submit(self, request: Request) -> None:
        """The next idle thread takes it."""
        self._running[request.number] = request
        self._requests.put(request)

    def _back(self, outcomes: Sequence[Outcome]) -> None:
        running = self._running
        for outcome in outcomes:
            running.pop(outcome.number, None)
        self._total += len(outcomes)
        if not self._is_stopped:
            self._on_outcomes(outcomes)

    def resize(self, slots: int) -> None:
        """More threads now; fewer as they become idle."""
        for _ in range(self._slots - slots):
            self._requests.put(None)
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        for _ in range(slots - self._slots):
            self._start_thread()
        self._slots = slots

    def terminate(self, number: int, reason: str) -> bool:
        """Nobody can end a thread from outside."""
        return False

    def stop(self) -> list[Request]:
        """Let idle threads go; running ones are daemons and end with the process."""
        self._is_stopped = True
        for _ in self._threads:
            self._requests.put(None)
        left = list(self._running.values())
        self._running.clear()
        return left

    def stats(self) -> dict[str, Any]:
        """Numbers for `inspect stats`."""
        return {"max-concurrency": self._slots, "processes": [], "threads": self._slots, "total": self._total}

"""asyncio: a slot is a coroutine. One event loop in a thread beside the worker's own loop; limits by cancelling.

`def` tasks run in a pool of threads of that loop, where only they are, so that they do not hold up the coroutines.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar

from amqtask.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded
from amqtask.execution.coroutines import CoroutineRunner
from amqtask_pools._threads import Returns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from amqtask.execution.executor import Executor
    from amqtask.execution.outcome import Outcome
    from amqtask.execution.request import Request
    from amqtask.pool import Loop, OnOutcomes, PoolOptions


class AsyncioPool:
    """See amqtask.pool.Pool."""

    name: ClassVar[str] = "asyncio"
    limits: ClassVar[frozenset[str]] = frozenset({"soft", "hard"})

    def __init__(self, executor: Executor, loop: Loop, on_outcomes: OnOutcomes, options: PoolOptions) -> None:
        self._executor = executor
        self._on_outcomes = on_outcomes
        self._returns = Returns(loop, self._back)
        self._slots = options.slots
        self._running: dict[int, Request] = {}
        # Filled on the worker's thread, emptied on the event loop; deque operations are atomic.
        self._waiting: deque[Request] = deque()
        self._is_due = False
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._terminated: dict[int, str] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._thread: threading.Thread | None = None
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
        """Start the event loop's thread."""
        self._threads = ThreadPoolExecutor(self._slots, thread_name_prefix="amqtask")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="amqtask asyncio", daemon=True)
        self._thread.start()

    def _run_loop(self) -> None:
        loop = self._loop
        assert loop is not None
        asyncio.set_event_loop(loop)
        loop.run_forever()
        loop.close()

    @property
    def slots(self) -> int:
        """How many coroutines at once."""
        return self._slots

    @property
    def free(self) -> int:
        """How many more."""
        return self._slots - len(self._running)

    def submit(self, request: Request) -> None:
        """Start a coroutine; a burst of requests wakes the event loop once."""
        self._running[request.number] = request
        self._waiting.append(request)
        if not self._is_due:
            self._is_due = True
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._start_waiting)

    def _start_waiting(self) -> None:
        self._is_due = False
        loop = self._loop
        assert loop is not None
        while self._waiting:
            request = self._waiting.popleft()
            # A context of its own: what a task sets must not be seen by the next one.
            self._tasks[request.number] = contextvars.Context().run(loop.create_task, self._run(request))

    async def _run(self, request: Request) -> None:
        try:
            if request.soft_limit is None and request.hard_limit is None:
                outcome = await self._execute(request)
            else:
                outcome = await self._limited(request)
        except asyncio.CancelledError:
            outcome = self._executor.revoked(request, self._terminated.pop(request.number, "terminated"))
        finally:
            self._tasks.pop(request.number, None)
        self._returns.put(outcome)

    async def _limited(self, request: Request) -> Outcome:
        """The soft limit cancels the task, which may catch that as SoftTimeLimitExceeded does elsewhere; the hard one
        gives it up."""
        inner = asyncio.ensure_future(self._execute(request))
        limits = [limit for limit in (request.soft_limit, request.hard_limit) if limit is not None]
        waited = 0.0
        for limit in sorted(limits):
            done, _ = await asyncio.wait({inner}, timeout=limit - waited)
            if done:
                return inner.result()
            waited = limit
            if limit == request.hard_limit:
                inner.cancel()
                return self._executor.lost(request, TimeLimitExceeded(f"the task ran longer than {limit:g} s"))
            _throw(inner, SoftTimeLimitExceeded(limit))
        return await inner

    async def _execute(self, request: Request) -> Outcome:
        if self._executor.is_async(request.task):
            return await self._executor.aexecute(request)
        assert self._loop is not None
        return await self._loop.run_in_executor(self._threads, self._executor.execute, request)

    def _back(self, outcomes: Sequence[Outcome]) -> None:
        running = self._running
        for outcome in outcomes:
            running.pop(outcome.number, None)
        self._total += len(outcomes)
        if not self._is_stopped:
            self._on_outcomes(outcomes)

    def resize(self, slots: int) -> None:
        """More or fewer at once from now on."""
        self._slots = slots

    def terminate(self, number: int, reason: str) -> bool:
        """Cancel a running coroutine."""
        if number not in self._running or self._loop is None:
            return False
        self._terminated[number] = reason
        self._loop.call_soon_threadsafe(self._cancel, number)
        return True

    def _cancel(self, number: int) -> None:
        task = self._tasks.get(number)
        if task is not None:
            task.cancel()

    def stop(self) -> list[Request]:
        """Stop the event loop; what ran on it is given back."""
        self._is_stopped = True
        left = list(self._running.values())
        self._running.clear()
        if self._loop is not None and self._thread is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._wind_up)
            self._thread.join(1.0)
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        return left

    def _wind_up(self) -> None:
        assert self._loop is not None
        for task in list(self._tasks.values()):
            task.cancel()
        self._loop.call_soon(self._loop.stop)

    def stats(self) -> dict[str, Any]:
        """Numbers for `inspect stats`."""
        return {"max-concurrency": self._slots, "processes": [], "total": self._total}


def _throw(task: asyncio.Future[Any], error: SoftTimeLimitExceeded) -> None:
    """Cancel with a message that the executor turns into the error (a coroutine cannot be thrown into otherwise)."""
    task.cancel(error)

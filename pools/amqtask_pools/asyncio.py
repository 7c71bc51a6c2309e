"""asyncio: a slot is a coroutine. One event loop in a thread beside the worker's own I/O loop.

Limits and terminations are raised in the coroutine where it awaits. A coroutine that runs on all the same is given up after a
grace period: an outcome is reported, its slot is free, and its later outcome is dropped.

`def` tasks run in threads, so that they do not hold up the coroutines; they cannot be interrupted there. At its hard limit such
a task is given up at once (its thread ends when the task does); a soft limit is not enforced, and a warning says so.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from amqtask.exceptions import SoftTimeLimitExceeded, Terminated
from amqtask.execution.coroutines import Interruptible, run_for_all
from amqtask.execution.request import Abandoned, HardLimitReached
from amqtask.ground.printable import bounded_logger
from amqtask_pools._slot_table import SlotPool
from amqtask_pools.threads import ThreadCrew

if TYPE_CHECKING:
    from amqtask.execution.executor import Executor
    from amqtask.execution.request import Outcome, Request
    from amqtask.pool import Loop, OnOutcomes, PoolOptions

logger = bounded_logger("amqtask.pools")

# Seconds that an interrupted coroutine may take to end.
GRACE = 5.0
# Seconds that all interrupted coroutines together may take when the pool stops.
STOP_GRACE = 0.5
# Threads that store results for coroutines (only needed for stores that block).
STORING_THREADS = 8


class AsyncioPool(SlotPool):
    """See amqtask.pool.Pool."""

    name: ClassVar[str] = "asyncio"
    limits: ClassVar[frozenset[str]] = frozenset({"soft", "hard"})
    def_limits: ClassVar[frozenset[str]] = frozenset({"hard"})

    def __init__(self, executor: Executor, loop: Loop, on_outcomes: OnOutcomes, options: PoolOptions) -> None:
        super().__init__(executor, loop, on_outcomes, options)
        # Filled on the worker's thread, emptied on the event loop.
        self._waiting: deque[Request] = deque()
        self._is_start_due = False
        self._is_turn_ending = False
        self._coroutines: dict[int, Interruptible] = {}
        self._timers: dict[int, list[asyncio.TimerHandle]] = {}
        self._in_threads: set[int] = set()
        self._given_up: set[int] = set()
        self._unlimited: set[str] = set()
        self._crew = ThreadCrew(options.slots, "amqtask", executor.rest)
        self._storing = ThreadCrew(STORING_THREADS, "amqtask-results")
        self._storing_now = 0
        self._aloop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._is_winding_up = False

    def start(self) -> None:
        """Start the event loop's thread."""
        if self._aloop is None:
            self._aloop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._run_loop, name="amqtask-asyncio", daemon=True)
            self._thread.start()

    def _run_loop(self) -> None:
        assert self._aloop is not None
        asyncio.set_event_loop(self._aloop)
        try:
            run_for_all(self._aloop, lambda: self._is_winding_up)
        finally:
            self._aloop.close()

    def submit(self, request: Request) -> None:
        """Start the request on the event loop; a burst of requests wakes the loop once."""
        self._running[request.number] = request
        if not self._executor.is_async(request.task):
            self._start_in_thread(request)
            return
        self._waiting.append(request)
        if not self._is_start_due:
            self._is_start_due = True
            assert self._aloop is not None, "submit before start"
            self._aloop.call_soon_threadsafe(self._start_waiting)

    # -- coroutines; all of this on the event loop

    def _start_waiting(self) -> None:
        self._is_start_due = False
        waiting = self._waiting
        while waiting:
            self._start_coroutine(waiting.popleft())

    def _start_coroutine(self, request: Request) -> None:
        assert self._aloop is not None
        running = Interruptible(self._executor.aexecute(request, self._in_storing_thread))
        self._coroutines[request.number] = running
        running.task = self._aloop.create_task(self._run(request, running))
        if request.soft_limit is not None or request.hard_limit is not None:
            self._start_timers(request, running)

    async def _run(self, request: Request, running: Interruptible) -> None:
        outcome: Outcome = await running
        self._coroutines.pop(request.number, None)
        if self._timers:
            for timer in self._timers.pop(request.number, ()):
                timer.cancel()
        self._outcomes.append(outcome)
        if not self._is_turn_ending:
            self._is_turn_ending = True
            assert self._aloop is not None
            self._aloop.call_soon(self._end_turn)

    def _end_turn(self) -> None:
        """Hand the outcomes of one turn of the event loop back together: a wake-up of the other thread costs more than a task."""
        self._is_turn_ending = False
        if not self._is_delivery_due:
            self._is_delivery_due = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _start_timers(self, request: Request, running: Interruptible) -> None:
        assert self._aloop is not None
        timers = self._timers[request.number] = []
        soft, hard = request.soft_limit, request.hard_limit
        if soft is not None:
            timers.append(self._aloop.call_later(soft, running.interrupt, SoftTimeLimitExceeded(soft)))
        if hard is not None:
            timers.append(self._aloop.call_later(hard, self._end, request, HardLimitReached(hard)))

    def _end(self, request: Request, error: Terminated) -> None:
        running = self._coroutines.get(request.number)
        if running is not None:
            assert self._aloop is not None
            running.interrupt(error)
            give_up = self._aloop.call_later(GRACE, self._give_up, request, error)
            self._timers.setdefault(request.number, []).append(give_up)

    def _give_up(self, request: Request, error: Terminated) -> None:
        """The coroutine caught the interruption and runs on: report an outcome."""
        if self._coroutines.pop(request.number, None) is not None:
            logger.error("task %s[%s] does not end (%s) and is given up", request.task, request.id, error)
            self._hand_back(self._executor.ended_by_pool(request, error))

    async def _in_storing_thread(self, function: Callable[..., object], *arguments: object) -> object:
        assert self._aloop is not None
        loop, done, context = self._aloop, self._aloop.create_future(), contextvars.copy_context()

        def settle(outcome: object, error: BaseException | None) -> None:
            if done.done():
                return
            if error is None:
                done.set_result(outcome)
            else:
                done.set_exception(error)

        def call() -> None:
            outcome, error = None, None
            try:
                outcome = context.run(function, *arguments)
            except BaseException as raised:  # noqa: BLE001 - whoever awaits it must not wait for ever
                error = raised
            loop.call_soon_threadsafe(settle, outcome, error)

        self._storing_now += 1
        self._storing.call(call, busy=self._storing_now)
        try:
            return await done
        finally:
            self._storing_now -= 1

    # -- threads

    def _start_in_thread(self, request: Request) -> None:
        self._in_threads.add(request.number)
        self._crew.call(self._run_in_thread, request, busy=len(self._in_threads))
        if request.hard_limit is not None:
            self._loop.call_later(request.hard_limit, lambda: self._give_up_thread(request))
        if request.soft_limit is not None and request.task not in self._unlimited:
            self._unlimited.add(request.task)
            logger.warning(
                "task %s is not a coroutine: the asyncio pool runs it in a thread, where its soft time limit is not enforced",
                request.task,
            )

    def _run_in_thread(self, request: Request) -> None:
        outcome = self._executor.execute(request)
        self._in_threads.discard(request.number)
        if request.number in self._given_up:
            self._loop.call_soon_threadsafe(lambda: self._has_come_back(request.number))
        self._hand_back(outcome)

    def _give_up_thread(self, request: Request) -> None:
        if request.number not in self._running or request.hard_limit is None:
            return
        logger.error("task %s[%s] is over its hard limit and is given up", request.task, request.id)
        self._given_up.add(request.number)
        self._crew.resize(self._crew.limit + 1)  # to replace the thread that the task keeps
        self._hand_back(self._executor.ended_by_pool(request, HardLimitReached(request.hard_limit)))

    def _has_come_back(self, number: int) -> None:
        if number in self._given_up:
            self._given_up.remove(number)
            self._crew.resize(self._crew.limit - 1)

    # -- from the worker

    def resize(self, slots: int) -> None:
        """Change the number of slots, from the next request on."""
        self._crew.resize(self._crew.limit + slots - self._slots)
        self._slots = slots

    def terminate(self, number: int, reason: str, signum: int | None = None) -> bool:
        """Raise Terminated in the coroutine; False for a `def` task."""
        request = self._running.get(number)
        if request is None or number in self._in_threads or self._aloop is None:
            return False
        self._aloop.call_soon_threadsafe(self._end, request, Terminated(reason))
        return True

    def cancel(self, number: int, reason: str) -> None:
        """Cancel the coroutine; it may catch that, and go on."""
        if number in self._running and number not in self._in_threads and self._aloop is not None:
            self._aloop.call_soon_threadsafe(self._ask, number, Terminated(reason))

    def _ask(self, number: int, error: Terminated) -> None:
        running = self._coroutines.get(number)
        if running is not None:
            running.interrupt(error)

    def stop(self) -> list[Request]:
        """Interrupt the coroutines; threads end with the process."""
        unfinished = self._give_back_all()
        self._crew.stop()
        aloop, thread = self._aloop, self._thread
        if aloop is not None and thread is not None and thread.is_alive():
            aloop.call_soon_threadsafe(lambda: aloop.create_task(self._wind_up()))
            thread.join(2 * STOP_GRACE)
        self._storing.stop()
        return unfinished

    async def _wind_up(self) -> None:
        self._waiting.clear()
        running = [coroutine for coroutine in self._coroutines.values() if coroutine.task is not None]
        for coroutine in running:
            coroutine.interrupt(Abandoned())
        loop = asyncio.get_running_loop()
        other_tasks = asyncio.all_tasks(loop) - {asyncio.current_task(), *(coroutine.task for coroutine in running)}
        for task in other_tasks:
            task.cancel()
        ending = [task for task in (*other_tasks, *(coroutine.task for coroutine in running)) if task is not None]
        if ending:
            await asyncio.wait(ending, timeout=STOP_GRACE)
        await loop.shutdown_asyncgens()
        self._is_winding_up = True
        loop.stop()

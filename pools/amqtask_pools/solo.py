"""solo: one slot, the worker's own thread. For debugging, and for one task at a time without any machinery.

While a task keeps the thread, the I/O loop does not run: heartbeats and answers would wait. So a helper thread runs the loop
during a task that takes longer than PATIENCE. The worker's thread holds a lock except while it runs a task, so that the loop is
never run by two threads at once.

The soft limit and a termination are a signal whose handler raises in the task; that needs the main thread.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from types import FrameType
from typing import TYPE_CHECKING, ClassVar

from amqtask.exceptions import SoftTimeLimitExceeded, Terminated
from amqtask.execution.request import Abandoned
from amqtask.ground.printable import bounded_logger
from amqtask.pool import PoolDefaults, Running
from amqtask_pools._limits import Alarm, ThreadInterrupt

if TYPE_CHECKING:
    from amqtask.execution.executor import Executor
    from amqtask.execution.request import Outcome, Request
    from amqtask.ground.shapes import JsonObject
    from amqtask.pool import Loop, OnOutcomes, PoolOptions

logger = bounded_logger("amqtask.pools")

# Seconds that a task may keep the loop before the helper runs it, and between two such runs.
PATIENCE, SERVICE_EVERY = 0.5, 0.1
# Outcomes of short tasks are passed on together, but none waits longer than this for the others (seconds).
BATCH_TIME = 0.005
# So many requests are taken at once: with one slot there is no other slot that could run them sooner.
BURST = 64


class SoloPool(PoolDefaults):
    """See amqtask.pool.Pool."""

    name: ClassVar[str] = "solo"
    limits: ClassVar[frozenset[str]] = frozenset({"soft"})
    alone: ClassVar[str | None] = "it runs tasks in the thread in which the others' tasks are begun and answered"

    def __init__(self, executor: Executor, loop: Loop, on_outcomes: OnOutcomes, options: PoolOptions) -> None:
        self._executor = executor
        self._loop = loop
        self._on_outcomes = on_outcomes
        self._waiting: deque[Request] = deque()
        self._running: Request | None = None
        self._since = 0.0
        self._total = 0
        self._is_due = False
        # Raises the next alarm's exception in the task.
        self._interruption: ThreadInterrupt | None = None
        self._main: int | None = None
        self._alarm: Alarm | None = None
        # Whether only tasks use ITIMER_REAL: an alarm that they leave is cleared.
        self._is_timer_free = False
        self._stopped = threading.Event()
        self._loop_lock = threading.Lock()
        self._helper: threading.Thread | None = None

    def start(self) -> None:
        """The calling thread is the slot."""
        if self._helper is not None:
            return
        self._loop_lock.acquire()
        if threading.current_thread() is threading.main_thread():
            self._main = threading.get_ident()
            self._is_timer_free = signal.getitimer(signal.ITIMER_REAL)[0] == 0
            self._alarm = Alarm(self._on_alarm)
        self._helper = threading.Thread(target=self._serve_loop, name="amqtask-solo-helper", daemon=True)
        self._helper.start()

    @property
    def slots(self) -> int:
        """Always one."""
        return 1

    @property
    def free(self) -> int:
        """How many more requests are taken now."""
        return 0 if self._running is not None else BURST - len(self._waiting)

    def submit(self, request: Request) -> None:
        """Run the request at the end of this loop turn, in the order of submission."""
        self._waiting.append(request)
        self._call_work()

    def _call_work(self) -> None:
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._work)

    def _work(self) -> None:
        self._is_due = False
        waiting, outcomes = self._waiting, []
        started = time.perf_counter()
        while waiting:
            outcome = self._run(waiting.popleft())
            if self._stopped.is_set():  # while it ran: `stop` has returned it
                break
            outcomes.append(outcome)
            if time.perf_counter() - started > BATCH_TIME:
                break
        if self._is_timer_free:  # an alarm that a task has left would interrupt another task, or us
            signal.setitimer(signal.ITIMER_REAL, 0)
        if waiting:
            self._call_work()
        else:
            self._executor.rest()
        if outcomes:
            self._total += len(outcomes)
            self._on_outcomes(outcomes)

    def _run(self, request: Request) -> Outcome:
        self._since = time.monotonic()
        self._running = request
        self._loop_lock.release()
        try:
            return self._executor.execute(request) if request.soft_limit is None else self._run_limited(request)
        finally:
            self._loop_lock.acquire()
            self._running = None
            if self._interruption is not None:
                self._interruption.end()
                self._interruption = None

    def _run_limited(self, request: Request) -> Outcome:
        limit = request.soft_limit
        if limit is None or self._alarm is None:
            logger.warning("the soft limit of %s is not enforced: the worker has not the main thread", request.task)
            return self._executor.execute(request)
        self._interruption = ThreadInterrupt(SoftTimeLimitExceeded(limit), self._alarm.set)
        self._alarm.set(limit)
        return self._executor.execute(request)

    def _on_alarm(self, frame: FrameType | None) -> None:
        """Raise in the task only: not in our own code just before or after it."""
        if self._interruption is not None:
            self._interruption(frame)

    def _interrupt(self, error: BaseException) -> bool:
        """Interrupt the task, from the helper thread while it runs the loop."""
        if self._main is None or self._alarm is None:
            return False
        self._interruption = ThreadInterrupt(error, self._alarm.set)
        signal.pthread_kill(self._main, self._alarm.signum)
        return True

    def _serve_loop(self) -> None:
        while not self._stopped.wait(SERVICE_EVERY):
            if self._running is None or time.monotonic() - self._since < PATIENCE:
                continue
            if self._loop_lock.acquire(blocking=False):
                try:
                    if self._running is not None:
                        self._loop.service()
                finally:
                    self._loop_lock.release()

    def resize(self, slots: int) -> None:
        """Always one slot."""

    def take_back(self) -> list[Request]:
        """The requests that wait for the running one."""
        taken = list(self._waiting)
        self._waiting.clear()
        return taken

    def terminate(self, number: int, reason: str, signum: int | None = None) -> bool:
        """Interrupt the task. Possible while the helper runs the loop: once the task runs longer than PATIENCE."""
        running = self._running
        return running is not None and running.number == number and self._interrupt(Terminated(reason))

    def find(self, number: int) -> Running | None:
        """This process, for the running request."""
        running = self._running
        return Running(os.getpid(), self._since) if running is not None and running.number == number else None

    def stop(self) -> list[Request]:
        """Return the waiting requests, and the running one, which is interrupted."""
        self._stopped.set()
        unfinished = self.take_back()
        if self._running is not None:
            unfinished.insert(0, self._running)
            self._interrupt(Abandoned())
        elif self._main == threading.get_ident() and self._alarm is not None:
            self._alarm.close()
            self._alarm = None
        return unfinished

    def stats(self) -> JsonObject:
        """Numbers for `inspect stats`."""
        return {"max-concurrency": 1, "running": int(self._running is not None), "total": self._total}

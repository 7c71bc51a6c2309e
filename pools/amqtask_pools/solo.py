"""solo: one slot, the worker's own thread. For debugging, and for one task at a time without any machinery.

While a task keeps the thread, nobody would turn the I/O loop: heartbeats and answers would wait. A helper thread therefore
turns it once a second for a task that runs longer; a lock that the worker's thread holds except while it runs a task keeps
the two apart, so the loop never sees two threads at once.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar

from amqtask.exceptions import SoftTimeLimitExceeded

if TYPE_CHECKING:
    from amqtask.execution.executor import Executor
    from amqtask.execution.outcome import Outcome
    from amqtask.execution.request import Request
    from amqtask.pool import Loop, OnOutcomes, PoolOptions

# Seconds that a task may keep the loop before the helper serves it, and between two such services.
PATIENCE = 1.0
# Outcomes of short tasks are handed over together, but none waits longer than this for the others (seconds).
BATCH_TIME = 0.005


class SoloPool:
    """See amqtask.pool.Pool."""

    name: ClassVar[str] = "solo"
    limits: ClassVar[frozenset[str]] = frozenset({"soft"})

    def __init__(self, executor: Executor, loop: Loop, on_outcomes: OnOutcomes, options: PoolOptions) -> None:
        self._executor = executor
        self._loop = loop
        self._on_outcomes = on_outcomes
        self._waiting: deque[Request] = deque()
        self._running: Request | None = None
        self._since = 0.0
        self._total = 0
        self._is_due = False
        self._stopped = threading.Event()
        self._loop_lock = threading.Lock()
        self._helper: threading.Thread | None = None

    @classmethod
    def prepare_process(cls) -> None:
        """Nothing to prepare."""

    def start(self) -> None:
        """The calling thread is the slot."""
        self._loop_lock.acquire()
        self._helper = threading.Thread(target=self._serve_loop, name="amqtask solo helper", daemon=True)
        self._helper.start()

    @property
    def slots(self) -> int:
        """Always one."""
        return 1

    @property
    def free(self) -> int:
        """A burst is taken at once: with one slot nothing can wait behind a task that another slot would run."""
        return 0 if self._running is not None else max(0, 64 - len(self._waiting))

    def submit(self, request: Request) -> None:
        """Run at the end of this loop turn."""
        self._waiting.append(request)
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._work)

    def _work(self) -> None:
        """Run what waits; hand outcomes over at once when a batch took long enough."""
        self._is_due = False
        waiting, execute = self._waiting, self._executor.execute
        outcomes: list[Outcome] = []
        started = time.perf_counter()
        release, acquire = self._loop_lock.release, self._loop_lock.acquire
        while waiting and not self._stopped.is_set():
            request = waiting.popleft()
            self._running = request
            self._since = time.monotonic()
            release()
            try:
                outcomes.append(execute(request) if request.soft_limit is None else self._limited(request))
            finally:
                acquire()
                self._running = None
            if time.perf_counter() - started > BATCH_TIME:
                break
        self._total += len(outcomes)
        if waiting and not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._work)
        if outcomes:
            self._on_outcomes(outcomes)

    def _limited(self, request: Request) -> Outcome:
        """Raise SoftTimeLimitExceeded in the task; only the main thread gets signals."""
        limit = request.soft_limit
        if limit is None or threading.current_thread() is not threading.main_thread():
            return self._executor.execute(request)

        def exceeded(*_: Any) -> None:
            raise SoftTimeLimitExceeded(limit)

        previous = signal.signal(signal.SIGALRM, exceeded)
        signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            return self._executor.execute(request)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)

    def _serve_loop(self) -> None:
        """The helper: one loop turn a second while a task runs long."""
        service = getattr(self._loop, "service", None)
        if service is None:
            return
        while not self._stopped.wait(PATIENCE):
            if self._running is None or time.monotonic() - self._since < PATIENCE:
                continue
            with self._loop_lock:
                if self._running is not None:
                    service()

    def resize(self, slots: int) -> None:
        """One slot is all there is."""

    def terminate(self, number: int, reason: str) -> bool:
        """Nobody can end a task in the worker's own thread."""
        return False

    def stop(self) -> list[Request]:
        """What waits is given back; a running task cannot be ended from here."""
        self._stopped.set()
        left = list(self._waiting)
        self._waiting.clear()
        if self._running is not None:
            left.insert(0, self._running)
        return left

    def stats(self) -> dict[str, Any]:
        """Numbers for `inspect stats`."""
        return {"max-concurrency": 1, "processes": [], "total": self._total}

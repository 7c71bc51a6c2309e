"""What a worker does for flow control beside running tasks: the leases of what runs are renewed, in a thread of its own, because
the store may be slow or away."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import FlowStoreUnreachable
from amqtask.ground.loop import Ticker
from amqtask.ground.printable import bounded_logger
from amqtask.pool import limits_of

if TYPE_CHECKING:
    from amqtask.client.flow_store import LimitState
    from amqtask.execution.contract import TaskLike
    from amqtask.execution.request import Request
    from amqtask.flow.gate import Gate
    from amqtask.pool import Loop, Pool

logger = bounded_logger("amqtask.worker")
# How often a lease is renewed before it would end; and seconds after which it is looked whose places runs have.
RENEWALS, LOOK_EVERY = 3, 1.0
# Calls that wait for a store that does not answer; more are dropped, and what they would free ends by itself.
MOST_WAITING = 10_000
STOP_SECONDS = 5.0


class Later:
    """Calls functions one after the other in a thread, which begins with the first call."""

    def __init__(self) -> None:
        self._calls: queue.Queue[tuple[Callable[..., object], tuple[Any, ...]] | None] = queue.Queue()
        self._thread: threading.Thread | None = None

    def call(self, function: Callable[..., object], *args: Any) -> None:
        """From the worker's main thread."""
        if self._calls.qsize() >= MOST_WAITING:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="amqtask flow", daemon=True)
            self._thread.start()
        self._calls.put((function, args))

    def stop(self) -> None:
        """Make the calls that wait, within STOP_SECONDS."""
        if self._thread is not None:
            self._calls.put(None)
            self._thread.join(STOP_SECONDS)
            self._thread = None

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            function, args = call
            try:
                function(*args)
            except Exception:  # a store's library: the thread must not end
                logger.exception("%s failed", getattr(function, "__qualname__", function))


class Leases:
    """Renews the leases of tasks that run, from the worker's main process: a task that keeps its own busy keeps its place. With
    `read_limits` it reads as often how far limits are used: `limits`, for metrics."""

    name = "leases"

    def __init__(
        self,
        loop: Loop,
        gate: Gate,
        later: Later,
        running: Callable[[], Iterable[Request]],
        read_limits: Callable[[], list[LimitState]] | None = None,
    ) -> None:
        self._gate = gate
        self._later = later
        self._running = running
        self._read_limits = read_limits
        self.limits: list[LimitState] = []
        self._renewals = Ticker(loop, gate.lease / RENEWALS, self._renew)
        self._looks = Ticker(loop, LOOK_EVERY, self._note)

    def start(self) -> None:
        """Renew them from now on."""
        self._renewals.start()
        self._looks.start()

    def stop(self) -> None:
        """Renew them no more, and make the calls that wait."""
        self._renewals.stop()
        self._looks.stop()
        self._later.stop()

    def _note(self) -> None:
        self._gate.note(request.number for request in self._running() if request.task in self._gate.plans)

    def _renew(self) -> None:
        self._note()
        numbers: defaultdict[str, list[int]] = defaultdict(list)
        for request in self._running():
            if request.task in self._gate.plans:
                numbers[request.task].append(request.number)
        if numbers:
            self._later.call(self._gate.renew, numbers)
        self._later.call(self._gate.look)
        if self._read_limits is not None:
            self._later.call(self._look)

    def _look(self) -> None:
        assert self._read_limits is not None
        self.limits = []  # what is not known is not told
        with contextlib.suppress(FlowStoreUnreachable):
            self.limits = self._read_limits()


def warn_of_deadlines(tasks: Iterable[TaskLike], pool_class: type[Pool]) -> None:
    """A deadline is looked at before the start in every pool; it ends a running task only where there are soft limits."""
    unenforced = sorted(
        task.name
        for task in tasks
        if task.deadline is not None and "soft" not in limits_of(pool_class, is_async=task.is_async)
    )
    if unenforced:
        logger.warning(
            "the %s pool has no soft time limits for %s: their deadlines are looked at before they start, and do not end them",
            pool_class.name,
            ", ".join(unenforced),
        )

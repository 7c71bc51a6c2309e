"""The common part of the eventlet and gevent pools: slots are green threads that stay, and start their tasks at once.

`submit` switches directly to an idle green thread. A task that never waits runs to its end there, and the green thread
switches back: no hub, no timer, no wake-up. A task that waits switches to the hub, as always in these libraries, and the hub
resumes the submitter: `_return_to_submitter` was put into the hub's queue before, once per turn of the hub.

Time limits are the library's own timeouts, terminations are thrown from the hub; both reach a task where it waits.
Code that does not wait cannot be interrupted by anything in its process: HubMonitor at least logs which task it is.

This module imports neither library and nothing that must be patched before it is imported.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, ClassVar

from greenlet import GreenletExit

from amqtask.exceptions import ConfigurationError, SoftTimeLimitExceeded, Terminated
from amqtask.execution.request import Abandoned, HardLimitReached
from amqtask.ground.printable import bounded_logger
from amqtask_pools._hub import HubMonitor
from amqtask_pools._slot_table import SlotPool

if TYPE_CHECKING:
    from amqtask.execution.executor import Executor
    from amqtask.execution.request import Outcome, Request
    from amqtask.ground.shapes import CoroutineOf
    from amqtask.pool import Loop, OnOutcomes, PoolOptions, Timer
    from amqtask_pools._green_loop import GreenLoop
    from amqtask_pools._hub import Hub

logger = bounded_logger("amqtask.pools")

# Seconds that an interrupted task may take to end, and all of them together when the pool stops.
GRACE = 5.0
STOP_GRACE = 0.5
# For so many seconds starting tasks may keep the I/O loop from its sockets.
TURN_TIME = 0.005


class Slot:
    """One green thread and its request. `submitter` is set while a green thread waits for the switch back."""

    __slots__ = ("green", "request", "submitter")

    def __init__(self) -> None:
        self.green: Any = None
        self.request: Request | None = None
        self.submitter: Any = None


class GreenPool(SlotPool):
    """See amqtask.pool.Pool."""

    name: ClassVar[str]
    limits: ClassVar[frozenset[str]] = frozenset({"soft", "hard"})
    alone: ClassVar[str | None] = "it patches Python in the whole process"
    hub_class: ClassVar[type[Hub]]

    def __init__(self, executor: Executor, loop: Loop, on_outcomes: OnOutcomes, options: PoolOptions) -> None:
        super().__init__(executor, loop, on_outcomes, options)
        if not self.hub_class.is_patched():
            raise ConfigurationError(
                f"the {self.name} pool needs {self.name} to patch Python before anything else is imported, else one task that "
                f"waits keeps all others waiting. Start the worker with `amqtask worker -P {self.name}`, or begin your "
                f"program with `{self.hub_class.patch_line}`."
            )
        self._hub = self.hub_class()
        self._idle: list[Slot] = []
        self._busy: dict[int, Slot] = {}
        self._submitter: Any = None
        self._is_return_due = False
        self._turn_began = 0.0
        self._is_turn_over = False
        self._green_loop: GreenLoop | None = None
        self._watch: HubMonitor | None = None
        executor.run_coroutine = self._run_coroutine

    @classmethod
    def prepare_process(cls) -> None:
        """Patch the standard library; called before anything else in the process."""
        cls.hub_class.patch()

    def start(self) -> None:
        """Green threads start with the first requests."""
        if self._watch is None:
            self._watch = HubMonitor(self._hub, self._loop, self._run.__code__)
            self._watch.start()
            # A process that a task forks (multiprocessing) has copies of all green threads: without this they would run the
            # other tasks a second time there, and the worker's I/O loop would read from the parent's connection.
            os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        if not self._is_stopped:
            self._hub.begin_anew()

    @property
    def free(self) -> int:
        """Idle slots; none for the rest of a loop turn in which starting tasks took long."""
        if self._is_turn_over:
            return 0
        # An ended request, whose outcome waits for its delivery, takes no slot.
        return self._slots - len(self._running) + len(self._outcomes)

    # -- starting tasks

    def submit(self, request: Request) -> None:
        """Start the request; returns when its task has ended or waits for something."""
        self._running[request.number] = request
        first: tuple[Any, ...] = ()
        if self._idle:
            slot = self._idle.pop()
        else:
            slot = Slot()
            slot.green, first = self._hub.make(self._work, slot)
        slot.request = request
        self._busy[request.number] = slot
        self._submitter = slot.submitter = self._hub.current()
        if not self._is_return_due:
            self._is_return_due = True
            self._hub.call_soon(self._return_to_submitter)
        slot.green.switch(*first)
        self._submitter = slot.submitter = None
        self._look_at_the_time()

    def _return_to_submitter(self) -> None:
        """In the hub: the task that was just started waits, so resume the submitter."""
        self._is_return_due = False
        submitter = self._submitter
        if submitter is not None:
            submitter.switch()

    def _look_at_the_time(self) -> None:
        now = time.perf_counter()
        if not self._turn_began:
            self._turn_began = now
            self._is_delivery_due = True
            self._loop.call_soon(self._deliver)
        elif now - self._turn_began > TURN_TIME:
            self._is_turn_over = True

    def _deliver(self) -> None:
        was_over = self._is_turn_over
        self._turn_began, self._is_turn_over = 0.0, False
        has_outcomes = bool(self._outcomes)
        super()._deliver()
        if was_over and not has_outcomes:
            # The worker saw no free slot before: make it look again.
            self._on_outcomes(())

    # -- in a slot's green thread

    def _work(self, slot: Slot) -> None:
        wait = self._hub.wait
        while not self._is_stopped:
            request = slot.request
            if request is not None:
                slot.request = None
                try:
                    self._run(request, slot)
                except BaseException:  # thrown in from anywhere: the slot goes on
                    logger.exception("a slot failed with %r", request)
                self._busy.pop(request.number, None)
                self._idle.append(slot)
            submitter, slot.submitter = slot.submitter, None
            try:
                if submitter is not None:
                    submitter.switch()
                else:
                    wait()
            except GreenletExit:
                return
            except BaseException as error:  # noqa: BLE001 - a timeout, say, that a task has left: the slot goes on
                logger.warning("a slot got %s between two tasks: has a task left a timeout?", type(error).__name__)

    def _run(self, request: Request, slot: Slot) -> None:
        if request.soft_limit is None and request.hard_limit is None:
            outcome = self._executor.execute(request)
        else:
            outcome = self._run_limited(request)
        if slot.submitter is None:
            self._hand_back(outcome)
        else:
            # Still in the submitter's loop turn, at whose end `_deliver` runs.
            self._outcomes.append(outcome)

    def _run_limited(self, request: Request) -> Outcome:
        timeouts: list[Timer] = []
        soft, hard = request.soft_limit, request.hard_limit
        if soft is not None:
            timeouts.append(self._hub.timeout(soft, SoftTimeLimitExceeded(soft)))
        if hard is not None:
            error = HardLimitReached(hard)
            timeouts.append(self._hub.timeout(hard, error))
            timeouts.append(self._loop.call_later(hard + GRACE, lambda: self._give_up(request, error)))
        try:
            return self._executor.execute(request)
        finally:
            for timeout in timeouts:
                timeout.cancel()

    # -- ending tasks from outside

    def terminate(self, number: int, reason: str, signum: int | None = None) -> bool:
        """Raise Terminated in the task where it waits."""
        slot, request = self._busy.get(number), self._running.get(number)
        if slot is None or request is None:
            return False
        error = Terminated(reason)
        self._hub.call_soon(self._throw, number, error)
        self._loop.call_later(GRACE, lambda: self._give_up(request, error))
        return True

    def _throw(self, number: int, error: BaseException) -> None:
        slot = self._busy.get(number)
        if slot is not None:
            slot.green.throw(error)

    def _give_up(self, request: Request, error: Terminated) -> None:
        """The task caught the interruption and runs on: report an outcome; its later outcome is dropped."""
        if request.number in self._running and request.number in self._busy:
            logger.error("task %s[%s] does not end (%s) and is given up", request.task, request.id, error)
            # Storing the result may wait, and the I/O loop must not wait.
            self._hub.spawn(lambda: self._hand_back(self._executor.ended_by_pool(request, error)))

    # -- async def tasks

    def _run_coroutine(self, coroutine: CoroutineOf[object]) -> object:
        from amqtask_pools._green_loop import GreenLoop  # asyncio, which the library has to patch before

        if self._green_loop is None:
            self._green_loop = GreenLoop(self._hub)
            self._green_loop.start()
            if self._watch is not None:
                self._watch.coroutine_code = GreenLoop.finish.__code__
        return self._green_loop.run(coroutine)

    # -- the rest of the contract

    def resize(self, slots: int) -> None:
        """Change the number of slots; surplus green threads cost a few KiB and stay."""
        self._slots = slots

    def stop(self) -> list[Request]:
        """Interrupt running tasks where they wait."""
        unfinished = self._give_back_all()
        for number in list(self._busy):
            self._hub.call_soon(self._throw, number, Abandoned())
        deadline = time.monotonic() + STOP_GRACE
        while self._busy and time.monotonic() < deadline:
            self._hub.sleep(0.01)
        if self._green_loop is not None:
            self._green_loop.stop()
        if self._watch is not None:
            self._watch.stop()
        return unfinished

"""prefork: a slot is a child process, on billiard. The parent never waits for a child; a lost child loses no task.

One socket pair per child, no shared pipe, no semaphore. Requests go as single packets. For tasks that take less than a
millisecond a child gets several ahead of time, which hides the hand-over; when its present task then takes longer than
EXPECTED, what it has not read is taken back (the parent keeps the reading end, too) and given to a slot that is free. So no
task waits behind a long one while another slot idles.
"""

from __future__ import annotations

import gc
import logging
import signal
import time
from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar

import billiard

from amqtask import signals
from amqtask.exceptions import TimeLimitExceeded, WorkerLostError
from amqtask_pools.prefork.child import FAILED_TO_START
from amqtask_pools.prefork.process import ChildProcess

if TYPE_CHECKING:
    from amqtask.execution.executor import Executor
    from amqtask.execution.outcome import Outcome
    from amqtask.execution.request import Request
    from amqtask.pool import Loop, OnOutcomes, PoolOptions, Timer

logger = logging.getLogger("amqtask.pools")
# A child may be given so many requests at once, while the mean runtime is below SHORT (seconds).
LOOK_AHEAD, SHORT = 12, 0.001
# A child that is at one task for so long gives back what it has not read; how often that is looked at (seconds).
EXPECTED, CHECK = 0.01, 0.01
# Requests whose body is above this are given to idle children only (bytes).
LARGE = 48 * 1024
# Children that die before they answered anything, in a row, until starting slows down; and the longest pause.
QUICK_DEATHS, LONGEST_PAUSE = 10, 30.0
# Seconds between SIGTERM and SIGKILL of a terminated task's child.
GRACE = 1.0


class PreforkPool:
    """See amqtask.pool.Pool."""

    name: ClassVar[str] = "prefork"
    limits: ClassVar[frozenset[str]] = frozenset({"soft", "hard"})

    def __init__(self, executor: Executor, loop: Loop, on_outcomes: OnOutcomes, options: PoolOptions) -> None:
        self._executor = executor
        self._loop = loop
        self._on_outcomes = on_outcomes
        self._options = options
        self._slots = options.slots
        self._context = billiard.get_context("fork")
        self._children: list[ChildProcess] = []
        # Taken back from children, first in line for the next free slot.
        self._returned: deque[Request] = deque()
        self._hard_limits: dict[int, Timer] = {}
        self._mean = 1.0
        self._check: Timer | None = None
        self._quick_deaths = 0
        self._starting: Timer | None = None
        self._total = 0
        self._is_stopped = False

    @classmethod
    def prepare_process(cls) -> None:
        """Nothing to prepare."""

    # -- the contract

    def start(self) -> None:
        """Fork the children; what is in memory now is shared with them, page by page, until it is written to."""
        gc.collect()
        gc.freeze()
        for _ in range(self._slots):
            self._fork()

    @property
    def slots(self) -> int:
        """How many children."""
        return self._slots

    @property
    def free(self) -> int:
        """Idle children; more while tasks are short."""
        depth = LOOK_AHEAD if self._mean < SHORT else 1
        room = sum(max(0, depth - len(child.given)) for child in self._children if not child.is_leaving)
        return max(0, room - len(self._returned))

    def submit(self, request: Request) -> None:
        """Give it to the child with the least to do."""
        child = self._choose(request)
        if child is None:
            self._returned.append(request)
            return
        self._give(child, request)

    def resize(self, slots: int) -> None:
        """Fork more, or let children go, idle ones first."""
        self._slots = slots
        for child in sorted(self._children, key=lambda child: len(child.given)):
            if self._count() <= slots:
                break
            if not child.is_leaving:
                self._retire(child)
        while self._count() < slots:
            self._fork()

    def terminate(self, number: int, reason: str) -> bool:
        """End the child that runs it; its outcome is REVOKED."""
        for child in self._children:
            if number in child.given:
                self._take_back(child)
                if number not in child.given:  # it had not begun: it waits in our line, and is dropped from it
                    return self._drop_returned(number, reason)
                child.revoke_reason = reason
                child.kill(signal.SIGTERM)
                self._loop.call_later(GRACE, child.kill)
                return True
        return self._drop_returned(number, reason)

    def stop(self) -> list[Request]:
        """Kill all children at once and give back what they had."""
        self._is_stopped = True
        for timer in (self._check, self._starting, *self._hard_limits.values()):
            if timer is not None:
                timer.cancel()
        self._hard_limits.clear()
        left: list[Request] = list(self._returned)
        self._returned.clear()
        for child in self._children:
            self._unwatch(child)
            left += child.given.values()
            if child.given:
                child.kill()
            else:
                child.retire()
        for child in self._children:
            child.process.join(0.5)
            if child.process.is_alive():
                child.kill()
            child.close()
        self._children.clear()
        return left

    def stats(self) -> dict[str, Any]:
        """Numbers for `inspect stats`."""
        return {
            "max-concurrency": self._slots,
            "processes": [child.pid for child in self._children],
            "max-tasks-per-child": self._options.max_tasks_per_child or "N/A",
            "put-guarded-by-semaphore": False,
            "timeouts": [],
            "total": self._total,
        }

    # -- children come

    def _count(self) -> int:
        return sum(1 for child in self._children if not child.is_leaving)

    def _fork(self) -> None:
        if signals.worker_before_create_process:
            signals.worker_before_create_process.send(sender=self)
        inherited = [sock for child in self._children for sock in child.sockets]
        child = ChildProcess(self._context, self._executor, self._options, inherited)
        self._children.append(child)
        self._loop.add_reader(child.fd, lambda: self._readable(child))
        self._loop.add_reader(child.sentinel, lambda: self._ended(child))

    def _refill(self) -> None:
        """Replace what is missing; slower when children die as soon as they start."""
        if self._is_stopped or self._starting is not None:
            return
        if self._quick_deaths < QUICK_DEATHS:
            while self._count() < self._slots:
                self._fork()
            return
        pause = min(LONGEST_PAUSE, 0.5 * 2 ** (self._quick_deaths - QUICK_DEATHS))
        logger.error(
            "%d pool processes in a row died before they answered anything; the next one starts in %g s",
            self._quick_deaths,
            pause,
        )

        def fork() -> None:
            self._starting = None
            if not self._is_stopped and self._count() < self._slots:
                self._fork()
                self._refill()

        self._starting = self._loop.call_later(pause, fork)

    # -- requests go

    def _choose(self, request: Request) -> ChildProcess | None:
        limited = request.hard_limit is not None or request.soft_limit is not None
        alone = limited or len(request.body) > LARGE
        depth = 1 if alone or self._mean >= SHORT else LOOK_AHEAD
        best: ChildProcess | None = None
        least = depth
        for child in self._children:
            count = len(child.given)
            if count < least and not child.is_leaving and not child.has_unsent:
                if not count:
                    return child
                best, least = child, count
        return best

    def _give(self, child: ChildProcess, request: Request) -> None:
        child.give(request)
        if child.has_unsent:
            self._loop.add_writer(child.fd, lambda: self._writable(child))
        if request.hard_limit is not None:
            number = request.number
            self._hard_limits[number] = self._loop.call_later(
                request.hard_limit, lambda: self._too_long(child, request)
            )
        if len(child.given) > 1 and self._check is None:
            self._check = self._loop.call_later(CHECK, self._look_for_long_ones)

    def _give_returned(self) -> None:
        while self._returned:
            child = self._choose(self._returned[0])
            if child is None:
                return
            self._give(child, self._returned.popleft())

    def _writable(self, child: ChildProcess) -> None:
        child.send_more()
        if not child.has_unsent:
            self._loop.remove_writer(child.fd)

    def _look_for_long_ones(self) -> None:
        """Take back what waits behind a task that takes long."""
        self._check = None
        now = time.monotonic()
        waiting = False
        for child in self._children:
            if len(child.given) < 2:
                continue
            if now - child.head_since > EXPECTED:
                self._mean = max(self._mean, now - child.head_since)
                self._take_back(child)
            waiting = waiting or len(child.given) > 1
        self._give_returned()
        if waiting:
            self._check = self._loop.call_later(CHECK, self._look_for_long_ones)

    def _take_back(self, child: ChildProcess) -> None:
        for request in child.take_back():
            self._forget_limit(request.number)
            self._returned.append(request)

    def _drop_returned(self, number: int, reason: str) -> bool:
        for request in self._returned:
            if request.number == number:
                self._returned.remove(request)
                self._on_outcomes([self._executor.revoked(request, reason)])
                return True
        return False

    # -- outcomes come

    def _readable(self, child: ChildProcess) -> None:
        outcomes = child.receive()
        if outcomes:
            self._quick_deaths = 0
            mean = self._mean
            expected = []
            for outcome in outcomes:
                if child.answered(outcome):
                    expected.append(outcome)
                    mean += (outcome.runtime - mean) * 0.1
                    if self._hard_limits:
                        self._forget_limit(outcome.number)
            self._mean = mean
            self._total += len(expected)
            if self._returned:
                self._give_returned()
            if expected:
                self._on_outcomes(expected)

    def _forget_limit(self, number: int) -> None:
        timer = self._hard_limits.pop(number, None)
        if timer is not None:
            timer.cancel()

    # -- children go

    def _retire(self, child: ChildProcess) -> None:
        self._take_back(child)
        child.retire()
        self._give_returned()

    def _too_long(self, child: ChildProcess, request: Request) -> None:
        """The hard limit: nothing but the end of the process is sure to end the task."""
        self._hard_limits.pop(request.number, None)
        if request.number in child.given:
            child.verdict = TimeLimitExceeded(
                f"{request.task}[{request.id}] ran longer than its time limit of {request.hard_limit:g} s"
            )
            child.kill()

    def _ended(self, child: ChildProcess) -> None:
        """A child's end: its unread requests go to others, the one it ran is reported lost, another child starts."""
        self._readable(child)  # what it answered with its last breath
        self._unwatch(child)
        self._children.remove(child)
        self._take_back(child)
        ending = child.ending
        lost = list(child.given.values())
        child.given.clear()
        child.close()
        if (not child.has_answered and not child.is_leaving and not lost) or child.exit_code == FAILED_TO_START:
            self._quick_deaths += 1
        self._refill()
        self._give_returned()
        outcomes = [self._end(child, request, ending, first=index == 0) for index, request in enumerate(lost)]
        for request in lost:
            self._forget_limit(request.number)
        if outcomes:
            self._on_outcomes(outcomes)

    def _unwatch(self, child: ChildProcess) -> None:
        self._loop.remove_reader(child.sentinel)
        self._loop.remove_reader(child.fd)
        self._loop.remove_writer(child.fd)

    def _end(self, child: ChildProcess, request: Request, ending: str, *, first: bool) -> Outcome:
        if first and child.revoke_reason is not None:
            return self._executor.revoked(request, child.revoke_reason)
        verdict = child.verdict
        if first and isinstance(verdict, TimeLimitExceeded):
            logger.error("%s; its process %d was killed", verdict, child.pid)
            return self._executor.lost(request, verdict)
        logger.error("process %d, which ran %s[%s], %s", child.pid, request.task, request.id, ending)
        return self._executor.lost(
            request, WorkerLostError(f"the process that ran {request.task}[{request.id}] {ending}")
        )

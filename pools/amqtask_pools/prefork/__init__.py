"""prefork: a slot is a child process, on billiard. The parent never waits for a child; a child that dies loses one task.

One socket pair per child: no shared pipe, no semaphore. A request is one packet. While tasks take less than a millisecond a
child is sent several requests ahead of time, which hides the transfer; as soon as its present task takes longer, the requests
that it has not read are taken back (the parent holds the reading end, too) and go to an idle slot, or to the front of the line
for the next one. So no task waits behind a long one while another slot idles.

Only the parent keeps books: of the requests that a child has read and not answered, the last one runs, and outcomes of the
others are under way.
"""

from __future__ import annotations

import gc
import signal
import time
from collections import deque
from typing import TYPE_CHECKING, ClassVar

import billiard

from amqtask import signals
from amqtask.exceptions import InvalidTaskError, TimeLimitExceeded, WorkerLostError
from amqtask.ground.loop import OneTimer
from amqtask.ground.printable import bounded_logger
from amqtask.pool import PoolDefaults, Running
from amqtask_pools._limits import HardLimits
from amqtask_pools.prefork.child import NUDGE, RETIRED, SOFT_LIMIT
from amqtask_pools.prefork.children import ChildProcess, Children, Respawn
from amqtask_pools.prefork.frames import PIECE, encode_request

if TYPE_CHECKING:
    from amqtask.execution.executor import Executor
    from amqtask.execution.request import Outcome, Request
    from amqtask.ground.shapes import JsonObject
    from amqtask.pool import Loop, OnOutcomes, PoolOptions

logger = bounded_logger("amqtask.pools")
# When a child runs one task for EXPECTED seconds, its unread requests are taken back; CHECK: seconds between looks for that.
EXPECTED, CHECK = 0.008, 0.008
# Seconds between SIGTERM and SIGKILL: for a terminated task's child, and for all children at the end.
GRACE, END_GRACE = 1.0, 0.5
# The longest time that a child may take to start, after others took too long (seconds).
LONGEST_START = 120.0


class PreforkPool(PoolDefaults):
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
        self._children = Children()
        # Requests that were taken back, or that found no child; they go before all others.
        self._line: deque[Request] = deque()
        self._check = OneTimer(loop)
        self._hard_limits = HardLimits(loop, self._look_at_limits)
        self._respawn = Respawn(
            loop,
            fork=self._fork,
            missing=lambda: self._slots - self._children.taking - len(self._finishing),
            on_late=self._filled,
        )
        self._buffer = bytearray(PIECE + 1)
        # How long a child may take to start; longer after one that took too long.
        self._patience = options.start_timeout
        self._total = 0
        self._is_stopped = False
        # While the pool restarts: old children that have to be replaced, and below those that end when their task has ended.
        self._old: deque[ChildProcess] = deque()
        self._finishing: set[ChildProcess] = set()

    # -- the contract

    def start(self) -> None:
        """Fork the children; they share the parent's present memory, page by page, until it is written to."""
        gc.collect()
        gc.freeze()
        self._respawn.fill()

    @property
    def slots(self) -> int:
        """How many children there should be."""
        return self._slots

    @property
    def free(self) -> int:
        """Idle children; more while tasks are short."""
        return 0 if self._line else self._children.room

    def submit(self, request: Request) -> None:
        """Send the request to an idle child, or to the child with the fewest requests."""
        child = self._children.choose(len(request.body))
        if child is None:
            self._line.append(request)
        else:
            self._give(child, request)

    def resize(self, slots: int) -> None:
        """Fork more children, or retire some, idle ones first."""
        self._slots = slots
        for child in sorted(self._children.live, key=lambda child: len(child.requests)):
            if self._children.taking > slots and not child.is_leaving:
                self._let_go(child)
        self._respawn.fill()
        self._give_line()

    def terminate(self, number: int, reason: str, signum: int | None = None) -> bool:
        """End the child that runs the request with `signum` (default TERM), and a second later with KILL; its outcome is
        REVOKED."""
        for child in self._children.live:
            if number in child.requests:
                self._readable(child)
                self._take_back(child)
                break
        else:
            return self._revoke_waiting(number, reason)
        is_ended = False
        if number not in child.requests:  # just ended, or had not begun
            is_ended = self._revoke_waiting(number, reason)
        elif signum == SOFT_LIMIT:
            is_ended = True  # or not: the task decides
            child.kill(signum)
        elif child.condemned is None and number == next(reversed(child.requests)):  # else its outcome is on the way
            is_ended = True
            self._condemn(child, number, reason)
            child.kill(signum or signal.SIGTERM)
            self._loop.call_later(GRACE, child.kill)
        self._give_line()
        return is_ended

    def take_back(self) -> list[Request]:
        """The requests that no child has begun: unread by their child, or waiting for one."""
        for child in self._children.live:
            self._take_back(child)
        taken = list(self._line)
        self._line.clear()
        return taken

    def restart(self) -> None:
        """Replace all children: busy ones when their task has ended, idle ones one after the other."""
        self._old = deque(sorted(self._children.live, key=lambda child: not child.requests))
        self._renew()

    def _renew(self) -> None:
        while self._old:
            child = self._old.popleft()
            if child.is_leaving or child not in self._children.live:
                continue
            self._let_go(child)
            if not child.requests:
                break  # the next child is retired when this one is replaced
            self._finishing.add(child)
        self._give_line()

    def find(self, number: int) -> Running | None:
        """The child that runs the request; None when it was only sent ahead of time and has not begun."""
        for child in self._children.live:
            if child.is_ready and number == next(iter(child.requests), None):
                return Running(child.pid, child.head_since)
        return None

    def stop(self) -> list[Request]:
        """End all children now, busy ones in the middle of their task."""
        self._is_stopped = True
        self._respawn.stop()
        self._hard_limits.stop()
        self._check.cancel()
        unfinished = list(self._line)
        for child in self._children.live:
            self._unwatch(child)
            unfinished += child.requests.values()
            if child.requests:
                child.kill(signal.SIGTERM)
            else:
                child.retire()
        _end_all(self._children.live)
        self._line.clear()
        self._children.clear()
        self._old.clear()
        self._finishing.clear()
        return unfinished

    def stats(self) -> JsonObject:
        """Numbers for `inspect stats`."""
        return {
            "max-concurrency": self._slots,
            "processes": [child.pid for child in self._children.live],
            "max-tasks-per-child": self._options.max_tasks_per_child or "N/A",
            "total": self._total,
            "writes": {"total": self._total, "raw": ", ".join(str(child.answered) for child in self._children.live)},
        }

    # -- sending requests

    def _give(self, child: ChildProcess, request: Request) -> None:
        try:
            message = encode_request(request)
        except InvalidTaskError as error:
            outcome = self._executor.refused(request, error)
            self._loop.call_soon(lambda: self._deliver([outcome]))
            return
        self._children.note_given(child)
        if not child.give(request, message):
            self._loop.add_writer(child.fd, lambda: self._writable(child))
        if request.hard_limit is not None:
            self._watch_head(child)
        if not self._check.is_set and (len(child.requests) > 1 or not child.is_ready):
            self._check.set(CHECK, self._look_for_long_ones)

    def _writable(self, child: ChildProcess) -> None:
        if child.send_more():
            self._loop.remove_writer(child.fd)

    def _give_line(self) -> None:
        while self._line:
            child = self._children.choose(len(self._line[0].body))
            if child is None:
                return
            self._give(child, self._line.popleft())

    # -- taking unread requests back

    def _look_for_long_ones(self) -> None:
        """Take back requests that wait behind a long task, or for a child that takes long to start."""
        latest = time.monotonic() - EXPECTED
        is_waiting = False
        for child in self._children.live:
            if len(child.requests) > child.is_ready and not child.is_leaving:
                is_waiting = True
                if child.head_since < latest:
                    self._relieve(child)
        self._give_line()
        if is_waiting and not self._check.is_set:
            self._check.set(CHECK, self._look_for_long_ones)

    def _relieve(self, child: ChildProcess) -> None:
        if child.is_ready:
            self._children.slow.add(child)
        elif not any(idle_child.is_ready for idle_child in self._children.idle[-1:]):
            return  # no other child would begin them sooner
        self._take_back(child)
        if len(child.requests) > 1:
            child.kill(NUDGE)

    def _take_back(self, child: ChildProcess) -> None:
        taken = child.take_back()
        self._line.extendleft(reversed(taken))
        if taken:
            self._children.note_taken_back(child, len(taken))

    def _revoke_waiting(self, number: int, reason: str) -> bool:
        request = next((request for request in self._line if request.number == number), None)
        if request is None:
            return False
        self._line.remove(request)
        outcome = self._executor.revoked(request, reason)
        self._loop.call_soon(lambda: self._deliver([outcome]))
        return True

    # -- outcomes

    def _readable(self, child: ChildProcess) -> None:
        outcomes = child.receive()
        if child.is_ready and child.patience is not None:
            self._is_ready(child)
        if outcomes:
            self._total += len(outcomes)
            self._respawn.works()
            self._children.note_outcomes(child, outcomes)
            self._watch_head(child)
        if child.broken is not None:
            self._loop.remove_reader(child.fd)
            self._children.note_retiring(child)
            child.is_leaving = True
        if outcomes:
            if self._line:
                self._give_line()
            self._on_outcomes(outcomes)

    def _watch_head(self, child: ChildProcess) -> None:
        deadline = _deadline(child)
        if deadline is not None:
            self._hard_limits.watch(deadline)

    def _deliver(self, outcomes: list[Outcome]) -> None:
        if not self._is_stopped:
            self._on_outcomes(outcomes)

    # -- starting children

    def _fork(self) -> None:
        if signals.worker_before_create_process:
            signals.worker_before_create_process.send(sender=self)
        child = ChildProcess(
            self._context, self._executor, self._options, siblings=self._children.live, buffer=self._buffer
        )
        self._children.add(child)
        self._loop.add_reader(child.fd, lambda: self._readable(child))
        self._loop.add_reader(child.sentinel, lambda: self._ended(child))
        patience = self._patience
        child.patience = self._loop.call_later(patience, lambda: self._start_late(child, patience))

    def _filled(self) -> None:
        """A child was started after a pause."""
        self._give_line()
        self._on_outcomes([])

    def _is_ready(self, child: ChildProcess) -> None:
        if child.patience is not None:
            child.patience.cancel()
            child.patience = None
        self._children.note_ready(child)
        self._watch_head(child)

    def _start_late(self, child: ChildProcess, seconds: float) -> None:
        self._readable(child)  # perhaps it is ready, and it was this process that stood still
        if child.is_ready:
            return
        self._patience = max(self._patience, min(2 * seconds, LONGEST_START))
        hint = " (receivers of the signal worker_process_init run in it first)" if signals.worker_process_init else ""
        logger.error(
            "process %d of the pool is not ready after %g s and is killed%s; the next one gets %g s. If starting takes that "
            "long, raise worker_proc_alive_timeout",
            child.pid,
            seconds,
            hint,
            self._patience,
        )
        child.kill()

    # -- ending children

    def _let_go(self, child: ChildProcess) -> None:
        self._take_back(child)
        self._children.note_retiring(child)
        if not child.retire():
            self._loop.add_writer(child.fd, lambda: self._writable(child))

    def _condemn(self, child: ChildProcess, number: int, reason: Exception | str) -> None:
        self._take_back(child)
        self._children.note_retiring(child)
        child.condemn(number, reason)

    def _look_at_limits(self) -> float | None:
        """Kill the children whose task has reached its hard limit: nothing else is sure to end a task. Returns when to look
        again."""
        next_deadline: float | None = None
        for child in list(self._children.live):
            deadline = _deadline(child)
            if deadline is not None and deadline <= time.monotonic():
                self._readable(child)  # perhaps it has just ended
                deadline = _deadline(child)
            if deadline is None or self._is_stopped:
                continue
            if deadline <= time.monotonic():
                request = next(iter(child.requests.values()))
                limit = f"{request.task}[{request.id}] ran longer than its time limit of {request.hard_limit:g} s"
                logger.error("%s; its process %d is killed", limit, child.pid)
                self._condemn(child, request.number, TimeLimitExceeded(limit))
                child.kill()
            else:
                next_deadline = deadline if next_deadline is None else min(next_deadline, deadline)
        self._give_line()
        return next_deadline

    def _ended(self, child: ChildProcess) -> None:
        """A child has ended: its unread requests go to others, the one that it ran is lost, another child starts."""
        if not child.has_ended:
            return  # the descriptor belonged to another child a moment ago
        self._readable(child)  # its last outcomes
        if child not in self._children.live:
            return  # stopped, meanwhile
        self._unwatch(child)
        was_told_to_go = child.is_leaving and child.broken is None
        self._finishing.discard(child)
        self._children.note_retiring(child)
        self._children.live.remove(child)
        child.is_leaving = True
        if child.exit_code != RETIRED:
            child.kill_programs()
        unread = child.take_back()
        lost = list(child.requests.values())
        outcomes = [self._end(child, request) for request in lost]
        if child.condemned is not None:
            outcomes += [self._end(child, request) for request in unread if request.number == child.condemned[0]]
            unread = [request for request in unread if request.number != child.condemned[0]]
        elif not lost:
            self._note_end(child, was_told_to_go=was_told_to_go)
        self._line.extendleft(reversed(unread))
        child.close()
        self._respawn.fill()
        self._renew()
        self._total += len(outcomes)
        self._on_outcomes(outcomes)

    def _note_end(self, child: ChildProcess, *, was_told_to_go: bool) -> None:
        """A child ended that ran no task."""
        if child.exit_code != RETIRED:
            logger.warning("process %d %s while it ran no task; it is replaced", child.pid, child.ending)
        if not child.answered and not was_told_to_go:
            self._respawn.died_early()

    def _end(self, child: ChildProcess, request: Request) -> Outcome:
        if child.condemned is not None and child.condemned[0] == request.number:
            reason = child.condemned[1]
            if isinstance(reason, TimeLimitExceeded):
                return self._executor.lost(request, reason)
            return self._executor.revoked(request, str(reason))
        logger.error("process %d, which ran %s[%s], %s", child.pid, request.task, request.id, child.ending)
        error = WorkerLostError(f"the process that ran {request.task}[{request.id}] {child.ending}")
        return self._executor.lost(request, error)

    def _unwatch(self, child: ChildProcess) -> None:
        self._loop.remove_reader(child.sentinel)
        self._loop.remove_reader(child.fd)
        self._loop.remove_writer(child.fd)
        if child.patience is not None:
            child.patience.cancel()


def _deadline(child: ChildProcess) -> float | None:
    """When the request that the child runs reaches its hard limit (monotonic seconds); None without a limit."""
    if not child.requests or not child.is_ready or child.condemned is not None:
        return None
    limit = next(iter(child.requests.values())).hard_limit
    return None if limit is None else child.head_since + limit


def _end_all(children: list[ChildProcess]) -> None:
    """Wait for children that were told to end; kill those that do not end."""
    deadline = time.monotonic() + END_GRACE
    for child in children:
        if not child.wait(deadline - time.monotonic()):
            child.kill()
            child.wait(GRACE)
        if child.requests:
            child.kill_programs()
        child.close()

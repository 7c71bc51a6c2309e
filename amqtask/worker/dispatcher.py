"""The dispatcher: requests wait here until a slot is free; queues take turns.

A request is handed to the pool only while the pool has room, so nothing waits behind a long task while another
slot idles. Rate limits hold back only their own tasks (see lines.py), and queues with slots of their own only their own
requests (see division.py).
"""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from amqtask.execution.no_run import requeued
from amqtask.execution.request import Calls, calls_of, is_batch
from amqtask.ground.loop import OneTimer
from amqtask.topology.declarations import base_of
from amqtask.worker.lines import BatchLine, NextInLine, SharedLine

if TYPE_CHECKING:
    from amqtask.execution.request import Outcome, Request
    from amqtask.pool import Loop, Pool
    from amqtask.worker.deliveries import Deliveries
    from amqtask.worker.division import Division
    from amqtask.worker.lines import Throttle
    from amqtask.worker.options import WorkQueues
    from amqtask.worker.report import Report
    from amqtask.worker.strategy import TaskStrategy


# Their line's name, which is no queue's.
_FIRST = "\0"


class Dispatcher:
    """Keeps waiting requests and submits them to the pool; requests that the pool has are in `running`, a batch as one.

    `watched` has requests that must start before a wall-clock time, or that were revoked while they waited
    (infinity): `admit(request, deadline)` is called just before they run; False means that the request must not run and has
    been dealt with. `accepted(request)` is called just before the pool gets a request in `acks_early`. `turned_away(request)` is
    called with one whose turn may have come, while no slot is free for it. Starts are reported while `report` sees them.
    """

    def __init__(
        self,
        *,
        pool: Pool,
        loop: Loop,
        throttle: Throttle,
        report: Report,
        admit: Callable[[Request, float], bool],
        acks_early: AbstractSet[int],
        accepted: Callable[[Request], None],
        turned_away: Callable[[Request], None] = lambda request: None,
        slots: Callable[[], int] = lambda: 1,
        division: Division | None = None,
        has_batches: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._report = report
        self._has_batches = has_batches
        self.look_at_report()
        self._throttle = throttle
        self._admit = admit
        self._acks_early = acks_early
        self._accepted = accepted
        self._turned_away = turned_away
        self._clock = clock
        # Before all others: those whose turn may have come.
        self._first: deque[Request] = deque()
        self.next_in_line = NextInLine(loop, self._add_first, slots, self._runs_in, clock)
        self._lines: dict[str, deque[Request]] = {_FIRST: self._first}
        self._turns: deque[deque[Request]] = deque()
        self._timer = OneTimer(loop)
        self._busy = False
        self._loop = loop
        # How many want that nothing starts.
        self._holds = 0
        self.running: dict[int, Request] = {}
        # The numbers of running batches by those of their calls.
        self._batch_of: dict[int, int] = {}
        self._division: Division | None = None
        if division:
            self.divide(division)
        self.watched: dict[int, float] = {}

    def add(self, request: Request) -> None:
        """Append a request to its queue's line; call `run` later."""
        line = self._lines.get(request.queue)
        if line is None:
            line = self._lines[request.queue] = self._new_line(request.queue)
        if not line:
            self._turns.append(line)
        line.append(request)

    def _new_line(self, queue: str) -> deque[Request]:
        base = base_of(queue)
        if base == queue:
            return deque()
        return next(
            (line for name, line in self._lines.items() if name != base and base_of(name) == base), SharedLine()
        )

    def _add_first(self, request: Request) -> None:
        """Have it run soon, before all that wait here. Where no slot is free another worker may have one."""
        first = self._first
        if self._pool.free <= len(first) or not self.has_room(request):
            self.watched.pop(request.number, None)
            self._turned_away(request)
            return
        if not first:
            self._turns.appendleft(first)
        first.append(request)
        self._loop.call_soon(self.run)

    def _runs_in(self, place: str) -> bool:
        return any(place in request.places for request in self.running.values())

    def run(self) -> None:
        """Fill the free slots. A pool may run the request inside `submit` and report back from there."""
        if self._busy or self._holds:
            return
        self._busy = True
        try:
            if self._throttle:
                self._fill_from_held()
            if self._turns:
                self._fill_from_lines()
        finally:
            self._busy = False

    def hold(self) -> None:
        """Start nothing until `release`; it may be called by several, each of whom releases."""
        self._holds += 1

    def release(self) -> None:
        """Go on, unless another holds; call `run` later."""
        self._holds -= 1

    def divide(self, division: Division) -> None:
        """From now on a queue takes only the slots that this grants it."""
        self._division = division
        self.running = division.counted(self.running)

    def has_room(self, request: Request) -> bool:
        """Whether the queue of a request may take another slot, and its pool has one if there are several."""
        return self._division is None or self._division.has_room(request.queue)

    def look_at_report(self) -> None:
        """Whether starts are seen may have changed. While nobody sees them, without batches, the pool itself is called."""
        submit = self._submit_seen if self._report.sees_started else self._pool.submit
        self._submit = partial(self._submit_one_or_batch, submit) if self._has_batches else submit

    def _submit_seen(self, request: Request) -> None:
        self._report.started(request)
        self._pool.submit(request)

    def _submit_one_or_batch(self, submit: Callable[[Request], None], request: Request) -> None:
        if not is_batch(request):
            submit(request)
            return
        calls = self._begin_batch(request)
        if self._report.sees_started:
            for call in calls:
                self._report.started(call)
        if calls:
            self._pool.submit(request)

    def _fill_from_lines(self) -> None:
        pool, turns, running, throttle = self._pool, self._turns, self.running, self._throttle
        watched, acks_early, submit, division = self.watched, self._acks_early, self._submit, self._division
        first = self._first
        full: list[deque[Request]] = []
        while turns and pool.free > 0:
            line = turns.popleft()
            if division is not None and not division.has_room(line[0].queue):
                full.append(line)
                continue
            request = line.popleft()
            if line is first and line:
                turns.appendleft(line)
            elif line:
                turns.append(line)
            number = request.number
            if watched and number in watched and not self._admitted(request):
                continue
            if throttle and not throttle.lets_pass(request, self._clock()):
                self._wake_for_held()
                continue
            if acks_early and number in acks_early:
                self._accepted(request)
            running[number] = request
            submit(request)
        if full:
            turns.extendleft(line for line in reversed(full) if line)

    def _admitted(self, request: Request) -> bool:
        return self._admit(request, self.watched.pop(request.number))

    def _fill_from_held(self) -> None:
        while self._pool.free > 0:
            request = self._throttle.next_ready(self._clock(), self.has_room)
            if request is None:
                break
            if self.watched and request.number in self.watched and not self._admitted(request):
                continue
            if request.number in self._acks_early:
                self._accepted(request)
            self.running[request.number] = request
            self._submit(request)
        self._wake_for_held()

    def _wake_for_held(self) -> None:
        # With no free slot the next outcome calls `run` anyway.
        if not self._timer.is_set and self._pool.free > 0:
            wait = self._throttle.wait(self._clock(), self.has_room)
            if wait is not None:
                self._timer.set(max(wait, 0.001), self.run)

    # -- batches

    def gather(self, request: Request, strategy: TaskStrategy) -> None:
        """Keep a call until its task's batch is due."""
        key = f"{request.queue}\0{request.task}"
        line = self._lines.get(key)
        if not isinstance(line, BatchLine):
            line = self._lines[key] = BatchLine(self._loop, self._batch_is_due, self._clock)
        line.gather(request, strategy)

    def _batch_is_due(self, line: BatchLine) -> None:
        self._turns.append(line)
        self._loop.call_soon(self.run)

    def _begin_batch(self, batch: Request) -> Calls:
        """The calls of a batch that may run. Without one it does not run."""
        calls = Calls(call for call in calls_of(batch) if call.number not in self.watched or self._admitted(call))
        batch.decoded = calls  # type: ignore[assignment] # see Request
        self._batch_of.update((call.number, batch.number) for call in calls)
        if not calls:
            del self.running[batch.number]
        return calls

    def end_batches(self, outcomes: Iterable[Outcome]) -> list[Outcome]:
        """The outcomes with those of calls in place of their batch's; the calls are in `running` now, and the batch is not."""
        flat: list[Outcome] = []
        for outcome in outcomes:
            batch = self.running.get(outcome.number)
            if batch is None or not is_batch(batch):
                flat.append(outcome)
                continue
            del self.running[outcome.number]
            # A process may say anything: it ends no others' calls, and leaves none of its own without an end.
            ends = {call.number: call for call in outcome.calls}
            for call in calls_of(batch):
                self._batch_of.pop(call.number, None)
                self.running[call.number] = call
                flat.append(ends.get(call.number) or requeued(call, "its batch ended without an outcome for it"))
        return flat

    def running_calls(self) -> list[Request]:
        """What runs, with the calls of batches in their place."""
        return [call for request in self.running.values() for call in calls_of(request)]

    def number_in_pool(self, request: Request) -> int:
        """The number under which the pool has it: that of its batch, if it is in one."""
        return self._batch_of.get(request.number, request.number)

    def take_batches(self, queue: str) -> list[Request]:
        """Remove and return the calls of a queue that were gathered."""
        taken: list[Request] = []
        for key, line in self._lines.items():
            if isinstance(line, BatchLine) and key.startswith(f"{queue}\0"):
                taken += line
                line.clear()
        self._turns = deque(line for line in self._turns if line)
        return taken

    # -- waiting requests

    @property
    def waiting(self) -> int:
        """How many requests could run if slots were free (requests held by a rate limit do not count)."""
        return sum(map(len, self._turns))

    @property
    def could_start(self) -> bool:
        """Whether a request waits here for which there is a slot."""
        return self._pool.free > 0 and any(self.has_room(line[0]) for line in self._turns)

    @property
    def needed(self) -> int:
        """How many slots (of the first pool) would let all run that are here and may."""
        waiting: Counter[str] = Counter()
        for line in self._turns:
            waiting[base_of(line[0].queue)] += line.batches if isinstance(line, BatchLine) else len(line)
        return len(self.running) + waiting.total() if self._division is None else self._division.needed(waiting)

    def __iter__(self) -> Iterator[Request]:
        """All waiting requests, also those held by a rate limit."""
        for line in {id(line): line for line in self._lines.values()}.values():
            yield from line
        yield from self._throttle
        yield from self.next_in_line

    def clear(self) -> list[Request]:
        """Remove and return all waiting requests (to be given back, or void)."""
        requests = list(self)
        self.next_in_line.take(lambda request: True)
        for line in self._lines.values():
            line.clear()
        self._turns.clear()
        self._throttle.clear()
        self.watched.clear()
        self._timer.cancel()
        return requests

    def take_line(self, queue: str, *, allowed: Callable[[Request], bool], limit: int) -> list[Request]:
        """Remove and return the last `allowed` requests of one queue's line (its window has closed), at most `limit`."""
        line = self._lines.get(queue)
        if not line:
            return []
        taken = [request for request in line if allowed(request)][-limit:]
        numbers = {request.number for request in taken}
        remaining = [request for request in line if request.number not in numbers]
        line.clear()
        line.extend(remaining)
        for request in taken:
            self.watched.pop(request.number, None)
        if not line:
            self._turns = deque(waiting_line for waiting_line in self._turns if waiting_line is not line)
        return taken

    def take_unbegun(self, allowed: Callable[[Request], bool], limit: int | None = None) -> list[Request]:
        """Take back `allowed` requests that the pool has not begun, the last ones; the others stay in the pool."""
        unbegun = self._pool.take_back()
        matching = [request.number for request in unbegun if allowed(calls_of(request)[0])]
        numbers = set(matching if limit is None else matching[-limit:])
        taken: list[Request] = []
        for request in unbegun:
            if request.number in numbers:
                del self.running[request.number]
                taken += calls_of(request)
                for call in calls_of(request):
                    self._batch_of.pop(call.number, None)
            else:
                self._pool.submit(request)
        return taken

    def stop(self) -> list[Request]:
        """End what runs, and return it."""
        self._pool.stop()
        unfinished = self.running_calls()
        self.running.clear()
        self._batch_of.clear()
        return unfinished


# -- Surplus: the deliveries of a queue that a worker held when its window closed, because the tasks have become long. Other
# workers may run them sooner.
#
# A window that short tasks have opened holds many deliveries. When long tasks come, the deliveries that wait here wait for as
# long as the present ones run, even while a slot of another worker idles. So they are requeued, in portions: the first one as
# large as the pool, each further one twice as large. An idle worker may still have a wide window and take all that is
# requeued, until it has run its first long tasks; so a requeue of everything at once would only move the surplus there. And a
# message must not be requeued often, because older brokers count each requeue as a failed delivery. While the worker still
# has deliveries from before the closing, its consumer gets only the rest of the window (prefetch.py).
#
# That consumer may get a requeued delivery again, and an idle worker may get more than it has slots for. So when all portions
# have gone, waiting requests are requeued a second time, and never a third.

# Seconds from the closing to the first portion, and between portions: other workers notice long tasks within half a second.
FIRST_SECONDS, PORTION_SECONDS = 0.2, 0.4


@dataclass(slots=True, eq=False)
class _Closed:
    """A queue whose window has closed: the number of the last request before that, the size of the next portion (0: all of them
    for the second time; None: no more), and when it is due."""

    last: int
    portion: int | None
    due: float


class Surplus:
    """Requeues the surplus, so that another worker may run it. `latest` is the number of the latest request."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        deliveries: Deliveries,
        work_queues: WorkQueues,
        division: Division,
        *,
        latest: Callable[[], int],
        clock: Callable[[], float],
    ) -> None:
        self._dispatcher = dispatcher
        self._deliveries = deliveries
        self._work_queues = work_queues
        self._division = division
        self._latest = latest
        self._clock = clock
        self._closed: dict[str, _Closed] = {}

    def closed(self, queue: str) -> None:
        """The queue's window has closed."""
        self._closed[queue] = _Closed(self._latest(), max(1, self._division.slots), self._clock() + FIRST_SECONDS)

    def opened(self, queue: str) -> None:
        """The tasks are short again, or the queue is not consumed any more."""
        self._closed.pop(queue, None)

    def old_deliveries(self, queue: str) -> int:
        """How many requests from before the closing are still here, waiting or running."""
        closed = self._closed.get(queue)
        if closed is None:
            return 0
        waiting, running = self._dispatcher, self._dispatcher.running_calls()
        count = sum(
            request.number <= closed.last and request.queue == queue
            for requests in (waiting, running)
            for request in requests
        )
        if not count:
            del self._closed[queue]
        return count

    def look(self, is_long: Callable[[str], bool]) -> None:
        """Requeue the portions that are due, of queues whose tasks are long now; called some times a second."""
        now = self._clock()
        for queue, closed in list(self._closed.items()):
            if not is_long(queue):
                self.opened(queue)
            elif closed.portion is not None and closed.due <= now:
                closed.due = now + PORTION_SECONDS
                closed.portion = self._next(queue, closed.last, closed.portion)

    def _next(self, queue: str, last: int, portion: int) -> int | None:
        """Requeue this portion; returns the size of the next one."""
        if not portion:
            self._give_back(queue, sys.maxsize, sys.maxsize, includes_redelivered=True)
            return None
        count = self._give_back(queue, last, portion, includes_redelivered=False)
        return 2 * portion if count == portion else 0

    def _give_back(self, queue: str, last: int, count: int, *, includes_redelivered: bool) -> int:
        """Requeue at most `count` waiting requests up to the number `last`, the last ones. Returns how many.

        Only first deliveries, or second ones: older brokers count the requeue as a failed delivery, and that must not
        dead-letter a message. No steps of a chain that has begun here."""
        self._deliveries.look_at_channel()
        limit = self._work_queues.delivery_limit(queue) or sys.maxsize
        acks_early = self._deliveries.acks_early

        def allowed(request: Request) -> bool:
            return (
                request.queue == queue
                and request.number <= last
                and (not request.redelivered or (includes_redelivered and request.attempts <= 1))
                and request.attempts + 1 < limit
                and self._deliveries.is_present(request)
                and request.first is None
            )

        # A request that is acked early is acked when it goes from the line to the pool.
        taken = self._dispatcher.take_line(queue, allowed=allowed, limit=count)
        if len(taken) < count:
            unanswered = self._dispatcher.take_unbegun(
                lambda request: allowed(request) and request.number not in acks_early, count - len(taken)
            )
            taken = unanswered + taken
        self._deliveries.give_back(taken)
        return len(taken)

"""The gate of a worker's slots: what a task asks for is asked of the store just before it runs, and given back when it has ended.

It stands in the slot, so nothing is held for a task that waits for one. What is refused goes back to the broker until its turn.

A question takes longer than a short task, so a slot that has the next call at hand asks for several runs at once where nobody
waits: what one of them had, the next one has, for a moment. So there are never more runs than places, and none is held by a slot
that has nothing to run. It is for threads that say when they have nothing (`rest`).
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import FlowStoreUnreachable, InvalidTaskError
from amqtask.flow.contract import CLOSED, HALF_OPEN, NO_TICKETS, OPEN, RUN, Bound, Entry, Verdict
from amqtask.flow.keys import TAKEN, TICKETS, UNIQUE
from amqtask.ground.printable import bounded_logger

if TYPE_CHECKING:
    from amqtask.flow.contract import Circuit, FlowStore
    from amqtask.flow.keys import FlowPlan
    from amqtask.ground.shapes import Headers

# Seconds that a task waits when the store does not answer; and between two warnings of that.
AWAY_SECONDS, WARN_EVERY = 5.0, 30.0
# A slot asks for so many runs at once, which begin within so many seconds. What a rate has let in is gone whether it runs or not,
# so of a rate it wastes no more than one in so many.
MOST_RUNS, HELD_SECONDS, PART_OF_RATE = 64, 0.01, 4
# In memory that slots share with the worker's main process: the last runs that have what another had, and the number of that.
_RUNS_SHARED, _SHARED = 65_536, struct.Struct("<qq")
_LARGEST = 2**63
logger = bounded_logger("amqtask.worker")


@dataclass(slots=True)
class _Held:
    """What a slot has for one run after the other: `left` of them may yet begin, until then. `number` is the first one's;
    `ended` is how many have ended, after so many seconds together."""

    entry: Entry
    number: int
    left: int
    until: float
    seconds: float = 0.0
    ended: int = 0


class _Slot(threading.local):
    """A thread that runs tasks. `streak`: so many runs in a row have had these bounds, less PART_OF_RATE for each that it had
    asked for in vain."""

    rests = False
    held: _Held | None = None
    bounds: tuple[Bound, ...] = ()
    streak = 0


class Gate:
    """Asks `store` for the tasks in `plans`. One per worker, made before its slots: they share its `name`, by which the store
    tells the runs of one worker from another's. `runs_on_error`: run without what cannot be asked for, when the store is away."""

    def __init__(
        self,
        plans: Mapping[str, FlowPlan],
        store: FlowStore,
        *,
        lease: float,
        runs_on_error: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plans = plans
        self.lease = lease
        self.name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._store = store
        self._runs_on_error = runs_on_error
        self._clock = clock
        self._warn_at = float("-inf")
        self._slot = _Slot()
        self._shared = mmap.mmap(-1, _RUNS_SHARED * _SHARED.size)
        # What was read there of those that run: the number of the run and of the one whose places it has.
        self._first: dict[int, int] = {}
        # The breakers that were not closed when they were last looked at, by their tasks' names.
        self.circuits: Mapping[str, Circuit] = {}

    def enter(
        self, task: str, task_id: str, number: int, headers: Headers, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Entry | None, Verdict]:
        """Whether it may run, and what it has then (None: nothing, because the store is away).

        Raises: what makes no key of the arguments."""
        plan = self.plans[task]
        lock = None
        if plan.unique is not None:
            if not task_id:
                raise InvalidTaskError(f"the message has no id, which a call of task {task}, that is unique, needs")
            callers_key = headers.get(UNIQUE)
            key = str(callers_key) if plan.is_key(callers_key) else plan.unique_key(args, kwargs)
            lock = plan.lock(key, is_taken=bool(headers.get(TAKEN)))
        tickets = _tickets(headers.get(TICKETS))
        entry = Entry(plan.scope, task_id, self.holder(number), lock, plan.bounds(args, kwargs), tickets, plan.guard)
        try:
            held = self._slot.held
            if held is not None and self._goes_on(held, entry, number):
                return held.entry, RUN
            return entry, self._ask(task, entry, number)
        except FlowStoreUnreachable as error:
            if self._runs_on_error:
                self._warn("tasks run without their limits", error)
                return None, RUN
            self._warn("its tasks wait", error)
            return None, Verdict(AWAY_SECONDS, "the store of limits does not answer", tickets=tickets)

    def _ask(self, task: str, entry: Entry, number: int) -> Verdict:
        """Raises: FlowStoreUnreachable."""
        slot, most = self._slot, 1
        self.let_go()
        if slot.rests and entry.lock is None and entry.guard is None and not entry.tickets:
            if slot.bounds != entry.bounds:
                slot.bounds, slot.streak = entry.bounds, 0
            has_rate = any(not bound.places for bound in entry.bounds)
            most = min(MOST_RUNS, 1 + slot.streak // PART_OF_RATE) if has_rate else MOST_RUNS
        verdict = self._store.enter(entry, self.lease, most)
        if verdict.runs > 1:
            slot.held = _Held(entry, number, verdict.runs - 1, self._clock() + HELD_SECONDS)
        slot.streak += 1
        self._tell(task, verdict.changed)
        return verdict

    def _goes_on(self, held: _Held, entry: Entry, number: int) -> bool:
        """Whether it runs with what the run before it in this slot had."""
        is_same = held.entry.bounds == entry.bounds and not entry.tickets
        if (
            not is_same
            or not held.left
            or self._clock() >= held.until
            or max(abs(number), abs(held.number)) >= _LARGEST
        ):
            return False
        _SHARED.pack_into(self._shared, number % _RUNS_SHARED * _SHARED.size, number, held.number)
        held.left -= 1
        self._slot.streak += 1
        return True

    def rest(self) -> None:
        """The calling thread has nothing to run now. Who calls this once calls it before each time that he waits."""
        self._slot.rests = True
        self.let_go()

    def let_go(self) -> None:
        """Give back what the calling thread has kept from its last run."""
        slot = self._slot
        held = slot.held
        if held is not None:
            slot.held = None
            slot.streak = max(0, slot.streak - PART_OF_RATE * held.left)
            self._give_back("", held.entry, held.seconds / max(1, held.ended), "free", "", max(1, held.ended))

    def leave(self, task: str, entry: Entry, seconds: float, lock: str, ended: str) -> None:
        """The run has ended; see FlowStore.leave. Places that cannot be given back end with their lease."""
        held = self._slot.held
        if held is not None and held.entry is entry:
            held.seconds += seconds
            held.ended += 1
        else:
            self._give_back(task, entry, seconds, lock, ended, 1)

    def _give_back(self, task: str, entry: Entry, seconds: float, lock: str, ended: str, runs: int) -> None:
        try:
            self._tell(task, self._store.leave(entry, seconds, lock, ended, runs))
        except FlowStoreUnreachable as error:
            self._warn("places are free when their lease ends", error)

    def ended_without_run(self, task: str, task_id: str, headers: Headers) -> None:
        """A call came to its end, and no slot ran it: its key is free."""
        key = headers.get(UNIQUE)
        plan = self.plans.get(task)
        if plan is None or plan.unique is None or plan.unique.until == "ttl" or not plan.is_key(key):
            return
        try:
            self._store.free(str(key), task_id)
        except FlowStoreUnreachable as error:
            self._warn("keys of calls that did not run are free when their ttl is over", error)

    def note(self, running: Iterable[int]) -> None:
        """The runs with these numbers go on. To be called each second: whose place they have is known as long as that."""
        before, self._first = self._first, {}
        for number in running:
            run, first = _SHARED.unpack_from(self._shared, number % _RUNS_SHARED * _SHARED.size)
            if run == number:
                self._first[number] = first
            elif number in before:
                self._first[number] = before[number]

    def renew(self, running: Mapping[str, Sequence[int]]) -> None:
        """The runs of these tasks go on (the name of the task → their numbers)."""
        first = self._first
        try:
            for task, numbers in running.items():
                holders = [self.holder(first.get(number, number)) for number in numbers]
                self._store.renew(self.plans[task].scope, holders, self.lease)
        except FlowStoreUnreachable as error:
            self._warn("the leases of running tasks are not renewed", error)

    def look(self) -> None:
        """Ask the store about the breakers."""
        keys = {plan.guard.key: task for task, plan in self.plans.items() if plan.guard is not None}
        if keys:
            try:
                found = self._store.circuits(list(keys))
            except FlowStoreUnreachable as error:
                self._warn("the states of breakers are not known", error)
            else:
                self.circuits = {keys[key]: circuit for key, circuit in found.items()}

    def breaker_states(self) -> dict[str, str]:
        """The state of each task's breaker, by its name, as they were last looked at."""
        guarded = [task for task, plan in self.plans.items() if plan.guard is not None]
        return {task: self.circuits[task].state if task in self.circuits else CLOSED for task in guarded}

    def _tell(self, task: str, changed: str) -> None:
        guard = self.plans[task].guard if changed else None
        if guard is None:
            return
        if changed == OPEN:
            reason = f"runs failed ({guard.failures} in {guard.seconds:g} s, or the one that tried): calls wait {guard.pause:g} s"
        else:
            reason = "one call tries" if changed == HALF_OPEN else "the call that tried has succeeded"
        logger.warning("the breaker of task %s is %s: %s", task, changed, reason)

    def holder(self, number: int) -> str:
        """The name of one run."""
        return f"{self.name} {number}"

    def close(self) -> None:
        """Close connections to the store."""
        self._store.close()

    def _warn(self, consequence: str, error: FlowStoreUnreachable) -> None:
        now = self._clock()
        if now >= self._warn_at:
            self._warn_at = now + WARN_EVERY
            logger.warning("%s; %s", error, consequence)


def _tickets(header: object) -> Mapping[str, int]:
    """The tickets in a message's header; none where somebody else wrote it."""
    if header is None or not isinstance(header, Mapping) or not all(type(ticket) is int for ticket in header.values()):
        return NO_TICKETS
    return dict(header)

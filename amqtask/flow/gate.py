"""The gate of a worker's slots: what a task asks for is asked of the store just before it runs, and given back when it has ended.

It stands in the slot, so nothing is held for a task that waits for one. What is refused goes back to the broker until its turn.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import FlowStoreUnreachable
from amqtask.flow.contract import CLOSED, HALF_OPEN, NO_TICKETS, OPEN, RUN, Entry, Verdict
from amqtask.flow.keys import TAKEN, TICKETS, UNIQUE
from amqtask.ground.printable import bounded_logger

if TYPE_CHECKING:
    from amqtask.flow.contract import Circuit, FlowStore
    from amqtask.flow.keys import FlowPlan
    from amqtask.ground.shapes import Headers

# Seconds that a task waits when the store does not answer; and between two warnings of that.
AWAY_SECONDS, WARN_EVERY = 5.0, 30.0
logger = bounded_logger("amqtask.worker")


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
            callers_key = headers.get(UNIQUE)
            key = str(callers_key) if plan.is_key(callers_key) else plan.unique_key(args, kwargs)
            lock = plan.lock(key, is_taken=bool(headers.get(TAKEN)))
        entry = Entry(
            plan.scope,
            task_id,
            self.holder(task_id, number),
            lock,
            plan.bounds(args, kwargs),
            _tickets(headers.get(TICKETS)),
            plan.guard,
        )
        try:
            verdict = self._store.enter(entry, self.lease)
            self._tell(task, verdict.changed)
            return entry, verdict
        except FlowStoreUnreachable as error:
            if self._runs_on_error:
                self._warn("tasks run without their limits", error)
                return None, RUN
            self._warn("its tasks wait", error)
            return None, Verdict(AWAY_SECONDS, "the store of limits does not answer")

    def leave(self, task: str, entry: Entry, seconds: float, lock: str, ended: str) -> None:
        """The run has ended; see FlowStore.leave. Places that cannot be given back end with their lease."""
        try:
            self._tell(task, self._store.leave(entry, seconds, lock, ended))
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

    def renew(self, running: Mapping[str, Sequence[str]]) -> None:
        """The runs of these tasks go on (the name of the task → holders)."""
        try:
            for task, holders in running.items():
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
        guard = self.plans[task].guard
        if not changed or guard is None:
            return
        if changed == OPEN:
            reason = f"runs failed ({guard.failures} in {guard.seconds:g} s, or the one that tried): calls wait {guard.pause:g} s"
        else:
            reason = "one call tries" if changed == HALF_OPEN else "the call that tried has succeeded"
        logger.warning("the breaker of task %s is %s: %s", task, changed, reason)

    def holder(self, task_id: str, number: int) -> str:
        """The name of one run."""
        return f"{task_id} {self.name} {number}"

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

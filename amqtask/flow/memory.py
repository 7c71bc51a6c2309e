"""Locks and places in this process, for `memory://`: tests, and programs of one process."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from amqtask.flow import contract as rules
from amqtask.flow.contract import Circuit, KeyUse, Verdict

if TYPE_CHECKING:
    from amqtask.flow.contract import Bound, Entry, Guard, Lock, Override


@dataclass(slots=True)
class Held:
    """A lock: the call that has it, and when it ends."""

    owner: str
    ends: float
    is_running: bool = False


@dataclass(slots=True)
class Line:
    """One limit: who has a place and until when, or when its next run may begin (a rate); how long a run takes and when the last
    one began; the last ticket that was given out, the last one that was let in, and when the next of those asks who are next."""

    label: str = ""
    text: str = ""
    holders: dict[str, float] = field(default_factory=dict)
    next: float = 0.0
    mean: float | None = None
    began: float = 0.0
    issued: int = 0
    served: int = 0
    front: float = 0.0


@dataclass(slots=True)
class Run:
    """What a run holds until its lease ends: places in lines (by key), and a lock with the seconds for which that is kept."""

    holder: str
    ends: float
    lines: list[str]
    lock: str = ""
    ttl: float = 0.0


@dataclass(slots=True)
class Switch:
    """A breaker: when runs failed while it was closed; since it opened, until when nobody tries, who tries and until when its
    lease is, and how many were refused."""

    state: str = rules.CLOSED
    failures: list[float] = field(default_factory=list)
    until: float = 0.0
    tries: str = ""
    leased: float = 0.0
    refused: int = 0

    def open(self, until: float) -> str:
        """Let nobody in until then."""
        self.failures.clear()
        self.state, self.until, self.tries, self.refused = rules.OPEN, until, "", 0
        return rules.OPEN


@dataclass(slots=True)
class State:
    """All of it, by key; of runs by holder, and of what operators have set by scope and label."""

    locks: dict[str, Held] = field(default_factory=dict)
    lines: defaultdict[str, Line] = field(default_factory=lambda: defaultdict(Line))
    runs: dict[str, Run] = field(default_factory=dict)
    limits: dict[tuple[str, str], Override] = field(default_factory=dict)
    switches: dict[str, Switch] = field(default_factory=dict)


class MemoryStore:
    """See amqtask.flow.contract.FlowStore. `clock` is in seconds."""

    name = "this process"

    def __init__(self, clock: Callable[[], float] = time.monotonic, state: State | None = None) -> None:
        self._clock = clock
        self._mutex = threading.Lock()
        self.state = State() if state is None else state

    def take(self, key: str, task_id: str, seconds: float, *, replaces: bool = False) -> str | None:
        """See FlowStore."""
        with self._mutex:
            lock, now = self._lock(key), self._clock()
            if lock is not None and lock.owner != task_id and not (replaces and not lock.is_running):
                return lock.owner
            self.state.locks[key] = Held(task_id, now + seconds)
            return None

    def confirm(self, key: str, task_id: str, seconds: float) -> None:
        """See FlowStore."""
        with self._mutex:
            lock = self._lock(key)
            if lock is not None and lock.owner == task_id:
                lock.ends = max(lock.ends, self._clock() + seconds)

    def free(self, key: str, task_id: str) -> None:
        """See FlowStore."""
        with self._mutex:
            self._free(key, task_id)

    def enter(self, entry: Entry, lease: float, most: int = 1) -> Verdict:
        """See FlowStore."""
        with self._mutex:
            now = self._clock()
            if entry.lock is not None and (other := self._other(entry.lock, entry.task_id)):
                return Verdict(other=other)
            if entry.guard is not None and (wait := self._pause(entry.guard, entry.holder, now)):
                if entry.lock is not None:
                    self._keep(entry.lock, entry.task_id, now, is_running=False)
                return Verdict(wait, rules.BREAKER_IS_OPEN, tickets=entry.tickets)
            bounds = [bound.under(self.state.limits.get((entry.scope, bound.label))) for bound in entry.bounds]
            refused = {
                bound.label: self._ticket(bound, now, entry)
                for bound in bounds
                if not self._has_room(bound, now, entry)
            }
            if refused:
                if entry.lock is not None:
                    self._keep(entry.lock, entry.task_id, now, is_running=False)
                tickets = {label: ticket for label, (ticket, _) in refused.items()}
                seconds, label = max((seconds, label) for label, (_, seconds) in refused.items())
                return Verdict(seconds, label, tickets={**entry.tickets, **tickets})
            runs = min((self._runs(bound, now, most) for bound in bounds), default=1)
            for bound in bounds:
                self._let_in(bound, now, entry, now + lease, runs)
            lines = [bound.key for bound in bounds if bound.places]
            run = self.state.runs[entry.holder] = Run(entry.holder, now + lease, lines)
            if entry.lock is not None:
                self._begin(entry.lock, entry, now, run)
            return Verdict(changed=self._try(entry.guard, entry.holder, now + lease), runs=runs)

    def leave(self, entry: Entry, seconds: float, lock: str, ended: str = "", runs: int = 1) -> str:
        """See FlowStore."""
        with self._mutex:
            self._give_back(entry, seconds, lock, runs)
            return self._settle(entry.guard, entry.holder, ended) if entry.guard is not None else ""

    def circuits(self, keys: Sequence[str]) -> dict[str, Circuit]:
        """See FlowStore."""
        with self._mutex:
            now, switches = self._clock(), self.state.switches
            found = {key: switches[key] for key in keys if key in switches}
            return {
                key: Circuit(switch.state, max(0.0, switch.until - now))
                for key, switch in found.items()
                if switch.state != rules.CLOSED
            }

    def _give_back(self, entry: Entry, seconds: float, lock: str, runs: int) -> None:
        for bound in entry.bounds:
            line = self._line(bound)
            if line.holders.pop(entry.holder, None) is not None:
                mean = seconds if line.mean is None else line.mean
                line.mean = mean + (seconds - mean) * min(1.0, runs / rules.NOTED_RUNS)
        self.state.runs.pop(entry.holder, None)
        if entry.lock is None or entry.lock.until in ("started", "ttl"):
            return
        if lock == "free":
            self._free(entry.lock.key, entry.task_id)
        else:
            self._keep(entry.lock, entry.task_id, self._clock(), is_running=False)

    def renew(self, scope: str, holders: Sequence[str], lease: float) -> None:
        """See FlowStore."""
        with self._mutex:
            now = self._clock()
            for holder in holders:
                run = self.state.runs.get(holder)
                if run is None:
                    continue
                run.ends = now + lease
                for key in run.lines:
                    if holder in (places := self.state.lines[key].holders):
                        places[holder] = run.ends
                if run.lock and (lock := self._lock(run.lock)) is not None:
                    lock.ends = max(lock.ends, now + run.ttl)
            for switch in self.state.switches.values():
                if switch.tries in holders:
                    switch.leased = now + lease

    def set_limit(self, scope: str, label: str, override: Override | None) -> bool:
        """See FlowStore."""
        with self._mutex:
            before = self.state.limits.pop((scope, label), None)
            if override is not None:
                self.state.limits[scope, label] = override
            return before is not None

    def look(self, scope: str, labels: Sequence[str]) -> tuple[Mapping[str, Override], Mapping[str, Sequence[KeyUse]]]:
        """See FlowStore."""
        with self._mutex:
            now = self._clock()
            overrides = {label: one for (of, label), one in self.state.limits.items() if of == scope}
            uses: dict[str, list[KeyUse]] = {label: [] for label in labels}
            for key, line in self.state.lines.items():
                if key.startswith(f"{scope}:") and line.label in uses:
                    running = sum(ends > now for ends in line.holders.values())
                    uses[line.label].append(KeyUse(line.text, running, line.issued - line.served))
            return overrides, uses

    def close(self) -> None:
        """Nothing is open."""

    # -- locks

    def _lock(self, key: str) -> Held | None:
        lock = self.state.locks.get(key)
        if lock is not None and lock.ends <= self._clock():
            del self.state.locks[key]
            return None
        return lock

    def _other(self, lock: Lock, task_id: str) -> str:
        """The id of another call that has the key, "" if none stands in the way."""
        present = self._lock(lock.key)
        if present is None or present.owner == task_id or lock.until == "started":
            return ""
        return "" if lock.until == "ttl" and lock.is_taken else present.owner

    def _keep(self, lock: Lock, task_id: str, now: float, *, is_running: bool) -> None:
        present = self._lock(lock.key)
        if present is None or (present.owner == task_id and lock.until != "ttl"):
            self.state.locks[lock.key] = Held(task_id, now + lock.ttl, is_running=is_running)

    def _begin(self, lock: Lock, entry: Entry, now: float, run: Run) -> None:
        if lock.until == "started":
            self._free(lock.key, entry.task_id)
            return
        self._keep(lock, entry.task_id, now, is_running=True)
        if lock.until != "ttl":
            run.lock, run.ttl = lock.key, lock.ttl

    def _free(self, key: str, task_id: str) -> None:
        lock = self._lock(key)
        if lock is not None and lock.owner == task_id:
            del self.state.locks[key]

    # -- breakers

    def _pause(self, guard: Guard, holder: str, now: float) -> float:
        """In how many seconds a run may ask again; 0: its breaker lets it in."""
        switch = self.state.switches.get(guard.key)
        if switch is None or switch.state == rules.CLOSED:
            return 0.0
        is_tried = switch.tries not in ("", holder) and switch.leased > now
        if switch.until <= now and not is_tried:
            return 0.0
        later = min(switch.refused * rules.RAMP, random.random() * guard.pause)
        switch.refused += 1
        if is_tried:
            later = max(later, min(guard.pause, rules.TRYING))
        return max(rules.SHORTEST, max(switch.until - now, 0.0) + later)

    def _try(self, guard: Guard | None, holder: str, leased: float) -> str:
        """A run was let in; whether it is the one that tries."""
        switch = self.state.switches.get(guard.key) if guard is not None else None
        if switch is None or switch.state == rules.CLOSED:
            return ""
        switch.state, switch.tries, switch.leased = rules.HALF_OPEN, holder, leased
        return rules.HALF_OPEN

    def _settle(self, guard: Guard, holder: str, ended: str) -> str:
        now, switch = self._clock(), self.state.switches.get(guard.key)
        if switch is None:
            if ended != "failure":
                return ""
            switch = self.state.switches[guard.key] = Switch()
        if switch.state == rules.CLOSED:
            if ended != "failure":
                return ""
            switch.failures = [*switch.failures, now][-guard.failures :]
            is_enough = len(switch.failures) == guard.failures and switch.failures[0] > now - guard.seconds
            return switch.open(now + guard.pause) if is_enough else ""
        if switch.tries != holder:
            return ""  # it began before
        if ended == "success":
            del self.state.switches[guard.key]
            return rules.CLOSED
        if ended == "failure":
            return switch.open(now + guard.pause)
        switch.tries = ""
        return ""

    # -- places and turns

    def _line(self, bound: Bound) -> Line:
        line = self.state.lines[bound.key]
        line.label, line.text = bound.label, bound.text
        return line

    def _has_room(self, bound: Bound, now: float, entry: Entry) -> bool:
        line = self._line(bound)
        ticket = entry.tickets.get(bound.label)
        if ticket is None:
            if (line.issued - line.served) * self._pace(bound, line, now) > rules.PATIENCE:
                return False
        elif line.front > now and ticket - line.served > bound.places + 1:
            return False  # one who is before it asks in a moment
        if not bound.places:
            return self._first(bound, line, now) <= now + 1e-6
        if len(line.holders) >= bound.places:
            line.holders = {holder: ends for holder, ends in line.holders.items() if ends > now}
        return len(line.holders) < bound.places or entry.holder in line.holders

    def _runs(self, bound: Bound, now: float, most: int) -> int:
        """How many of `most` runs may begin now."""
        line = self._line(bound)
        if most == 1 or line.issued > line.served:
            return 1
        if bound.places:
            return most
        return max(1, min(most, int((now - self._first(bound, line, now)) / bound.interval * rules.SPARE) + 1))

    def _let_in(self, bound: Bound, now: float, entry: Entry, lease_ends: float, runs: int) -> None:
        line = self._line(bound)
        if bound.places:
            line.holders[entry.holder] = lease_ends
        else:
            line.next = self._taken(bound, line, now) + runs * bound.interval
        line.began = now
        line.served = min(line.issued, max(line.served, entry.tickets.get(bound.label, 0)))

    def _ticket(self, bound: Bound, now: float, entry: Entry) -> tuple[int, float]:
        """Its ticket, and in how many seconds it may ask again."""
        line = self._line(bound)
        ticket = entry.tickets.get(bound.label)
        if ticket is None:
            ticket = line.issued = line.issued + 1
        pace, ahead = self._pace(bound, line, now), min(ticket, line.issued) - line.served
        first = now if bound.places else self._first(bound, line, now)
        if not bound.places and ahead > 1:
            at = first + (ahead - 1) * pace
        elif not bound.places and first - now < pace / 2:
            # The one before it began late: it keeps its turn, and asks again just when that comes.
            return ticket, max(rules.LEAST_WAIT, first - now)
        elif ahead > bound.places + 1:
            at = first + ahead * pace * rules.PACE
        else:
            step = pace
            if bound.places:
                step = min(
                    pace * rules.SOONER, max(rules.LEAST_STEP, min(pace * bound.places * rules.SHARE, rules.MOST_STEP))
                )
            at = line.front = max(min(line.front, now + rules.LONGEST) + step, first)
        return ticket, min(max(rules.SHORTEST, at - now), rules.LONGEST)

    def _pace(self, bound: Bound, line: Line, now: float) -> float:
        """Seconds between two runs that begin, as far as is known."""
        if not bound.places:
            return bound.interval
        run = rules.UNKNOWN if line.mean is None else line.mean
        if len(line.holders) >= bound.places:
            taken = min(now - line.began, rules.LONGEST)
            run = max(run, taken if line.mean is None else taken * rules.DOUBT)
        return run / bound.places

    def _first(self, bound: Bound, line: Line, now: float) -> float:
        """When the next run of a rate may begin."""
        return self._taken(bound, line, now) - (bound.burst - 1) * bound.interval

    def _taken(self, bound: Bound, line: Line, now: float) -> float:
        """Until when the runs that have begun take up a rate: a burst of them at most, though they began under a slower one."""
        line.next = min(line.next, now + bound.burst * bound.interval)
        return max(line.next, now)

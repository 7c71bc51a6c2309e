"""Locks and places in this process, for `memory://`: tests, and programs of one process."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from amqtask.flow.contract import (
    DOUBT,
    LEAST_STEP,
    LONGEST,
    MOST_STEP,
    NOTED_RUNS,
    PACE,
    PATIENCE,
    RUN,
    SHARE,
    SHORTEST,
    UNKNOWN,
    Verdict,
)

if TYPE_CHECKING:
    from amqtask.flow.contract import Bound, Entry, Lock


class _Lock:
    __slots__ = ("ends", "is_running", "owner")

    def __init__(self, owner: str, ends: float, *, is_running: bool = False) -> None:
        self.owner = owner
        self.ends = ends
        self.is_running = is_running


class _Line:
    """One limit: who has a place, or when its next run may begin (a rate); how long a run takes and when the last one began; the
    last ticket that was given out, the last one that was let in, and when the next of those asks who are next."""

    def __init__(self) -> None:
        self.holders: set[str] = set()
        self.next = 0.0
        self.mean: float | None = None
        self.began = 0.0
        self.issued = self.served = 0
        self.front = 0.0


class MemoryStore:
    """See amqtask.flow.contract.FlowStore. `clock` is in seconds."""

    name = "this process"

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._mutex = threading.Lock()
        self._locks: dict[str, _Lock] = {}
        self._lines: defaultdict[str, _Line] = defaultdict(_Line)
        # When the lease of a run ends, by its holder; which lock it has, and for how long it is kept.
        self._leases: dict[str, float] = {}
        self._locked: dict[str, tuple[str, float]] = {}

    def take(self, key: str, task_id: str, seconds: float, *, replaces: bool = False) -> str | None:
        """See FlowStore."""
        with self._mutex:
            lock, now = self._lock(key), self._clock()
            if lock is not None and lock.owner != task_id and not (replaces and not lock.is_running):
                return lock.owner
            self._locks[key] = _Lock(task_id, now + seconds)
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

    def enter(self, entry: Entry, lease: float) -> Verdict:
        """See FlowStore."""
        with self._mutex:
            now = self._clock()
            if entry.lock is not None and (other := self._other(entry.lock, entry.task_id)):
                return Verdict(other=other)
            refused = {
                bound.label: self._ticket(bound, now, entry)
                for bound in entry.bounds
                if not self._has_room(bound, now, entry)
            }
            if refused:
                if entry.lock is not None:
                    self._keep(entry.lock, entry.task_id, now, is_running=False)
                tickets = {label: ticket for label, (ticket, _) in refused.items()}
                seconds, label = max((seconds, label) for label, (_, seconds) in refused.items())
                return Verdict(seconds, label, tickets={**entry.tickets, **tickets})
            for bound in entry.bounds:
                self._let_in(bound, now, entry)
            self._leases[entry.holder] = now + lease
            if entry.lock is not None:
                self._begin(entry.lock, entry, now)
            return RUN

    def leave(self, entry: Entry, seconds: float, lock: str) -> None:
        """See FlowStore."""
        with self._mutex:
            for bound in entry.bounds:
                line = self._lines[bound.key]
                if entry.holder in line.holders:
                    line.holders.discard(entry.holder)
                    line.mean = seconds if line.mean is None else line.mean + (seconds - line.mean) / NOTED_RUNS
            self._leases.pop(entry.holder, None)
            self._locked.pop(entry.holder, None)
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
                if holder in self._leases:
                    self._leases[holder] = now + lease
                key, seconds = self._locked.get(holder, ("", 0.0))
                if key and (lock := self._lock(key)) is not None:
                    lock.ends = max(lock.ends, now + seconds)

    def close(self) -> None:
        """Nothing is open."""

    # -- locks

    def _lock(self, key: str) -> _Lock | None:
        lock = self._locks.get(key)
        if lock is not None and lock.ends <= self._clock():
            del self._locks[key]
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
            self._locks[lock.key] = _Lock(task_id, now + lock.ttl, is_running=is_running)

    def _begin(self, lock: Lock, entry: Entry, now: float) -> None:
        if lock.until == "started":
            self._free(lock.key, entry.task_id)
            return
        self._keep(lock, entry.task_id, now, is_running=True)
        if lock.until != "ttl":
            self._locked[entry.holder] = lock.key, lock.ttl

    def _free(self, key: str, task_id: str) -> None:
        lock = self._lock(key)
        if lock is not None and lock.owner == task_id:
            del self._locks[key]

    # -- places and turns

    def _has_room(self, bound: Bound, now: float, entry: Entry) -> bool:
        line = self._lines[bound.key]
        ticket = entry.tickets.get(bound.label)
        if ticket is None:
            if (line.issued - line.served) * self._pace(bound, line, now) > PATIENCE:
                return False
        elif line.front > now and ticket - line.served > bound.places + 1:
            return False  # one who is before it asks in a moment
        if not bound.places:
            return self._first(bound, line, now) <= now + 1e-6
        if len(line.holders) >= bound.places:
            line.holders = {holder for holder in line.holders if self._leases.get(holder, 0.0) > now}
        return len(line.holders) < bound.places or entry.holder in line.holders

    def _let_in(self, bound: Bound, now: float, entry: Entry) -> None:
        line = self._lines[bound.key]
        if bound.places:
            line.holders.add(entry.holder)
        else:
            line.next = max(line.next, now) + bound.interval
        line.began = now
        line.served = min(line.issued, max(line.served, entry.tickets.get(bound.label, 0)))

    def _ticket(self, bound: Bound, now: float, entry: Entry) -> tuple[int, float]:
        """Its ticket, and in how many seconds it may ask again."""
        line = self._lines[bound.key]
        ticket = entry.tickets.get(bound.label)
        if ticket is None:
            ticket = line.issued = line.issued + 1
        pace, ahead = self._pace(bound, line, now), min(ticket, line.issued) - line.served
        first = now if bound.places else self._first(bound, line, now)
        if ahead > bound.places + 1:
            at = first + ahead * pace * PACE
        else:
            step = pace
            if bound.places:
                step = max(LEAST_STEP, min(pace, pace * bound.places * SHARE, MOST_STEP))
            at = line.front = max(min(line.front, now + LONGEST) + step, first)
        return ticket, min(max(SHORTEST, at - now), LONGEST)

    def _pace(self, bound: Bound, line: _Line, now: float) -> float:
        """Seconds between two runs that begin, as far as is known: while all places are taken, a run lasts at least since the
        last one began."""
        if not bound.places:
            return bound.interval
        run = UNKNOWN if line.mean is None else line.mean
        if len(line.holders) >= bound.places:
            longest = LONGEST if line.mean is None else line.mean * DOUBT
            run = max(run, min(now - line.began, longest))
        return run / bound.places

    def _first(self, bound: Bound, line: _Line, now: float) -> float:
        """When the next run of a rate may begin."""
        return max(line.next, now) - (bound.burst - 1) * bound.interval

"""What slots and callers ask a store of locks and places; each question is one step in it.

A **lock** belongs to a call (its id), not to a run: retries and redeliveries keep it. A **place** belongs to one run (its holder)
and ends with its lease, unless it is given back before or renewed. A run that is refused gets a ticket, which its message
carries. From the tickets that are before it, and the pace at which places become free, the store works out when it may ask
again; each time it asks it knows better. So what waits is asked about a few times, however many wait, and comes in roughly in its
order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

# Those with tickets before them come back when a rate lets them in; of a concurrency at this part of the time that is left by the
# measured pace, so that somebody is there whenever a place becomes free. The next ones ask again after this share of a run, one
# after the other, within these bounds (seconds), and in any case sooner than places become free: at this part of that.
PACE, SHARE, LEAST_STEP, MOST_STEP, SOONER = 0.8, 0.06, 0.005, 5.0, 0.6
# Seconds: the shortest wait, and that of one whose turn at a rate has all but come; the longest; how long a backlog may be that a
# new call still tries to overtake; what is assumed of runs of which none has ended yet.
SHORTEST, LEAST_WAIT, LONGEST, PATIENCE, UNKNOWN = 0.02, 0.001, 600.0, 1.0, 0.02
# The last runs from which their length is known; and while all places are taken, which part of the time since the last run began
# is taken for a run's length: those who wait ask ever more rarely while runs do not end.
NOTED_RUNS, DOUBT = 32, 0.1
# One question for several runs gets, beside the first, this part of what a rate would let begin now.
SPARE = 1 / 8
# Seconds for which a pace and tickets are remembered; and how many keys of a limit a look counts, those that were used last.
REMEMBERED, MOST_KEYS = 86_400, 1000


NO_TICKETS: Mapping[str, int] = MappingProxyType({})


class Lock(NamedTuple):
    """A unique task's key. `is_taken`: its caller has taken it when it was published. `ttl`: seconds."""

    key: str
    ttl: float
    until: str
    is_taken: bool = False


class Override(NamedTuple):
    """The numbers of a limit that an operator has set (`value` is what was written): by whom, and when (Unix time)."""

    value: str
    by: str
    at: float
    places: int = 0
    interval: float = 0.0
    burst: int = 1


class Bound(NamedTuple):
    """One limit for one call. `places` is 0 for a rate, `interval` (seconds) 0 for a concurrency. `text` says which key it is."""

    key: str
    label: str
    places: int = 0
    interval: float = 0.0
    burst: int = 1
    text: str = ""

    def under(self, override: Override | None) -> Bound:
        """The same with an operator's numbers."""
        if override is None:
            return self
        if self.places:
            return self._replace(places=override.places)
        return self._replace(interval=override.interval, burst=override.burst)


class KeyUse(NamedTuple):
    """One key of a limit, in words: how many runs of it there are, and about how many wait (their tickets)."""

    key: str
    running: int
    waiting: int


class Guard(NamedTuple):
    """A task's breaker; times are seconds."""

    key: str
    failures: int
    seconds: float
    pause: float


class Entry(NamedTuple):
    """A run that wants to begin. `scope` names what its keys have in common; `tickets` are those that it got before, by label."""

    scope: str
    task_id: str
    holder: str
    lock: Lock | None
    bounds: tuple[Bound, ...]
    tickets: Mapping[str, int] = NO_TICKETS
    guard: Guard | None = None


class Verdict(NamedTuple):
    """It may run; or ask again in `seconds` with these tickets, because of `reason`; or `other`, a call's id, has its key.

    `changed` is what its breaker has become by this question: HALF_OPEN, where this run is the one that tries. `runs`: so many
    may begin with what it has, one after the other."""

    seconds: float = 0.0
    reason: str = ""
    other: str = ""
    tickets: Mapping[str, int] = NO_TICKETS
    changed: str = ""
    runs: int = 1


RUN = Verdict()
# States of a breaker. Closed: calls run. Half-open: one call tries.
CLOSED, OPEN, HALF_OPEN = "closed", "open", "half-open"
# Why a call waits for that.
BREAKER_IS_OPEN = "its breaker is open"
# Calls that wait for a breaker come back one after the other, by these seconds; a long backlog at random, within another pause.
RAMP = 0.02
# They ask no sooner than so many seconds while another call tries.
TRYING = 1.0


class Circuit(NamedTuple):
    """A breaker that is not closed: its state, and the seconds until a call may try."""

    state: str
    seconds: float


class FlowStore(Protocol):
    """Where locks and places are. All methods block, and raise FlowStoreUnreachable when it does not answer."""

    name: str  # for logs and errors, without user and password

    def take(self, key: str, task_id: str, seconds: float, *, replaces: bool = False) -> str | None:
        """Take a lock for a call that is about to be published; the id that has it, if another one has. `replaces`: take it from
        a call that waits, too."""

    def confirm(self, key: str, task_id: str, seconds: float) -> None:
        """The call is published: keep its lock for so long."""

    def free(self, key: str, task_id: str) -> None:
        """The call has ended, or was not published: give its lock back."""

    def enter(self, entry: Entry, lease: float, most: int = 1) -> Verdict:
        """All that a run needs, or nothing. `most`: what it gets may be for so many, which the caller lets begin within moments;
        only for one without lock, breaker and tickets. Where somebody waits it is for this one."""

    def leave(self, entry: Entry, seconds: float, lock: str, ended: str = "", runs: int = 1) -> str:
        """The run has ended after so many seconds (so many of them, each after that on average). `lock`: "free" it, "wait" (the
        call comes again) or "keep" it for its ttl.
        `ended`, for its breaker: "success", "failure", or "". Returns what the breaker has become by it ("": as it was)."""

    def circuits(self, keys: Sequence[str]) -> dict[str, Circuit]:
        """Of breakers with these keys, those that are not closed."""

    def renew(self, scope: str, holders: Sequence[str], lease: float) -> None:
        """These runs go on."""

    def set_limit(self, scope: str, label: str, override: Override | None) -> bool:
        """From now on a limit has these numbers, or (None) those of its task. Whether others had been set."""

    def look(self, scope: str, labels: Sequence[str]) -> tuple[Mapping[str, Override], Mapping[str, Sequence[KeyUse]]]:
        """What was set, by label, and how far the limits with these labels are used."""

    def close(self) -> None:
        """Close connections; they open again when they are used again."""

"""What the cluster suite counts: from the lines of producers and workers to one row of its table."""

from __future__ import annotations

from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from integration.apps.clustered import QUEUE, RARE
from integration.probing import Stretch

# Seconds. A publisher has 5 until its deadline, and one more on a machine that is this busy.
DEADLINE = 6.0
WORKER = 5.0
# From the cluster's working again to the next work.
BACK = 3.0
LATE = 5.0
# How long rabbitmqctl takes to delete a queue, at most.
SECONDS_TO_DELETE = 5.0
LIMITS = (
    f"Held to: nothing lost, nothing stuck, no call refused while the cluster works; publishers without an accepted call at most "
    f"{DEADLINE:g} s, workers without a task at most {WORKER:g} s after a fault and {BACK:g} s after the cluster works again, "
    f"delayed tasks at most {LATE:g} s later than a plain task that was published when they were due, counting seconds in which "
    f"the cluster works."
)
COLUMNS = (
    "scenario", "accepted", "refused", "of these while it worked", "ran", "twice", "lost", "stuck", "results told lost",
    "slowest call", "no publishing", "no work", "no work once back", "latest delayed", "plain waited", "beats missed",
)  # fmt: skip


class Call(NamedTuple):
    """A line of `calls`."""

    scenario: str
    kind: str
    number: str
    outcome: str
    started: float
    ended: float
    producer: str
    # An ETA, or the text of an error.
    more: str


@dataclass(frozen=True)
class Row:
    """What came of one scenario; seconds."""

    name: str
    accepted: int
    refused: int
    wronged: int
    ran: int
    twice: int
    lost: int
    stuck: int
    told: int
    slowest: float
    unpublished: float
    idle: float
    idle_once_back: float
    # Beyond what a plain task waited then: both are behind the same backlog.
    late: float
    waited: float
    missed: int
    notes: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether the promises held."""
        in_time = self.slowest <= DEADLINE and self.unpublished <= DEADLINE and self.late <= LATE
        works = self.idle <= WORKER and self.idle_once_back <= BACK
        return in_time and works and not (self.lost or self.stuck or self.wronged or self.missed)

    @property
    def cells(self) -> list[str]:
        """In the order of COLUMNS."""
        counts = (self.accepted, self.refused, self.wronged, self.ran, self.twice, self.lost, self.stuck, self.told)
        seconds = (self.slowest, self.unpublished, self.idle, self.idle_once_back, self.late, self.waited)
        return [self.name, *map(str, counts), *(f"{each:.1f}" for each in seconds), str(self.missed)]

    def __str__(self) -> str:
        pairs = ", ".join(f"{name} {cell}" for name, cell in zip(COLUMNS[1:], self.cells[1:], strict=True))
        verdict = "good" if self.is_good else "NOT GOOD"
        return "\n".join([f"{self.name}: {verdict}: {pairs}", *(f"    {note}" for note in self.notes)])


class Tally:
    """The files of one folder, for one scenario."""

    def __init__(self, folder: Path, scenario: str) -> None:
        self.scenario = scenario
        self._folder = folder

    def ran(self) -> int:
        """How many lines workers have written."""
        return sum(1 for _ in self._runs())

    def missing(self) -> set[tuple[str, str]]:
        """Accepted calls (kind, number) whose last task has not run, and whose caller was not told that it fails."""
        accepted = {(call.kind, call.number) for call in self._calls() if call.outcome == "accepted"}
        failed = {(words[1], words[2]) for words in self._results() if words[4].startswith("ChordError")}
        return accepted - {(kind, number) for kind, number, _, _ in self._runs()} - failed

    def row(
        self,
        name: str,
        works: Sequence[Stretch],
        during: Stretch,
        *,
        left: dict[str, int],
        deletions: Sequence[float] = (),
    ) -> Row:
        """Count it all: `works` is when the cluster did, `during` when there were producers, `left` what is in its queues."""
        calls, runs = list(self._calls()), list(self._runs())
        accepted = [call for call in calls if call.outcome == "accepted"]
        refused = [call for call in calls if call.outcome == "refused"]
        wronged = [call for call in refused if any(a <= call.started and call.ended <= b for a, b in works)]
        times = Counter((kind, number) for kind, number, _, _ in runs)
        # In a queue that was being deleted.
        deleted = {
            (call.kind, call.number)
            for call in accepted
            if call.kind == "rare" and any(-SECONDS_TO_DELETE < call.ended - at < 0 for at in deletions)
        }
        missing = self.missing() - deleted
        results = self._results()
        never = [words for words in results if words[3] == "missing" and (words[1], words[2]) not in missing]
        told = [words for words in results if words[3] == "told"]
        waiting = sum(count for queue, count in left.items() if _holds_tasks(queue))
        ran_at = {(kind, number): when for kind, number, when, _ in reversed(runs)}
        waits = sorted(
            (call.ended, _overlap(works, call.ended, ran_at[call.kind, call.number]))
            for call in accepted
            if call.kind == "plain" and (call.kind, call.number) in ran_at
        )
        late = [
            _overlap(works, float(call.more), ran_at[call.kind, call.number]) - _wait_at(float(call.more), waits)
            for call in accepted
            if call.kind == "delayed" and (call.kind, call.number) in ran_at
        ]
        published = _by((call.producer, call.ended) for call in accepted if call.kind not in ("delayed", "first"))
        # A worker that is idle on one queue does not make up for it on the other.
        worked = [
            (
                _by((worker, when) for kind, _, when, worker in runs if (kind == "rare") == is_rare),
                sorted(call.ended for call in accepted if call.kind == ("rare" if is_rare else "plain")),
            )
            for is_rare in (False, True)
        ]
        stuck = min(len(missing), waiting)
        return Row(
            name,
            accepted=len(accepted),
            refused=len(refused),
            wronged=len(wronged),
            ran=len(times),
            twice=sum(1 for count in times.values() if count > 1),
            lost=len(missing) - stuck,
            stuck=stuck + len(never),
            told=len(told),
            slowest=max((call.ended - call.started for call in calls if call.kind != "delayed"), default=0.0),
            unpublished=max(_idle(published, works, during), default=0.0),
            idle=max(_idles(worked, works, during, after_fault=True), default=0.0),
            idle_once_back=max(_idles(worked, works, during, after_fault=False), default=0.0),
            late=max([0.0, *late]),
            waited=max((wait for _, wait in waits), default=0.0),
            missed=self.missed(during),
            notes=[
                *_some("wrongly refused", [f"{call.kind} {call.number}: {call.more}" for call in wronged]),
                *_some("never ran", [f"{kind} {number}" for kind, number in sorted(missing)]),
                *_some("result never came", [f"{words[1]} {words[2]}" for words in never]),
                *_some("told", [f"{words[1]} {words[2]}: {words[4]}" for words in told]),
                *_some(
                    "left in",
                    [
                        f"{queue}: {count}"
                        for queue, count in left.items()
                        if count and (_holds_tasks(queue) or queue.endswith(".dead"))
                    ],
                ),
            ],
        )

    def missed(self, during: Stretch) -> int:
        """Due times in the middle of it without a run."""
        due = {round(datetime.fromisoformat(words[1]).timestamp()) for words in self._lines("ticks")}
        begin, end = max(round(during[0]) + 2, min(due, default=0)), round(during[1]) - 5
        return sum(1 for second in range(begin, end) if second not in due)

    def _calls(self) -> Iterator[Call]:
        for words in self._lines("calls"):
            if words[0] == self.scenario:
                scenario, kind, number, outcome, started, ended, producer, more = words
                yield Call(scenario, kind, number, outcome, float(started), float(ended), producer, more)

    def _results(self) -> list[list[str]]:
        return [words for words in self._lines("results") if words[0] == self.scenario]

    def _runs(self) -> Iterator[tuple[str, str, float, str]]:
        for words in self._lines("runs"):
            if words[0] == self.scenario:
                yield words[1], words[2], float(words[3]), words[4]

    def _lines(self, name: str) -> Iterator[list[str]]:
        path = self._folder / name
        if path.exists():
            for line in path.read_text().splitlines():
                yield line.split("\t")


def _by(lines: Iterable[tuple[str, float]]) -> dict[str, list[float]]:
    """Times in order, by who."""
    found: dict[str, list[float]] = defaultdict(list)
    for who, when in lines:
        found[who].append(when)
    return {who: sorted(times) for who, times in found.items()}


def _idle(
    times: dict[str, list[float]],
    works: Sequence[Stretch],
    during: Stretch,
    given: Sequence[float] | None = None,
    *,
    after_fault: bool | None = None,
) -> Iterator[float]:
    """For how long the cluster worked without a sign of each of these; `after_fault`: only while it still did, or did again.

    `given` is when there was something to do: who has nothing to do is not idle.
    """
    begin, end = during
    for found in times.values():
        for last, following in pairwise([begin, *(each for each in found if begin < each < end), end]):
            since = last if given is None else given[bisect(given, last)] if bisect(given, last) < len(given) else end
            for start, stop in works:
                if after_fault is None or after_fault == (start <= last):
                    yield min(stop, following) - max(start, since)


def _idles(
    worked: Sequence[tuple[dict[str, list[float]], list[float]]],
    works: Sequence[Stretch],
    during: Stretch,
    *,
    after_fault: bool,
) -> Iterator[float]:
    for times, given in worked:
        yield from _idle(times, works, during, given, after_fault=after_fault)


def _overlap(works: Sequence[Stretch], begin: float, end: float) -> float:
    """For how many seconds in between it worked."""
    return sum(max(0.0, min(stop, end) - max(start, begin)) for start, stop in works)


def _wait_at(moment: float, waits: Sequence[tuple[float, float]]) -> float:
    """How long a task at least waited that was published then, of those (published, wait) just before and after."""
    place = bisect(waits, (moment, float("inf")))
    return min((wait for _, wait in waits[max(0, place - 1) : place + 1]), default=0.0)


def _holds_tasks(queue: str) -> bool:
    """Whether what is in it still gets on; what is in a dead-letter queue is lost."""
    return queue in (QUEUE, RARE) or queue.startswith(("amqtask.delay", "amqtask.chord"))


def _some(title: str, found: list[str], most: int = 5) -> list[str]:
    """A note with the first of them."""
    more = f" … ({len(found)})" if len(found) > most else ""
    return [f"{title}: {'; '.join(found[:most])}{more}"] if found else []

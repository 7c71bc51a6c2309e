"""Limits, unique tasks and the inbox while workers are killed: no limit is exceeded, nothing is done twice.

    python -m integration.nodes run --redis -- python -m integration.flow_soak [--calls N] [--kills N] [--redis] [--seed N]

Calls of six kinds (integration.apps.flow_soak) are published as they are worked off, so that some wait all the time; every
fourth of the unique ones is called twice, so a tenth of all calls are duplicates. The workers, two for slow tasks and two for
quick ones, are killed (SIGKILL) in turn and started again. The tasks write down when they begin and end; in the end that is
counted, and what is in the database.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import signal
import sqlite3
import sys
import tempfile
import threading
import time
import uuid
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from amqtask.exceptions import AmqTaskError
from integration.workers import WorkerProcess

CALLS, KILLS = 1_000_000, 60
APP = "integration.apps.flow_soak"
# Of the unique calls: a tenth of all.
DUPLICATES = 0.24
# Without any progress for so many seconds the rest is lost.
STUCK = 120.0
# Between the store's permission and a run's first line (seconds): so much later one may begin, and the next ones not.
JITTER = 0.25
# Of each kind its part of all calls, and how many of it are there at once.
PARTS = {
    "limited": 0.07,
    "acme": 0.0215,
    "globex": 0.0215,
    "initech": 0.0215,
    "paced": 0.14,
    "brief": 0.2655,
    "booked": 0.46,
}
AHEAD = {"limited": 60, "acme": 30, "globex": 30, "initech": 30, "paced": 80, "brief": 30, "booked": 300}
# So many of them are published together; and of those without a limit that would be reached, so many a second at most: what they
# cost must leave the others the CPU that they need to reach theirs.
BLOCK, PACES = 10, {"brief": 305, "booked": 530}
COLUMNS = ("task", "calls", "runs", "of killed workers", "limit", "most", "used while calls waited", "lost", "twice")


class Run(NamedTuple):
    """A run; `end` is that of its worker where that was killed, and `is_killed` then. Seconds."""

    number: int
    begin: float
    end: float
    is_killed: bool


@dataclass(frozen=True)
class Row:
    """What came of one kind. `used`: the part of the limit; None where nothing waited on purpose."""

    name: str
    calls: int
    runs: int
    killed: int
    limit: str
    most: float
    is_kept: bool
    used: float | None
    lost: int
    twice: int | None = None

    @property
    def cells(self) -> list[str]:
        """In the order of COLUMNS."""
        used = "" if self.used is None else f"{self.used:.1%}"
        counts = f"{self.calls:,}", f"{self.runs:,}", f"{self.killed:,}"
        twice = "" if self.twice is None else f"{self.twice:,}"
        return [self.name, *counts, self.limit, f"{self.most:,g}" if self.limit else "", used, f"{self.lost:,}", twice]


@dataclass
class Report:
    """What came of one soak."""

    rows: list[Row]
    kills: int
    duplicates: int
    # Second calls of which the result was not the first one's.
    strangers: int
    seconds: float

    @property
    def is_right(self) -> bool:
        """Whether the promises held."""
        return not self.strangers and all(row.is_kept and not row.lost and not row.twice for row in self.rows)

    def __str__(self) -> str:
        lines = [COLUMNS, tuple("---" for _ in COLUMNS), *(row.cells for row in self.rows)]
        calls = sum(row.calls for row in self.rows) + self.duplicates
        return "\n".join(
            [
                *(f"| {' | '.join(line)} |" for line in lines),
                "",
                f"{calls:,} calls, {self.duplicates:,} of them duplicates ({self.strangers} got another result than the "
                f"first one's), {self.kills} workers killed, {self.seconds:.0f} s, {calls / self.seconds:,.0f} calls/s: "
                f"{'good' if self.is_right else 'NOT GOOD'}",
            ]
        )


@dataclass
class Kind:
    """The calls of one kind. `publish` makes one."""

    name: str
    count: int
    publish: Callable[[int], object]
    ended: set[int] = field(default_factory=set)
    published: int = 0
    # When the last one was published: until then some waited.
    full_until: float = 0.0


class Soak:
    """One run of it, with the module of its application; `copies` of each of two workers."""

    def __init__(self, module: Any, folder: Path, *, calls: int, kills: int, copies: int, seed: int) -> None:
        self._module = module
        self._folder = folder
        self._chance = random.Random(seed)
        self._most_kills = kills
        self._kills: list[tuple[int, float]] = []
        self.duplicates = self.strangers = 0
        self._is_over = threading.Event()
        self._offsets: Counter[str] = Counter()
        publishers = {
            "limited": module.limited.delay, "paced": module.paced.delay, "brief": module.brief.delay, "booked": self._book,
            **{tenant: self._of_tenant(tenant) for tenant in module.TENANTS},
        }  # fmt: skip
        self._kinds = [Kind(name, round(calls * part), publishers[name]) for name, part in PARTS.items()]
        slow, quick = ("-Q", module.SLOW, "-P", "threads", "-c", "64"), ("-Q", module.QUICK, "-P", "prefork", "-c", "2")
        self._workers = [
            WorkerProcess(APP, *options, "-n", f"{number}-{uuid.uuid4().hex[:6]}@soak", loglevel="WARNING")
            for options in (slow, quick)
            for number in range(copies)
        ]

    def run(self) -> Report:
        """Publish, kill and count."""
        self._module.metadata.create_all(self._module.engine)
        began = time.monotonic()
        producers = [threading.Thread(target=self._produce, args=(kind,), daemon=True) for kind in self._kinds]
        with ExitStack() as stack:
            stack.callback(self._module.app.control.purge)
            for worker in self._workers:
                stack.enter_context(worker.start(wait=False))
            stack.callback(self._is_over.set)
            for producer in producers:
                producer.start()
            self._oversee()
            self._is_over.set()
            for producer in producers:
                producer.join()
            seconds = time.monotonic() - began
            for worker in self._workers:
                worker.stop()
        return Report([*self._rows()], len(self._kills), self.duplicates, self.strangers, seconds)

    def _oversee(self) -> None:
        """Until all have run, or nothing gets on any more: kill a worker after each equal part of the calls."""
        total, moved_at, seen = sum(kind.count for kind in self._kinds), time.monotonic(), 0
        while seen < total and time.monotonic() - moved_at < STUCK:
            time.sleep(0.02)
            for kind in self._kinds:
                kind.ended.update(number for _, number, _, _ in self._records(f"{kind.name}.ends"))
            done = sum(len(kind.ended) for kind in self._kinds)
            if done > seen:
                moved_at, seen = time.monotonic(), done
            if len(self._kills) < self._most_kills and seen > total * (len(self._kills) + 1) / (self._most_kills + 1):
                self._kill(self._workers[len(self._kills) % len(self._workers)])

    def _kill(self, worker: WorkerProcess) -> None:
        worker.signal(signal.SIGKILL)
        self._kills.append((worker.pid, time.monotonic()))
        worker.wait()
        worker.start(wait=False)

    # -- calls

    def _produce(self, kind: Kind) -> None:
        began, pace = time.monotonic(), PACES.get(kind.name, 1_000_000)
        while kind.published < kind.count:
            block = range(kind.published, min(kind.published + BLOCK, kind.count))
            while block.stop - len(kind.ended) > AHEAD[kind.name] or kind.published > pace * (time.monotonic() - began):
                if self._is_over.wait(0.005):
                    return
            try:
                with self._module.app.pipeline():
                    for number in block:
                        kind.publish(number)
            except AmqTaskError as error:
                print(f"  publishing {kind.name} {block} again: {type(error).__name__}: {error}", flush=True)
                if self._is_over.wait(0.2):
                    return
                continue
            kind.published = block.stop
        kind.full_until = time.monotonic()

    def _of_tenant(self, tenant: str) -> Callable[[int], object]:
        return lambda number: self._module.of_tenant.delay(number, tenant)

    def _book(self, number: int) -> None:
        first = self._module.booked.delay(number)
        if self._chance.random() < DUPLICATES:
            self.duplicates += 1
            self.strangers += self._module.booked.delay(number).id != first.id

    # -- what was written down

    def _records(self, name: str, *, again: bool = False) -> Iterator[tuple[int, int, float, int]]:
        """Those that were not read yet, or all."""
        path, record = self._folder / name, self._module.RECORD
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(0 if again else self._offsets[name])
            found = file.read()
        whole = len(found) - len(found) % record.size
        if not again:
            self._offsets[name] += whole
        yield from record.iter_unpack(found[:whole])

    def _runs(self, name: str) -> list[Run]:
        killed = dict(self._kills)
        ends: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
        for process, number, at, _ in self._records(f"{name}.ends", again=True):
            ends[process, number].append(at)
        runs = []
        for process, number, begin, _ in sorted(
            self._records(f"{name}.begins", again=True), key=lambda record: record[2]
        ):
            ended = ends[process, number]
            is_killed = not ended
            runs.append(Run(number, begin, killed.get(process, begin) if is_killed else ended.pop(0), is_killed))
        return runs

    def _rows(self) -> Iterator[Row]:
        module = self._module
        for kind in self._kinds:
            runs = self._runs(kind.name)
            if kind.name == "booked":
                yield self._booked(kind, runs)
                continue
            begin, end = min((run.begin for run in runs), default=0.0), kind.full_until
            used: float | None = None
            if kind.name == "paced":
                begins = sorted(run.begin for run in runs)
                most, limit = most_within(begins, 10.0), module.BURST + 10 * module.PER_SECOND
                is_kept = most <= limit + JITTER * module.PER_SECOND
                used = bisect_right(begins, end) / max(1.0, module.PER_SECOND * (end - begin) + module.BURST)
                told = f"{limit} in 10 s"
            else:
                limit = {"limited": module.PLACES, "brief": module.BRIEF_PLACES}.get(kind.name, module.TENANTS_PLACES)
                most = most_at_once((run.begin, run.end) for run in runs)
                is_kept, told = most <= limit, f"{limit} at once"
                if kind.name != "brief":
                    # A dead worker's places are free when their leases end, which it had renewed three times in each.
                    left = module.LEASE * 5 / 6
                    taken = [(run.begin, run.end + left * run.is_killed) for run in runs]
                    used = share_used(taken, limit, begin, end)
            if end <= begin:  # all were published before the first one ran
                used = None
            killed, lost = sum(run.is_killed for run in runs), kind.count - len(kind.ended)
            yield Row(kind.name, kind.count, len(runs), killed, told, most, is_kept, used, lost)

    def _booked(self, kind: Kind, runs: Sequence[Run]) -> Row:
        """Each number is booked once, and only one call of it has ever run."""
        with closing(sqlite3.connect(self._folder / "bank.db")) as bank:
            booked = Counter(number for (number,) in bank.execute("SELECT number FROM bookings"))
        calls: defaultdict[int, set[int]] = defaultdict(set)
        for _, number, _, call in self._records("booked.begins", again=True):
            calls[number].add(call)
        doubled = {number for number, several in calls.items() if len(several) > 1}
        twice = len(doubled | {number for number, times in booked.items() if times > 1})
        killed = sum(run.is_killed for run in runs)
        return Row("booked", kind.count, len(runs), killed, "", 0, True, None, kind.count - len(booked), twice)


def most_at_once(spans: Iterable[tuple[float, float]]) -> int:
    """How many of them there are at one time, at most."""
    changes = sorted(change for begin, end in spans for change in ((begin, 1), (end, -1)))
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def share_used(spans: Iterable[tuple[float, float]], limit: int, begin: float, end: float) -> float:
    """The part of `limit` spans at once that there were between the two times."""
    changes = sorted(change for span in spans for change in ((span[0], 1), (span[1], -1)))
    used, now, last = 0.0, 0, begin
    for at, change in changes:
        until = min(max(at, begin), end)
        used += min(now, limit) * (until - last)
        now, last = now + change, until
    return used / max(1e-9, limit * (end - begin))


def most_within(times: Sequence[float], seconds: float) -> int:
    """The most of these rising times that are within so many seconds."""
    return max((bisect_right(times, at + seconds) - index for index, at in enumerate(times)), default=0)


def run(broker_url: str, store_url: str, *, calls: int, kills: int, copies: int = 2, seed: int = 0) -> Report:
    """Raises: NeverHappened for a worker that does not stop."""
    with tempfile.TemporaryDirectory(prefix="amqtask-flow-soak-") as folder:
        environment = {
            "FLOW_SOAK_BROKER": broker_url, "FLOW_SOAK_STORE": store_url, "FLOW_SOAK_FOLDER": folder,
            "FLOW_SOAK_QUEUE": f"flow-soak-{uuid.uuid4().hex[:8]}",
        }  # fmt: skip
        with patch.dict(os.environ, environment):
            module: Any = importlib.reload(importlib.import_module(APP))
            try:
                return Soak(module, Path(folder), calls=calls, kills=kills, copies=copies, seed=seed).run()
            finally:
                module.engine.dispose()
                module.app.close()


def main() -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m integration.flow_soak")
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--kills", type=int, help=f"[{KILLS} in {CALLS:,} calls]")
    parser.add_argument("--redis", action="store_true", help="Redis is the broker, too")
    parser.add_argument("--seed", type=int, default=random.randrange(1000))
    options = parser.parse_args()
    kills = max(1, round(options.calls * KILLS / CALLS)) if options.kills is None else options.kills
    store = os.environ["AMQTASK_REDIS_URL"]
    broker = store if options.redis else os.environ["AMQTASK_BROKER_URL"]
    report = run(broker, store, calls=options.calls, kills=kills, seed=options.seed)
    print(report, flush=True)
    return 0 if report.is_right else 1


if __name__ == "__main__":
    sys.exit(main())

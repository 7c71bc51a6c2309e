"""The index of history: how fast it takes events in, how long each kind of search takes in a large one, and how much memory.

BENCH_HISTORY_EVENTS=10000000 python -m benchmarks history [history-postgresql]

The index is a SQLite file or a private PostgreSQL (AMQTASK_POSTGRES_URL: that one) under TMPDIR; it goes afterwards.
The first and the last events come as a worker sends them, through the indexer that `amqtask history` runs; only the broker is
left out. What is between are copies of the first ones, with other times and ids, which the database makes.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import sqlalchemy as sa

from amqtask.console import overview
from amqtask.history.client import History
from amqtask.history.index import IndexUnreachable
from amqtask.history.indexer import Indexer
from amqtask.history.records import COLUMNS, key_at
from amqtask.history.tables import COUNTED, MINUTES, STAMPS, TASKS, TEXTS
from amqtask.protocol.message import Delivery, Properties
from integration.servers import postgres

WEEK = 7 * 86_400
EVENTS = int(os.environ.get("BENCH_HISTORY_EVENTS", "1000000"))
# Bytes that an event needs on disk, with those that are being written (SQLite's WAL); events after which is told how it goes.
DISK, TOLD = 600, 1_000_000
# The first events come in by the indexer, and are copied so often: an id is as often turned around, see `copy`.
COPIES = 29
BASE, LENGTH = EVENTS // (COPIES + 1), WEEK // (COPIES + 1)
# Events of a message; tasks that begin before one ends. So the end of a task comes in another batch than its beginning.
IN_MESSAGE, AT_ONCE = 200, 1_500
# Each task has a queue; 100 tenants, the stamps of each tenth call; of each hundredth call another one is the parent.
KINDS, QUEUES, WORKERS, TENANTS, USERS = 40, 8, 20, 100, 100_000
ERRORS = ["ValueError", "ConnectionError", "KeyError", "TimeoutError"]
# Searches of each kind; threads that search at once while memory is measured, and the events that are taken in meanwhile, and
# while old ones are forgotten.
SEARCHES, THREADS, MORE = 20, 8, 200_000
Kinds = dict[str, Callable[[random.Random], object]]


def task_events(count: int, until: float, length: float = WEEK, seed: int = 1) -> Iterator[dict[str, object]]:
    """The events of tasks of so many seconds, some of which fail; in the order in which they come."""
    choose = random.Random(seed)
    ends: deque[dict[str, object]] = deque()
    for number in range(count):
        at = until - length * (1 - number / count)
        kind, worker = choose.randrange(KINDS), f"w{choose.randrange(WORKERS)}@host"
        common = {"uuid": str(uuid.UUID(int=choose.getrandbits(128))), "pid": 1, "utcoffset": 0}
        told = {
            "name": f"shop.task_{kind}",
            "queue": f"queue_{kind % QUEUES}",
            "args": f"({number}, 'user{choose.randrange(USERS)}@example.org')",
            "kwargs": "{}",
            "retries": 0,
            "root_id": common["uuid"],
        }
        if number % 10 == 0:
            told["stamps"] = {"tenant": [str(choose.randrange(TENANTS))]}
        if number % 100 < 2:
            family = str(uuid.UUID(int=number // 100))
            common["uuid"], told["root_id"] = (family, family) if number % 100 == 0 else (common["uuid"], family)
            told["parent_id"] = None if number % 100 == 0 else family
        ended: dict[str, object] = {"type": "task-succeeded", "result": "None", "runtime": choose.random()}
        if choose.random() < 0.02:
            text = f"{choose.choice(ERRORS)}('no answer from host{choose.randrange(500)}')"
            ended = {"type": "task-failed", "exception": text, "traceback": "Traceback …\n" * 10}
        yield {**common, **told, "type": "task-sent", "timestamp": at, "hostname": "gen1@web"}
        yield {**common, **told, "type": "task-received", "timestamp": at + 0.01, "hostname": worker}
        yield {**common, "type": "task-started", "timestamp": at + 0.02, "hostname": worker}
        ends.append({**common, **ended, "timestamp": at + 1, "hostname": worker})
        if len(ends) > AT_ONCE:
            yield ends.popleft()
    yield from ends


class Source:
    """What the indexer reads; `seconds` without making it up, `longest` of them between two reads that begin a batch."""

    def __init__(self, events: Iterator[dict[str, object]], on_end: Callable[[], None]) -> None:
        self._events = events
        self._on_end = on_end
        self._read_at = time.monotonic()
        self.seconds = self.longest = 0.0
        self.taken = 0
        self._told = (0, 0.0)

    def read(self, limit: int, seconds: float) -> list[Delivery]:
        """See amqtask.transport.contract.Tail."""
        now = time.monotonic()
        self.seconds += now - self._read_at
        self.longest = max(self.longest, now - self._read_at)
        deliveries = []
        for _ in range(limit):
            events = list(itertools.islice(self._events, IN_MESSAGE))
            if not events:
                self._on_end()
                break
            self.taken += len(events)
            properties = Properties(content_type="application/json", content_encoding="utf-8")
            deliveries.append(
                Delivery(json.dumps(events).encode(), properties, "", "task.multi", False, "history", 1, 1)
            )
        if self.taken - self._told[0] >= TOLD:
            per_second = (self.taken - self._told[0]) / (self.seconds - self._told[1])
            print(f"{self.taken:,} taken in, the last at {per_second:,.0f}/s, {memory():.0f} MB", flush=True)
            self._told = (self.taken, self.seconds)
        self._read_at = time.monotonic()
        return deliveries

    def acknowledge(self) -> None:
        """See the contract."""

    def close(self) -> None:
        """See the contract."""


def copy(history: History) -> None:
    """Make the copies: tasks of the days before, with their texts, stamps and minutes."""
    first = history.index.transact(
        lambda connection: connection.execute(sa.select(sa.func.min(TASKS.c.key))).scalar_one()
    )
    for number in range(1, COPIES + 1):
        keys, seconds = key_at(number * LENGTH), number * LENGTH
        changed = {
            "key": f"key - {keys}",
            **{
                name: f"substr({name}, {number + 1}) || substr({name}, 1, {number})"
                for name in ("id", "root_id", "parent_id")
            },
            **{name: f"{name} - {seconds}" for name in COLUMNS if name.endswith("_at")},
        }
        since = time.time() - LENGTH - 600
        statements = []
        for table, column, values in (
            (TASKS, "key", changed),
            (TEXTS, "rowid", {"rowid": f"rowid - {keys}"}),
            (STAMPS, "key", {"key": f"key - {keys}"}),
        ):
            names = table.columns.keys()
            chosen = ", ".join(values.get(name, name) for name in names)
            statements.append(
                f"INSERT INTO {table.name} ({', '.join(names)}) SELECT {chosen} FROM {table.name} WHERE {column} >= {first}"
            )
        names = ", ".join(COUNTED)
        statements.append(
            f"INSERT INTO {MINUTES.name} (minute, {names}) SELECT minute - {seconds // 60}, {names} FROM {MINUTES.name} "
            f"WHERE minute > {since // 60} ON CONFLICT DO NOTHING"
        )
        for statement in map(sa.text, statements):
            history.index.transact(partial(sa.Connection.execute, statement=statement))
        print(f"{BASE * (number + 1):,} events", flush=True)


def take_in(history: History, count: int, *, length: float = LENGTH, seed: int = 1, max_bytes: int = 1 << 50) -> Source:
    """Have the indexer take so many events in."""
    events = task_events(count // 4, time.time(), length, seed)
    source = Source(events, lambda: indexer.stop())
    json_only = frozenset({"application/json"})
    indexer = Indexer(history.index, lambda _: source, accept=json_only, max_age=10 * WEEK, max_bytes=max_bytes)
    indexer.run()
    return source


def searches(history: History) -> Kinds:
    """Kinds of searches, as the console asks them, with values by chance."""
    find, count = history.page, history.count
    ids = [task.id for task in history.find(limit=1000)]
    middle = history.find(until=timedelta(days=3.5), limit=1)[0].cursor
    groups = history.failures(limit=3)

    def task(r: random.Random) -> str:
        return f"shop.task_{r.randrange(KINDS)}"

    def queue(r: random.Random) -> str:
        return f"queue_{r.randrange(QUEUES)}"

    def worker(r: random.Random) -> str:
        return f"w{r.randrange(WORKERS)}@host"

    def family(r: random.Random) -> str:
        return str(uuid.UUID(int=r.randrange(max(1, BASE // 400))))

    return {
        "a task with its family": lambda r: history.get(r.choice(ids)),
        "a workflow": lambda r: history.workflow(family(r)),
        "root id": lambda r: find(root_id=family(r)),
        "the newest": lambda r: find(),
        "a page in the middle": lambda r: find(after=middle),
        "task": lambda r: find(task=task(r)),
        "queue, in a day": lambda r: find(queue=queue(r), until=timedelta(days=r.random() * 6)),
        "worker, a page in the middle": lambda r: find(worker=worker(r), after=middle),
        "task and worker": lambda r: find(task=task(r), worker=worker(r)),
        "task and queue that have nothing in common": lambda r: find(task="shop.task_1", queue="queue_2"),
        "task and a worker that there is not": lambda r: find(task=task(r), worker="nobody@host"),
        "failures": lambda r: find(state="FAILURE"),
        "failures of a task": lambda r: find(state="FAILURE", task=task(r)),
        "failures of a worker": lambda r: find(state="FAILURE", worker=worker(r)),
        "failures or retries": lambda r: find(state=["FAILURE", "RETRY"]),
        "succeeded or failed": lambda r: find(state=["SUCCESS", "FAILURE"], after=middle),
        "succeeded, of a queue": lambda r: find(state="SUCCESS", queue=queue(r)),
        "a state that none has": lambda r: find(state="REVOKED", queue=queue(r)),
        "an error": lambda r: find(error=r.choice(ERRORS)),
        "an error of a queue": lambda r: find(error=r.choice(ERRORS), queue=queue(r)),
        "stamp": lambda r: find(stamp=("tenant", str(r.randrange(TENANTS)))),
        "stamp, failures": lambda r: find(stamp=("tenant", str(r.randrange(TENANTS))), state="FAILURE"),
        "stamp that none has": lambda r: find(stamp=("tenant", "nobody")),
        "rare words": lambda r: find(text=f"user{r.randrange(USERS)}@example.org"),
        "the beginning of words": lambda r: find(text=f"user{r.randrange(1000, 10_000)}*"),
        "common words": lambda r: find(text="example.org"),
        "common words, a page in the middle": lambda r: find(text="example.org", after=middle),
        "common words, in a day": lambda r: find(text="example.org", until=timedelta(days=r.random() * 6)),
        "common words of a worker": lambda r: find(text="example.org", worker=worker(r)),
        "common words of a task's failures": lambda r: find(text="example.org", state="FAILURE", task=task(r)),
        "common words with a stamp": lambda r: find(text="example.org", stamp=("tenant", str(r.randrange(TENANTS)))),
        "words of failures": lambda r: find(text=f"host{r.randrange(500)}", state="FAILURE"),
        "words that none has": lambda r: find(text="nowhere"),
        "common words that are nowhere together": lambda r: find(text="org.example"),
        "groups of failures in a day": lambda r: history.failures(since=timedelta(days=1)),
        "groups of failures in a week": lambda r: history.failures(since=timedelta(days=7)),
        "unseen failures": lambda r: [
            history.index.count_failures(group.name, group.error, 0.0, ()) for group in groups
        ],
        "plots of a day": lambda r: overview.plot(history.minutes(timedelta(days=1), every=2), timedelta(days=1)),
        "plots of a week": lambda r: overview.plot(history.minutes(timedelta(days=7), every=16), timedelta(days=7)),
        "who waits longest in a queue": lambda r: history.waits(queue(r)),
        "what has changed": lambda r: history.now(),
        "count of all": lambda r: count(most=10_000),
        "count of a state": lambda r: count(state="SUCCESS", most=10_000),
        "count of a task": lambda r: count(task=task(r), most=10_000),
        "count of a queue": lambda r: count(queue=queue(r), most=10_000),
        "count of common words": lambda r: count(text="example.org", most=10_000),
        "count of common words in a queue": lambda r: count(text="example.org", queue=queue(r), most=10_000),
        "count of failures with common words": lambda r: count(text="example.org", state="FAILURE", most=10_000),
    }  # fmt: skip


def measured(kinds: Kinds) -> list[tuple[str, ...]]:
    """A row for each kind, and one for all."""
    found: list[tuple[str, ...]] = []
    every: list[float] = []
    for name, search in kinds.items():
        chance, times = random.Random(2), []
        for _ in range(SEARCHES):
            began = time.perf_counter()
            # One that is given up has taken as long as a search may.
            with contextlib.suppress(IndexUnreachable):
                search(chance)
            times.append((time.perf_counter() - began) * 1000)
        every += times
        found.append((name, f"{statistics.median(times):.1f}", f"{quantile(times):.1f}", "≤ 300"))
        print(*found[-1], flush=True)
    return [*found, ("all", f"{statistics.median(every):.1f}", f"{quantile(every):.1f}", "≤ 300")]


@contextlib.contextmanager
def store(kind: str) -> Iterator[str]:
    """The URL of an empty index of this kind."""
    if kind == "sqlite":
        with tempfile.TemporaryDirectory() as folder:
            yield f"sqlite:///{folder}/index.sqlite3"
    else:
        with postgres(shared_buffers="256MB") as server:
            url = server.create_database()
            yield url
            server.drop_database(url)


def rows(kind: str) -> list[tuple[str, ...]]:
    """The table of one kind of store."""
    if shutil.disk_usage(tempfile.gettempdir()).free < EVENTS * DISK:
        raise SystemExit(f"{EVENTS:,} events need {EVENTS * DISK / 1e9:.0f} GB in {tempfile.gettempdir()}: set TMPDIR")
    with store(kind) as url:
        history = History(url)
        print(f"history in {kind}: {EVENTS:,} events", flush=True)
        found: list[tuple[str, ...]] = [(f"history in {kind}, {EVENTS:,} events", "p50 ms", "p95 ms", "least")]
        source = take_in(history, BASE)
        found.append((f"the first {BASE:,} taken in: {rate(source)}", "", "", "≥ 5,000/s"))
        print(*found[-1], flush=True)
        copy(history)
        if kind == "postgresql":
            # As the server does by itself within a minute.
            history.index.transact(lambda connection: connection.execute(sa.text("ANALYZE")))
        size = history.index.size()
        source = take_in(history, MORE, length=60.0, seed=4)
        found.append(
            (
                f"the last {MORE:,}: {rate(source)}, {size / EVENTS:.0f} bytes each",
                "",
                "",
                "≥ 5,000/s",
            )
        )
        print(*found[-1], flush=True)
        found += measured(searches(history))
        most = subprocess.run(
            [sys.executable, "-m", "benchmarks.history", url], stdout=subprocess.PIPE, text=True, check=True
        )
        found.append(
            (f"memory of a console with {THREADS} searches at once: {most.stdout.strip()} MB", "", "", "≤ 150")
        )
        source = take_in(history, MORE, length=60.0, seed=3, max_bytes=int(history.index.size() * 0.99))
        found.append((f"taken in while old ones are forgotten: {rate(source)}", "", "", "≥ 5,000/s"))
        history.close()
        return found


def rate(source: Source) -> str:
    """Events a second."""
    return f"{source.taken / source.seconds:,.0f} events/s, {source.longest:.2f} s for the slowest batch"


def console(url: str) -> None:
    """What a console does, in a process of its own: search in several threads, and take events in. Prints its memory."""
    importlib.import_module("amqtask.console.web")
    history = History(url)
    kinds = searches(history)

    def search(number: int) -> None:
        chance = random.Random(number)
        for one in chance.sample(list(kinds.values()), len(kinds)):
            one(chance)

    threads = [threading.Thread(target=search, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    take_in(history, MORE // 4, length=60.0, seed=2)
    for thread in threads:
        thread.join()
    history.close()
    print(f"{memory():.0f}")


def memory() -> float:
    """The most memory that this process has had, in MB. (What getrusage tells is at least what its parent had.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def quantile(times: list[float]) -> float:
    """The 95th percentile."""
    return sorted(times)[int(len(times) * 0.95)]


if __name__ == "__main__":
    console(sys.argv[1])

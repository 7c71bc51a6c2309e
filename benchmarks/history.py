"""The index of history: how fast it takes events in, and how long searches take in a large one.

BENCH_HISTORY_EVENTS=10000000 BENCH_HISTORY_URL=postgresql://… python -m benchmarks history

Without a URL it is a SQLite file in a folder under TMPDIR, which goes afterwards; as large as `DISK` says.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta

from amqtask.history.client import History

EVENTS = int(os.environ.get("BENCH_HISTORY_EVENTS", "1000000"))
# Events of a batch, as the indexer has them.
BATCH = 2_000
# Bytes that an event needs on disk, with those that are being written (SQLite's WAL); events after which is told how it goes.
DISK, TOLD = 500, 1_000_000
TASKS, QUEUES, WORKERS, ERRORS = 40, 8, 20, ["ValueError", "ConnectionError", "KeyError", "TimeoutError"]
SEARCHES = 20


def tasks(count: int, until: float) -> Iterator[list[dict[str, object]]]:
    """The events of tasks of the last week, some of which fail."""
    choose = random.Random(1)
    for number in range(count):
        at = until - 7 * 86_400 * (1 - number / count)
        worker, name = f"w{choose.randrange(WORKERS)}@host", f"shop.task_{choose.randrange(TASKS)}"
        common = {"uuid": str(uuid.UUID(int=choose.getrandbits(128))), "pid": 1, "utcoffset": 0}
        told = {
            "name": name,
            "queue": f"queue_{choose.randrange(QUEUES)}",
            "args": f"({number}, 'user{choose.randrange(100_000)}@example.org')",
            "kwargs": "{}",
            "retries": 0,
            "root_id": common["uuid"],
        }
        ended: dict[str, object] = {"type": "task-succeeded", "result": "None", "runtime": choose.random()}
        if choose.random() < 0.02:
            text = f"{choose.choice(ERRORS)}('no answer from host{choose.randrange(500)}')"
            ended = {"type": "task-failed", "exception": text, "traceback": "Traceback …\n" * 10}
        yield [
            {**common, **told, "type": "task-sent", "timestamp": at, "hostname": "gen1@web"},
            {**common, **told, "type": "task-received", "timestamp": at + 0.01, "hostname": worker},
            {**common, "type": "task-started", "timestamp": at + 0.02, "hostname": worker},
            {**common, **ended, "timestamp": at + 1, "hostname": worker},
        ]


def fill(history: History) -> float:
    """Events a second that are taken in."""
    now, batch = time.time(), list[dict[str, object]]()
    seconds, taken, since = 0.0, 0, 0.0
    for events in tasks(EVENTS // 4, now):
        batch += events
        if len(batch) >= BATCH:
            started = time.monotonic()
            history.index.take(batch)
            seconds += time.monotonic() - started
            taken += len(batch)
            batch = []
            if taken % TOLD == 0:
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                print(f"{taken:,} taken in, the last at {TOLD / (seconds - since):,.0f}/s, {memory:.0f} MB", flush=True)
                since = seconds
    return EVENTS / seconds


def searches(history: History) -> dict[str, Callable[[random.Random], object]]:
    """Kinds of searches, with values by chance."""
    find = history.find
    ids = [task.id for task in find(limit=1000)]
    groups = history.failures(limit=3)
    return {
        "by id": lambda r: history.get(r.choice(ids)),
        "newest": lambda r: find(),
        "failures": lambda r: find(state="FAILURE"),
        "failures of a task": lambda r: find(state="FAILURE", task=f"shop.task_{r.randrange(TASKS)}"),
        "of a queue in a day": lambda r: find(
            queue=f"queue_{r.randrange(QUEUES)}", until=timedelta(days=r.random() * 6)
        ),
        "failures of a worker": lambda r: find(worker=f"w{r.randrange(WORKERS)}@host", state="FAILURE"),
        "an error of a queue": lambda r: find(error=r.choice(ERRORS), queue=f"queue_{r.randrange(QUEUES)}"),
        "rare words": lambda r: find(text=f"user{r.randrange(100_000)}@example.org"),
        "common words": lambda r: find(text="example.org"),
        "words of failures": lambda r: find(text=f"host{r.randrange(500)}", state="FAILURE"),
        "words that none has": lambda r: find(text="nowhere", state="FAILURE"),
        "common words of a task's failures": lambda r: find(
            text="example.org", state="FAILURE", task=f"shop.task_{r.randrange(TASKS)}"
        ),
        "groups of failures": lambda r: history.failures(since=timedelta(days=7)),
        "a day in minutes": lambda r: history.minutes(timedelta(days=1)),
        "unseen failures": lambda r: [
            history.index.count_failures(group.name, group.error, 0.0, ()) for group in groups
        ],
        "how many failures of a task": lambda r: history.count(state="FAILURE", task=f"shop.task_{r.randrange(TASKS)}"),
        "how many of a task": lambda r: history.count(task=f"shop.task_{r.randrange(TASKS)}"),
        "how many of a queue": lambda r: history.count(queue=f"queue_{r.randrange(QUEUES)}"),
        "how many with common words in a day": lambda r: history.count(text="example.org", since=timedelta(days=1)),
    }


def rows() -> list[tuple[str, ...]]:
    """The table."""
    with tempfile.TemporaryDirectory() as folder:
        if "BENCH_HISTORY_URL" not in os.environ and shutil.disk_usage(folder).free < EVENTS * DISK:
            raise SystemExit(f"{EVENTS:,} events need {EVENTS * DISK / 1e9:.0f} GB in {folder}: set TMPDIR")
        history = History(os.environ.get("BENCH_HISTORY_URL", f"sqlite:///{folder}/index.sqlite3"))
        print(f"history: {EVENTS:,} events", flush=True)
        per_second = fill(history)
        size = history.index.size()
        found: list[tuple[str, ...]] = [("history", "p50 ms", "p95 ms", "least")]
        found.append((f"taken in: {per_second:,.0f} events/s, {size / EVENTS:.0f} bytes each", "", "", "≥ 5,000/s"))
        every: list[float] = []
        for name, search in searches(history).items():
            chance, times = random.Random(2), []
            for _ in range(SEARCHES):
                began = time.perf_counter()
                search(chance)
                times.append((time.perf_counter() - began) * 1000)
            every += times
            found.append((name, f"{statistics.median(times):.1f}", f"{quantile(times):.1f}", ""))
            print(*found[-1], flush=True)
        found.append(
            (f"all, among {EVENTS:,} events", f"{statistics.median(every):.1f}", f"{quantile(every):.1f}", "≤ 300")
        )
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found.append((f"memory: {memory:.0f} MB", "", "", "≤ 150"))
        history.close()
        return found


def quantile(times: list[float]) -> float:
    """The 95th percentile."""
    return sorted(times)[int(len(times) * 0.95)]

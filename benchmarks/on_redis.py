"""The table of costs on Redis: ours beside Celery's, both on the same Redis in one run, and beside ours on RabbitMQ.

Each system has a database of that Redis to itself, emptied before each measurement; its results are in the same database.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import redis

from benchmarks import measure, peers
from benchmarks.measure import Drained

OURS = "benchmarks.apps.bench_amqtask"
CELERY = "benchmarks.apps.bench_celery"
DATABASE = 9
COUNT = 20_000
CELERY_COUNT = 10_000
DELAYED = 100_000
POOLS = {
    "solo": ("-P", "solo"),
    "prefork": ("-P", "prefork", "-c", "2"),
    "threads": ("-P", "threads", "-c", "8"),
    "asyncio": ("-P", "asyncio", "-c", "100"),
    "eventlet": ("-P", "eventlet", "-c", "100"),
    "gevent": ("-P", "gevent", "-c", "100"),
}
# How many times Celery's throughput is asked for.
LEAST = {"prefork": 4, "eventlet": 20, "gevent": 20}
# How many times the CPU of a task over RabbitMQ a task over Redis may use.
MOST_CPU = 1.3
Row = tuple[str, ...]
Worker = Callable[..., list[str]]


def url() -> str:
    """The broker of these measurements."""
    return f"{os.environ['AMQTASK_REDIS_URL'].rpartition('/')[0]}/{DATABASE}"


def version() -> str:
    """The server's version."""
    with redis.Redis.from_url(url()) as client:
        return str(client.info("server")["redis_version"])


@contextmanager
def emptied() -> Iterator[redis.Redis]:
    """A client of the database, which holds nothing now."""
    with redis.Redis.from_url(url()) as client:
        client.flushdb()
        yield client


def environment(*, results: bool = False) -> dict[str, str]:
    """What tells either system's application its broker, and where results are kept if they are."""
    return {"AMQTASK_BROKER_URL": url(), **({"BENCH_RESULTS": url()} if results else {})}


def drain_ours(pool: str, worker: Worker) -> Drained:
    """Fill, then drain with one of our pools."""
    told = environment() | ({"BENCH_ASYNC": "1"} if pool == "asyncio" else {})
    with emptied():
        measure.client(sys.executable, OURS, "fill", COUNT, **told)
        return measure.drain(worker(*POOLS[pool]), COUNT, **told)


def drain_celery(pool: str, worker: Worker, count: int) -> Drained:
    """The same with Celery's defaults: acknowledged early."""
    with emptied():
        measure.client(peers.python(), CELERY, "fill", count, **environment())
        return measure.drain(worker(*POOLS[pool]), count, timeout=300.0, **environment())


def drain_rows(
    title: str,
    pools: Sequence[str],
    ours: Callable[[str], Drained],
    theirs: Callable[[str], Drained],
    rabbit: Callable[[str], Drained],
) -> list[Row]:
    """One row for each pool; `asyncio` is none of Celery's."""
    rows: list[Row] = [
        (
            title,
            "tasks/s",
            "Celery's",
            "ratio",
            "least",
            "CPU µs/task",
            "on RabbitMQ",
            "ratio",
            "most",
            "PSS MB",
            "Celery's",
        )
    ]
    for pool in pools:
        run, other = ours(pool), rabbit(pool)
        peer = None if pool == "asyncio" else theirs(pool)
        rows.append(
            (
                " ".join(POOLS[pool]),
                f"{run.per_second:,.0f}",
                f"{peer.per_second:,.0f}" if peer else "–",
                f"{run.per_second / peer.per_second:,.1f}" if peer else "",
                f"≥ {LEAST[pool]}" if pool in LEAST else "",
                f"{run.cpu_us:.0f}",
                f"{other.cpu_us:.0f}",
                f"{run.cpu_us / other.cpu_us:.2f}",
                f"≤ {MOST_CPU}",
                f"{run.memory_mb:.0f}",
                f"{peer.memory_mb:.0f}" if peer else "–",
            )
        )
        print("  ", *rows[-1], flush=True)
    return rows


def roundtrips(ours: Worker, theirs: Worker) -> list[Row]:
    """delay().get(), one after the other; the systems in turn, the medians of three turns."""
    rows: list[Row] = [("round trip on Redis", "p50 ms", "p99 ms", "Celery's p50", "Celery's p99", "p50 ratio", "most")]
    told = environment(results=True)
    sides = (ours, sys.executable, OURS), (theirs, peers.python(), CELERY)
    for pool in ("prefork", "solo", "threads"):
        turns: list[list[dict[str, float]]] = [[], []]
        for _ in range(3):
            for runs, (worker, python, module) in zip(turns, sides, strict=True):
                with emptied(), measure.worker(worker(*POOLS[pool]), told):
                    runs.append(measure.client(python, module, "roundtrip", 300, **told))
        figures = [statistics.median(run[key] for run in runs) for runs in turns for key in ("p50", "p99")]
        rows.append((pool, *(f"{figure:.2f}" for figure in figures), f"{figures[0] / figures[2]:.2f}", "≤ 0.5"))
        print("  ", *rows[-1], flush=True)
    return rows


def flows(ours: Worker, theirs: Worker) -> list[Row]:
    """Compositions from the call to the last result."""
    rows: list[Row] = [("workflows on Redis, prefork -c 2", "amqtask s", "Celery s", "ratio")]
    told = environment(results=True)
    for kind, count in (("group", 10_000), ("chord", 1_000), ("chain", 100)):
        with emptied(), measure.worker(ours(*POOLS["prefork"]), told):
            run = measure.client(sys.executable, OURS, kind, count, **told)["seconds"]
        with emptied(), measure.worker(theirs(*POOLS["prefork"]), told):
            peer = measure.client(peers.python(), CELERY, kind, count, **told)["seconds"]
        rows.append((f"{kind} of {count:,}", f"{run:.3f}", f"{peer:.3f}", f"{peer / run:.1f}"))
        print("  ", *rows[-1], flush=True)
    return rows


def delayed(ours: Worker, theirs: Worker) -> list[Row]:
    """What tasks that wait for their time cost: in Redis, and in a worker of two processes that had the time to see them all."""
    rows: list[Row] = [(f"{DELAYED:,} delayed tasks", "published s", "Redis MB", "worker PSS MB", "without them")]
    sides = (
        ("amqtask", sys.executable, OURS, ours, "bench_amqtask"),
        ("Celery", peers.python(), CELERY, theirs, "bench_celery"),
    )
    for name, python, module, worker, queue in sides:
        with emptied() as client, measure.worker(worker(*POOLS["prefork"]), environment()) as process:
            measure.client(python, module, "publish", 1, **environment())
            _until(lambda client=client, queue=queue: not client.llen(queue))
            empty, memory = client.info("memory")["used_memory"], measure.session_memory(process.pid)
            began = time.monotonic()
            measure.client(python, module, "delayed", DELAYED, **environment())
            seconds = time.monotonic() - began
            _until(lambda client=client, queue=queue: not client.llen(queue))
            grown = client.info("memory")["used_memory"] - empty
            rows.append(
                (
                    name,
                    f"{seconds:.1f}",
                    f"{grown / 2**20:.0f}",
                    f"{measure.session_memory(process.pid):.0f}",
                    f"{memory:.0f}",
                )
            )
        print("  ", *rows[-1], flush=True)
    return rows


def _until(condition: Callable[[], bool]) -> None:
    """Until a worker has taken what waits."""
    deadline = time.monotonic() + 180
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the worker does not take what waits")
        time.sleep(0.2)

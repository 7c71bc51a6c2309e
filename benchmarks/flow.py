"""What options of flow control cost, and what batches save: drains of one queue, on RabbitMQ, each beside the plain task's."""

from __future__ import annotations

import sys
from collections.abc import Callable

from benchmarks import measure
from benchmarks.measure import Drained

APP = "benchmarks.apps.bench_flow"
QUEUE = "bench_flow"
POOLS = {"prefork": ("-P", "prefork", "-c", "2"), "threads": ("-P", "threads", "-c", "8")}
# (what, its task, how many, the task that it is compared with)
KINDS = (
    ("no-op", "plain", 20_000, ""),
    ("no-op with a limit", "limited", 20_000, "plain"),
    ("no-op with a rate", "paced", 20_000, "plain"),
    ("no-op in batches of 100", "batched", 20_000, "plain"),
    ("a row, committed", "insert", 2_000, ""),
    ("rows in batches of 100", "insert_batched", 2_000, "insert"),
)
Row = tuple[str, ...]


def _drain(kind: str, count: int, options: tuple[str, ...], forget: Callable[[str], None]) -> Drained:
    forget(QUEUE)
    measure.client(sys.executable, APP, "fill", count, BENCH_KIND=kind)
    command = [sys.executable, "-W", "ignore", "-m", "amqtask", "-q", "-A", APP, "worker", *options]
    return measure.drain(command, count, BENCH_KIND=kind)


def rows(forget: Callable[[str], None], median: Callable[[Callable[[], Drained]], Drained]) -> list[Row]:
    """`forget` deletes a queue, `median` runs a measurement some times."""
    found: dict[tuple[str, str], Drained] = {}
    table: list[Row] = [("flow control", "tasks/s", "ratio", "CPU µs/task", "more than without")]
    for pool, options in POOLS.items():
        for name, kind, count, other in KINDS:
            run = median(lambda: _drain(kind, count, options, forget))  # noqa: B023 - called here
            found[pool, kind] = run
            ratio, more = "", ""
            if other:
                ratio = f"{run.per_second / found[pool, other].per_second:.2f}"
                more = f"{run.cpu_us - found[pool, other].cpu_us:+.0f}"
            row = (f"{name}, {' '.join(options)}", f"{run.per_second:,.0f}", ratio, f"{run.cpu_us:.0f}", more)
            print("  " + "  ".join(row), flush=True)
            table.append(row)
    return table

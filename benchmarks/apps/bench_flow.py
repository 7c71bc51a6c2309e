"""Ours, with options of flow control. BENCH_KIND is the task that fills the queue."""

import os
import sqlite3

from amqtask import AmqTask, Batch, BatchCall, Concurrency, Rate
from benchmarks.apps import clients, marks

app = AmqTask("bench_flow", flow_store=os.environ["AMQTASK_REDIS_URL"])
app.conf.task_default_queue = "bench_flow"


@app.task(name="bench.plain")
def plain(number: int) -> None:
    """Nothing."""


@app.task(name="bench.limited", limits=Concurrency(1000))
def limited(number: int) -> None:
    """Nothing, with a limit that it never meets."""


@app.task(name="bench.paced", limits=Rate("100000/s"))
def paced(number: int) -> None:
    """Nothing, with a rate that it never meets."""


@app.task(name="bench.batched", batch=Batch(size=100, seconds=0.2))
def batched(calls: list[BatchCall]) -> None:
    """Nothing, for a hundred calls."""


def _insert(rows: list[tuple[int]]) -> None:
    with sqlite3.connect(os.path.join(os.environ["BENCH_MARKS"], "rows"), timeout=60) as database:
        database.execute("CREATE TABLE IF NOT EXISTS rows (number INTEGER)")
        database.executemany("INSERT INTO rows VALUES (?)", rows)
    database.close()


@app.task(name="bench.insert")
def insert(number: int) -> None:
    """A row in a transaction of its own."""
    _insert([(number,)])


@app.task(name="bench.insert_batched", batch=Batch(size=100, seconds=0.2))
def insert_batched(calls: list[BatchCall]) -> None:
    """A row for each call, in one transaction."""
    _insert([(call.args[0],) for call in calls])


@app.task(name="bench.mark")
def mark(name: str) -> None:
    """Leave a time mark."""
    marks.mark(name)


def fill(count: int) -> None:
    """The queue to drain."""
    task = app.tasks[f"bench.{os.environ['BENCH_KIND']}"]
    calls = (task.signature((number,)) for number in range(count))
    app.publish_many([mark.s("first"), *calls, mark.s("last")])


if __name__ == "__main__":
    clients.main({"fill": fill})
    app.close()

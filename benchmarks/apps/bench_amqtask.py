"""Ours. BENCH_RESULTS=rpc:// for the measurements that need results."""

import os

from amqtask import AmqTask
from benchmarks.apps import clients, marks

app = AmqTask("bench", backend=os.environ.get("BENCH_RESULTS"))
app.conf.task_default_queue = os.environ.get("BENCH_QUEUE", "bench_amqtask")


@app.task(name="bench.noop")
def noop() -> None:
    """Nothing."""


@app.task(name="bench.noop_async")
async def noop_async() -> None:
    """Nothing, as a coroutine."""


@app.task(name="bench.mark")
def mark(name: str) -> None:
    """Leave a time mark."""
    marks.mark(name)


def fill(count: int) -> None:
    """The queue to drain."""
    task = noop_async if os.environ.get("BENCH_ASYNC") else noop
    app.publish_many([mark.s("first"), *(task.s() for _ in range(count)), mark.s("last")])


def publish_many(count: int) -> None:
    """Pipelined and confirmed."""
    app.publish_many([noop.s() for _ in range(count)])


def publish_pipeline(count: int) -> None:
    """A loop of delay() in a pipeline."""
    with app.pipeline():
        publish_each(count)


def publish_each(count: int) -> None:
    """One at a time, each confirmed."""
    for _ in range(count):
        noop.delay()


if __name__ == "__main__":
    clients.main(
        {
            "fill": fill,
            "roundtrip": lambda n: clients.roundtrip(lambda: noop.delay().get(timeout=10), n),
            "burst": lambda n: clients.burst(noop.delay, lambda result: result.get(timeout=60), n),
            "burst_pipeline": lambda n: clients.burst(
                noop.delay, lambda result: result.get(timeout=60), n, app.pipeline
            ),
            "pipeline": lambda n: clients.publishing(publish_pipeline, n),
            "publish_many": lambda n: clients.publishing(publish_many, n),
            "publish": lambda n: clients.publishing(publish_each, n),
        }
    )
    app.close()

"""Ours. BENCH_RESULTS=rpc:// for the measurements that need results."""

import os

from amqtask import AmqTask, chain, chord, group
from benchmarks.apps import clients, marks

app = AmqTask("bench", backend=os.environ.get("BENCH_RESULTS"))
app.conf.task_default_queue = os.environ.get("BENCH_QUEUE", "bench_amqtask")
if "BENCH_HISTORY" in os.environ:
    app.conf.update(task_history=True, history_queue="bench_history", history_max_bytes=200_000_000)
if "BENCH_QUEUE_TYPE" in os.environ:
    app.conf.task_default_queue_type = os.environ["BENCH_QUEUE_TYPE"]


@app.task(name="bench.noop")
def noop() -> None:
    """Nothing."""


@app.task(name="bench.noop_async")
async def noop_async() -> None:
    """Nothing, as a coroutine."""


@app.task(name="bench.same")
def same(value: object = None) -> object:
    """What it was given."""
    return value


@app.task(name="bench.count")
def count_all(values: list[object]) -> int:
    """How many there are."""
    return len(values)


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


def publish_delayed(count: int) -> None:
    """Tasks for the next hour, confirmed together."""
    with app.pipeline():
        for _ in range(count):
            noop.apply_async(countdown=3600)


def run_group(count: int) -> None:
    """From the call to all results."""
    found = group(noop.s() for _ in range(count)).apply_async().get(timeout=120)
    assert len(found) == count


def run_chord(count: int) -> None:
    """From the call to the body's result."""
    assert chord([same.s(1) for _ in range(count)], count_all.s()).apply_async().get(timeout=120) == count


def run_chain(count: int) -> None:
    """From the call to the last step's result."""
    assert chain(same.s(1), *(same.s() for _ in range(count - 1))).apply_async().get(timeout=120) == 1


if __name__ == "__main__":
    clients.main(
        {
            "fill": fill,
            "group": lambda n: clients.flow(run_group, n),
            "chord": lambda n: clients.flow(run_chord, n),
            "chain": lambda n: clients.flow(run_chain, n, 15),
            "roundtrip": lambda n: clients.roundtrip(lambda: noop.delay().get(timeout=10), n),
            "burst": lambda n: clients.burst(noop.delay, lambda result: result.get(timeout=60), n),
            "burst_pipeline": lambda n: clients.burst(
                noop.delay, lambda result: result.get(timeout=60), n, app.pipeline
            ),
            "pipeline": lambda n: clients.publishing(publish_pipeline, n),
            "publish_many": lambda n: clients.publishing(publish_many, n),
            "publish": lambda n: clients.publishing(publish_each, n),
            "delayed": publish_delayed,
        }
    )
    app.close()

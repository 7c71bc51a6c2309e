"""Celery, with its defaults; BENCH_RESULTS=rpc:// for the measurements that need results."""

import os

from celery import Celery, chain, chord, group

from benchmarks.apps import clients, marks

app = Celery("bench", broker=os.environ["AMQTASK_BROKER_URL"], backend=os.environ.get("BENCH_RESULTS"))
app.conf.task_default_queue = "bench_celery"
app.conf.task_ignore_result = not os.environ.get("BENCH_RESULTS")
app.conf.broker_connection_retry_on_startup = True


@app.task(name="bench.noop")
def noop() -> None:
    """Nothing."""


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
    mark.delay("first")
    publish(count)
    mark.delay("last")


def publish(count: int) -> None:
    """One at a time, unconfirmed: Celery's default."""
    for _ in range(count):
        noop.delay()


def publish_delayed(count: int) -> None:
    """Tasks for the next hour."""
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
            "publish": lambda n: clients.publishing(publish, n),
            "delayed": publish_delayed,
        }
    )

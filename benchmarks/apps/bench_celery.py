"""Celery, with its defaults; BENCH_RESULTS=rpc:// for the measurements that need results."""

import os

from celery import Celery

from benchmarks.apps import clients, marks

app = Celery("bench", broker=os.environ["AMQTASK_BROKER_URL"], backend=os.environ.get("BENCH_RESULTS"))
app.conf.task_default_queue = "bench_celery"
app.conf.task_ignore_result = not os.environ.get("BENCH_RESULTS")
app.conf.broker_connection_retry_on_startup = True


@app.task(name="bench.noop")
def noop() -> None:
    """Nothing."""


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


if __name__ == "__main__":
    clients.main(
        {
            "fill": fill,
            "roundtrip": lambda n: clients.roundtrip(lambda: noop.delay().get(timeout=10), n),
            "burst": lambda n: clients.burst(noop.delay, lambda result: result.get(timeout=60), n),
            "publish": lambda n: clients.publishing(publish, n),
        }
    )

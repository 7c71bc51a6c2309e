"""Dramatiq, with its defaults."""

import os

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker

from benchmarks.apps import clients, marks

dramatiq.set_broker(RabbitmqBroker(url=os.environ["AMQTASK_BROKER_URL"]))


@dramatiq.actor(queue_name="bench_dramatiq")
def noop() -> None:
    """Nothing."""


@dramatiq.actor(queue_name="bench_dramatiq")
def mark(name: str) -> None:
    """Leave a time mark."""
    marks.mark(name)


def fill(count: int) -> None:
    """The queue to drain."""
    mark.send("first")
    publish(count)
    mark.send("last")


def publish(count: int) -> None:
    """One at a time, unconfirmed: Dramatiq's default."""
    for _ in range(count):
        noop.send()


if __name__ == "__main__":
    clients.main({"fill": fill, "publish": lambda n: clients.publishing(publish, n)})

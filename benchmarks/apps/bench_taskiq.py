"""Taskiq on aio-pika, with its defaults."""

import asyncio
import os
from typing import Any

from taskiq_aio_pika import AioPikaBroker
from taskiq_aio_pika.queue import Queue

from benchmarks.apps import clients, marks

broker = AioPikaBroker(os.environ["AMQTASK_BROKER_URL"], task_queues=[Queue(name="bench_taskiq")])


@broker.task(task_name="bench.noop")
async def noop() -> None:
    """Nothing."""


@broker.task(task_name="bench.mark")
async def mark(name: str) -> None:
    """Leave a time mark."""
    marks.mark(name)


async def _with_broker(work: Any) -> None:
    await broker.startup()
    await work
    await broker.shutdown()


async def _fill(count: int) -> None:
    await mark.kiq("first")
    await _publish(count)
    await mark.kiq("last")


async def _publish(count: int) -> None:
    for _ in range(count):
        await noop.kiq()


def fill(count: int) -> None:
    """The queue to drain."""
    asyncio.run(_with_broker(_fill(count)))


if __name__ == "__main__":
    clients.main(
        {
            "fill": fill,
            "publish": lambda n: clients.publishing(lambda k: asyncio.run(_with_broker(_publish(k))), n),
        }
    )

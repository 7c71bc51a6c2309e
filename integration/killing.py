"""Workers that are killed at random for as long as a block runs."""

from __future__ import annotations

import os
import random
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from amqtask import AmqTask
from integration.waiting import PATIENT
from integration.workers import WorkerProcess

APP = "integration.apps.flows"
WORKERS = 2


class Fire(NamedTuple):
    """A client, and the processes that were killed so far."""

    app: AmqTask
    kills: list[int]


@contextmanager
def workers_under_fire(
    broker_url: str,
    backend: str,
    *,
    pause: tuple[float, float],
    delivery_limit: int,
    seed: int | None = None,
    chain_seconds: float = 0.1,
) -> Iterator[Fire]:
    """Two workers of four processes each with the tasks of integration.apps.flows, and a client whose calls they get.

    Every now and then (`pause` is the range of seconds in between) the main process of one is killed, its children die with
    it, and it is started again. At the end they are stopped.
    """
    queue = f"fire-{uuid.uuid4().hex[:8]}"
    environment = {
        "FLOWS_BACKEND": backend, "FLOWS_QUEUE": queue, "FLOWS_CHAIN_SECONDS": str(chain_seconds),
        "FLOWS_DELIVERY_LIMIT": str(delivery_limit), "AMQTASK_BROKER_URL": broker_url,
    }  # fmt: skip
    workers = [
        WorkerProcess(APP, "-Q", queue, "-P", "prefork", "-c", "4", "-n", f"w{number}@%h", environment=environment)
        for number in range(WORKERS)
    ]
    app = AmqTask("fire", broker=broker_url, backend=backend, **PATIENT)
    app.conf.task_default_queue = queue
    app.conf.task_delivery_limit = delivery_limit
    chance = random.Random(seed)
    is_over, kills = threading.Event(), []

    def kill_now_and_then() -> None:
        while not is_over.wait(chance.uniform(*pause)):
            worker = chance.choice(workers)
            os.kill(worker.pid, signal.SIGKILL)
            worker.process.wait()
            kills.append(worker.pid)
            worker.start(wait=False)

    with ExitStack() as stack:
        stack.callback(app.close)
        for worker in workers:
            stack.callback(worker.kill)
            worker.start()
        killer = threading.Thread(target=kill_now_and_then)
        killer.start()
        try:
            yield Fire(app, kills)
        finally:
            is_over.set()
            killer.join()
        for worker in workers:
            worker.stop()

"""Workers that are killed at random for as long as a block runs."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from integration.workers import WorkerProcess


@contextmanager
def killed_at_random(
    workers: Sequence[WorkerProcess], *, pause: tuple[float, float], seed: int | None = None
) -> Iterator[list[int]]:
    """Starts them; every now and then (`pause` is the range of seconds in between) the main process of one is killed, its
    children die with it, and it is started again. Yields the process ids that were killed; at the end all are stopped."""
    chance = random.Random(seed)
    for worker in workers:
        worker.start()
    is_over, kills = threading.Event(), []

    def kill_now_and_then() -> None:
        while not is_over.wait(chance.uniform(*pause)):
            worker = chance.choice(workers)
            os.kill(worker.pid, signal.SIGKILL)
            worker.process.wait()
            kills.append(worker.pid)
            worker.start(wait=False)

    killer = threading.Thread(target=kill_now_and_then)
    killer.start()
    try:
        yield kills
    finally:
        is_over.set()
        killer.join()
        for worker in workers:
            worker.stop()

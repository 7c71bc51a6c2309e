"""Delayed tasks wait in the broker: many with an ETA leave a worker's memory flat, and each runs soon after its ETA.

python -m integration.delayed [--tasks N] [--spread SECONDS] [--ahead SECONDS]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from amqtask import AmqTask
from integration.waiting import PATIENT
from integration.workers import WorkerProcess, eventually


@dataclass
class Lateness:
    """What came of one run; seconds and KiB."""

    tasks: int
    ran: int
    earliest: float
    p50: float
    p99: float
    latest: float
    memory_before: int
    memory_peak: int
    publishing: float

    def __str__(self) -> str:
        return (
            f"{self.ran}/{self.tasks} ran; after their ETA by p50 {self.p50:.3f} s, p99 {self.p99:.3f} s, at most "
            f"{self.latest:.3f} s (earliest {self.earliest:.3f} s); worker memory {self.memory_before} KiB before, "
            f"{self.memory_peak} KiB at most; published in {self.publishing:.1f} s"
        )


def memory(worker: WorkerProcess) -> int:
    """Proportional set size of the worker and its children, KiB."""
    total = 0
    for pid in [worker.pid, *worker.children]:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def run(broker: str, queue: str, *, tasks: int, ahead: float, spread: float) -> Lateness:
    """Publish `tasks` whose ETAs begin `ahead` seconds from now and spread over `spread` seconds."""
    file = Path(tempfile.mkstemp(prefix="amqtask-delayed-")[1])
    app = AmqTask("delayed", broker=broker, **PATIENT)
    app.conf.task_default_queue = queue
    environment = {"SOAK_FILE": str(file), "SOAK_QUEUE": queue, "AMQTASK_BROKER_URL": broker}
    options = ("-P", "prefork", "-c", "2")
    with WorkerProcess("integration.apps.numbered", *options, environment=environment) as worker:
        eventually(lambda: len(worker.children) == 2, what="no children")
        before = peak = memory(worker)
        started = time.time()
        first = started + ahead
        for begin in range(0, tasks, 5000):
            etas = [first + spread * n / tasks for n in range(begin, min(begin + 5000, tasks))]
            app.publish_many(
                [
                    app.signature("numbered.due", (begin + n, eta), eta=datetime.fromtimestamp(eta, timezone.utc))
                    for n, eta in enumerate(etas)
                ]
            )
            peak = max(peak, memory(worker))
        publishing = time.time() - started

        def all_ran() -> bool:
            nonlocal peak
            peak = max(peak, memory(worker))
            return file.read_bytes().count(b"\n") >= tasks

        eventually(all_ran, ahead + spread + 120, what="not all of them ran", every=0.5)
        worker.stop()
    app.close()
    late = sorted(float(line.split()[1]) for line in file.read_text().splitlines())
    numbers = {line.split()[0] for line in file.read_text().splitlines()}
    file.unlink()
    middle, high = late[len(late) // 2], late[int(len(late) * 0.99)]
    return Lateness(tasks, len(numbers), late[0], middle, high, late[-1], before, peak, publishing)


def main() -> int:
    """The full-size run; the exit code says whether the promise held."""
    parser = argparse.ArgumentParser(prog="python -m integration.delayed")
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--ahead", type=float, default=60.0)
    parser.add_argument("--spread", type=float, default=120.0)
    options = parser.parse_args()
    broker = os.environ["AMQTASK_BROKER_URL"]
    lateness = run(broker, f"delayed-{os.getpid()}", tasks=options.tasks, ahead=options.ahead, spread=options.spread)
    print(lateness, flush=True)
    kept = lateness.ran == lateness.tasks and lateness.earliest >= 0 and lateness.latest <= 1.0
    return 0 if kept and lateness.memory_peak < lateness.memory_before * 1.2 + 10_000 else 1


if __name__ == "__main__":
    sys.exit(main())

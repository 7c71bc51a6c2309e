"""Nothing lost: numbered tasks with default settings while something goes wrong; counts what ran, and what ran twice.

    python -m integration.soak [FAULT …] [--tasks N] [--pool NAME] [--root DIR]

The faults: `kill-worker` (SIGKILL of the main process, three times), `kill-children`, `close-connections` (from the
broker's side), `restart-broker`, `pause-worker` (15 s). `--root` is a folder with another RabbitMQ version in it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from amqtask import AmqTask
from amqtask.exceptions import PublishError
from integration.nodes import RabbitNode, apt_install, rabbitmq_installed
from integration.waiting import PATIENT
from integration.workers import WorkerProcess, eventually

APP = "integration.apps.numbered"
TASKS = 2000


@dataclass
class Report:
    """What came of one run."""

    fault: str
    tasks: int
    ran: int
    twice: int
    dead: int
    seconds: float

    @property
    def lost(self) -> int:
        """Tasks that never ran."""
        return self.tasks - self.ran

    def __str__(self) -> str:
        return (
            f"{self.fault:<18} {self.ran}/{self.tasks} ran, {self.lost} lost, {self.twice} ran more than once, "
            f"{self.dead} dead-lettered, {self.seconds:.1f} s"
        )


class Soak:
    """One broker, one worker, one file of what ran."""

    def __init__(self, node: RabbitNode, *, tasks: int = TASKS, pool: str = "prefork", concurrency: int = 4) -> None:
        self.node = node
        self.tasks = tasks
        self.file = Path(tempfile.mkstemp(prefix="amqtask-soak-")[1])
        self.queue = f"soak-{self.file.name}"
        self.app = AmqTask("soak", broker=node.url, **PATIENT)
        self.app.conf.task_default_queue = self.queue
        self.worker = WorkerProcess(
            APP, "-P", pool, "-c", str(concurrency),
            environment={"SOAK_FILE": str(self.file), "SOAK_QUEUE": self.queue, "AMQTASK_BROKER_URL": node.url},
        )  # fmt: skip

    def run(self, name: str, fault: Callable[[Soak], None]) -> Report:
        """Publish half before and half during the fault; wait until everything ran and nothing waits."""
        started = time.monotonic()
        self.publish(range(self.tasks // 2))
        # A daemon: when the test fails its broker goes, and nothing would ever be published again.
        producer = threading.Thread(target=self.publish, args=(range(self.tasks // 2, self.tasks),), daemon=True)
        with self.worker.start():
            producer.start()
            self.progress(self.tasks // 10)
            fault(self)
            producer.join()
            eventually(
                lambda: self.ran() >= self.tasks, 180, what=lambda: f"{self.ran()} of {self.tasks} ran", every=0.2
            )
            eventually(lambda: self.waiting(self.queue) == 0, 60, what="messages are left in the queue", every=0.5)
            self.worker.stop()
        counts = Counter(self.numbers())
        twice = sum(1 for count in counts.values() if count > 1)
        dead = self.waiting(f"{self.queue}.dead")
        self.app.close()
        self.file.unlink()
        return Report(name, self.tasks, len(counts), twice, dead, time.monotonic() - started)

    def publish(self, numbers: range) -> None:
        """As a careful producer does: again when `delay` says that it failed."""
        for number in numbers:
            while True:
                try:
                    self.app.send_task("numbered.record", (number,), queue=self.queue)
                    break
                except PublishError as error:
                    print(f"  publishing {number} again: {type(error).__name__}: {error}", flush=True)
                    time.sleep(0.2)

    def progress(self, more: int) -> None:
        """Wait until so many more have run."""
        goal = min(self.ran() + more, self.tasks)
        eventually(lambda: self.ran() >= goal, 120, what=lambda: f"only {self.ran()} of {self.tasks} ran")

    def numbers(self) -> list[int]:
        """What ran, in order."""
        return [int(line.split()[0]) for line in self.file.read_text().splitlines()]

    def ran(self) -> int:
        """How many different tasks ran."""
        return len(set(self.numbers()))

    def waiting(self, queue: str) -> int:
        """Messages in a queue, delivered ones included."""
        for line in self.node.ctl("list_queues", "name", "messages").splitlines():
            name, _, count = line.partition("\t")
            if name == queue:
                return int(count)
        return 0


def kill_worker(soak: Soak) -> None:
    """SIGKILL of the main process (its children notice and go), three times."""
    for _ in range(3):
        soak.worker.signal(signal.SIGKILL)
        soak.worker.wait()
        soak.worker.start()
        soak.progress(soak.tasks // 10)


def kill_children(soak: Soak) -> None:
    """SIGKILL of one child after the other."""
    for _ in range(10):
        children = soak.worker.children
        if children:
            with suppress(ProcessLookupError):  # the one that was killed before, buried since
                os.kill(children[-1], signal.SIGKILL)
        soak.progress(soak.tasks // 25)


def close_connections(soak: Soak) -> None:
    """Everybody's connections, from the broker's side."""
    for _ in range(3):
        soak.node.ctl("close_all_connections", "soak")
        soak.progress(soak.tasks // 10)


def restart_broker(soak: Soak) -> None:
    """An orderly stop and a start; connections are refused in between."""
    soak.node.stop()
    soak.node.start()


def pause_worker(soak: Soak) -> None:
    """The machine swaps, the virtual machine is migrated: nothing moves for 15 s."""
    soak.worker.signal(signal.SIGSTOP)
    time.sleep(15)  # the fault itself, not a synchronisation
    soak.worker.signal(signal.SIGCONT)


FAULTS: dict[str, Callable[[Soak], None]] = {
    "kill-worker": kill_worker,
    "kill-children": kill_children,
    "close-connections": close_connections,
    "restart-broker": restart_broker,
    "pause-worker": pause_worker,
}


def main() -> int:
    """Run the faults asked for (all by default); the exit code says whether nothing was lost."""
    parser = argparse.ArgumentParser(prog="python -m integration.soak")
    parser.add_argument("faults", nargs="*", choices=[*FAULTS, []])
    parser.add_argument("--tasks", type=int, default=TASKS)
    parser.add_argument("--pool", default="prefork")
    parser.add_argument("--root", default="", help="a folder (chroot) with another RabbitMQ version")
    options = parser.parse_args()
    if not options.root and not rabbitmq_installed():
        apt_install("rabbitmq-server")
    with ExitStack() as stack:
        node = RabbitNode(root=options.root)
        stack.callback(node.remove)
        node.start()
        lost = 0
        for name in options.faults or FAULTS:
            report = Soak(node, tasks=options.tasks, pool=options.pool).run(name, FAULTS[name])
            print(report, flush=True)
            lost += report.lost
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())

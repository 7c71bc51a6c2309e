"""Dead letters go back to work while everything is killed: none is lost.

    python -m integration.redrive [--tasks N] [--kills N] [--rate N] [--seed N]

N dead letters wait in one queue. The console is asked to send all of them back to work, again and again until there is none,
while the console, the worker that runs the tasks, and the broker are killed (SIGKILL) in turn and started again. In the end the
tasks that ran are counted: each has left a line in a file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import socket
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from amqtask import AmqTask
from amqtask.exceptions import AmqTaskError
from amqtask.protocol.message import Message
from amqtask.services.rerunning import REASON
from amqtask.worker.finisher import copied_properties
from integration.machine import free_port
from integration.nodes import RabbitNode
from integration.outbox import Program, broker
from integration.waiting import PATIENT, Patience, eventually

if TYPE_CHECKING:
    from amqtask.protocol.message import Delivery

TASKS, KILLS = 10_000, 30
# Until the rest is lost.
SECONDS = 1200.0
MODULE = "integration.apps.numbered"


@dataclass(frozen=True)
class Report:
    """What came of one run."""

    tasks: int
    lost: int
    twice: int
    left: int
    orders: int
    kills: Counter[str]
    seconds: float

    @property
    def is_right(self) -> bool:
        """Whether all of them ran."""
        return not (self.lost or self.left)

    def __str__(self) -> str:
        kills = ", ".join(f"{name} {number}" for name, number in sorted(self.kills.items()))
        return (
            f"{self.tasks} dead letters: {self.lost} lost, {self.twice} ran twice or more, {self.left} left; "
            f"{self.orders} orders to the console; killed: {kills}; {self.seconds:.0f} s"
        )


class Run:
    """One queue of dead letters."""

    def __init__(
        self,
        url: str,
        *,
        node: RabbitNode | None,
        queue: str | None,
        tasks: int,
        kills: int,
        rate: float | None,
        seed: int,
    ) -> None:
        self._url = url
        self._node = node
        self._tasks = tasks
        self._most_kills = kills
        self._rate = rate
        self._chance = random.Random(seed)
        self._folder = Path(tempfile.mkdtemp(prefix="amqtask-redrive-"))
        self._queue = queue or f"redrive-{uuid.uuid4().hex[:8]}"
        self._port = free_port()
        self._file = self._folder / "ran"
        self._file.touch()
        environment = {
            "AMQTASK_BROKER_URL": url, "SOAK_QUEUE": self._queue, "SOAK_FILE": str(self._file),
            "SOAK_HISTORY": f"sqlite:///{self._folder}/index.sqlite3",
        }  # fmt: skip
        amqtask = ["-m", "amqtask", "-A", MODULE]
        self._console = Program(
            "console", [*amqtask, "console", "--no-index", "-p", str(self._port)], environment, self._folder
        )
        self._worker = Program(
            "worker", [*amqtask, "worker", "-Q", self._queue, "-c", "2", "-l", "WARNING"], environment, self._folder
        )
        self._kills: Counter[str] = Counter()
        self._orders = 0
        self._over = threading.Event()

    def run(self) -> Report:
        """Raises: NeverHappened."""
        self._bury()
        if self._node is not None:
            self._node.settle()
        began = time.monotonic()
        with ExitStack() as stack:
            for program in (self._console, self._worker):
                stack.callback(program.kill)
                program.start()
            killer = threading.Thread(target=self._hurt)
            stack.callback(killer.join)
            stack.callback(self._over.set)
            eventually(self._listens, what=lambda: self._console.log)
            killer.start()
            # A queue whose broker has just started, or whose messages a killed console had, may look empty.
            patience = Patience(SECONDS)
            while not patience.is_over and len(self._ran()) < self._tasks:
                if self._left() == 0:
                    time.sleep(0.5)
                else:
                    self._order()
            self._over.set()
            killer.join()
        ran = self._ran()
        twice = sum(1 for number in ran.values() if number > 1)
        left = self._left() or 0
        shutil.rmtree(self._folder)
        return Report(
            self._tasks, self._tasks - len(ran) - left, twice, left, self._orders, self._kills, time.monotonic() - began
        )

    def _bury(self) -> None:
        """As many dead letters as there are to be: calls that are moved to the dead-letter queue."""
        app = AmqTask("client", broker=self._url, **PATIENT, set_as_current=False)
        app.conf.task_default_queue = self._queue
        declare = app.queues.declarations(app.queues[self._queue])

        def buried(delivery: Delivery) -> Message:
            properties = copied_properties(delivery.properties)
            properties = replace(properties, headers={**properties.headers, REASON: "it was broken"})
            return Message(delivery.body, properties, "", f"{self._queue}.dead", declare)

        with app.pipeline():
            for number in range(self._tasks):
                app.send_task("numbered.record", (number, 0.0))
        with app.broker.admin() as admin:
            assert admin.move(self._queue, app.publisher, buried).moved == self._tasks
        app.close()

    def _left(self) -> int | None:
        """Dead letters; None while the broker is away."""
        app = AmqTask("client", broker=self._url, set_as_current=False)
        try:
            with app.broker.admin() as admin:
                return admin.count(f"{self._queue}.dead")
        except AmqTaskError:
            time.sleep(0.1)
            return None
        finally:
            app.close()

    def _order(self) -> None:
        fields = {"queue": f"{self._queue}.dead", "all": "yes"}
        if self._rate is not None:
            fields["rate"] = str(self._rate)
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}/api/do/retry-dead",
            json.dumps(fields).encode(),
            {"Content-Type": "application/json"},
        )
        if not self._listens():
            time.sleep(0.05)
            return
        self._orders += 1
        try:
            urllib.request.urlopen(request, timeout=120).close()
        except OSError:  # the console was killed, or says that the broker is away
            time.sleep(0.05)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    def _hurt(self) -> None:
        """Kill each in turn, in the middle of the work, until it is over; at the end all of them are there."""
        victims: list[Program | RabbitNode] = [self._console, self._worker]
        victims += [] if self._node is None else [self._node]
        for victim in itertools.islice(itertools.cycle(victims), self._most_kills):
            # So many more have run first, or nothing gets on any more.
            next_one = len(self._ran()) + self._chance.randint(1, max(1, self._tasks // self._most_kills))
            patience = Patience(20.0)
            while len(self._ran()) < next_one and not patience.is_over:
                if self._over.wait(0.02):
                    return
            if self._over.is_set():
                return
            if isinstance(victim, RabbitNode):
                victim.kill()
                self._kills["broker"] += 1
                victim.start()
            elif victim.kill():
                self._kills[victim.name] += 1
                victim.start()

    def _ran(self) -> Counter[int]:
        return Counter(int(line.split()[0]) for line in self._file.read_text().splitlines() if line)


def run(
    url: str,
    *,
    node: RabbitNode | None = None,
    queue: str | None = None,
    tasks: int = TASKS,
    kills: int = KILLS,
    rate: float | None = None,
    seed: int = 1,
) -> Report:
    """One run on a broker; `node` is that broker if it may be hurt."""
    return Run(url, node=node, queue=queue, tasks=tasks, kills=kills, rate=rate, seed=seed).run()


def main() -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m integration.redrive")
    parser.add_argument("--tasks", type=int, default=TASKS)
    parser.add_argument("--kills", type=int, default=KILLS, help="at most")
    parser.add_argument("--rate", type=float, help="tasks a second")
    parser.add_argument("--seed", type=int, default=random.randrange(1000))
    options = parser.parse_args()
    with broker() as node:
        report = run(
            node.url, node=node, tasks=options.tasks, kills=options.kills, rate=options.rate, seed=options.seed
        )
    print(f"{report} (seed {options.seed})", flush=True)
    return 0 if report.is_right else 1


if __name__ == "__main__":
    sys.exit(main())

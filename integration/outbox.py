"""The outbox while everything is killed: committed = sent, rolled back = not sent.

    python -m integration.outbox [django] [sqlalchemy] [--tasks N] [--seed N]

A web process commits N orders and rolls N back on PostgreSQL, each with a call in the same transaction; two relays
(`amqtask relay`, and `amqtask worker --relay`) publish. Meanwhile the web process, the relays, the broker and the database are
killed (SIGKILL) again and again, at random moments, and started again. In the end the messages in the queue are compared
with the orders in the database: what a killed client does not know, the database does.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pika

from integration.apps.outbox_journal import Journal
from integration.nodes import RabbitNode
from integration.servers import Postgres, PostgresServer, postgres_programs
from integration.workers import ROOT, eventually

TASKS = 1000
SHOPS = {"django": "integration.apps.outbox_django", "sqlalchemy": "integration.apps.outbox_sqlalchemy"}
# Seconds to the first kill of broker and database, so that a short run has one of each.
SOON = (0.5, 3.0)


class Program:
    """A process that is killed and started again."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], folder: Path) -> None:
        self.name = name
        self._command = [sys.executable, *command]
        self._environment = {**os.environ, **environment, "PYTHONUNBUFFERED": "1"}
        self._log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it may be running already."""
        if self._process is None or self._process.poll() is not None:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._command, cwd=ROOT, env=self._environment, stdout=log, stderr=log, start_new_session=True
                )

    def kill(self) -> bool:
        """SIGKILL; whether it was still running."""
        process = self._process
        if process is None or process.poll() is not None:
            return False
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        assert self._process is not None, "not started"
        return self._process.poll()

    @property
    def log(self) -> str:
        """The end of what it printed."""
        return self._log.read_text(errors="replace")[-4000:]


@dataclass
class Report:
    """What came of one run."""

    shop: str
    known_commits: int
    known_rollbacks: int
    unknown: int
    committed: int
    sent: int
    twice: int
    lost: int
    rolled_back_sent: int
    kills: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def is_right(self) -> bool:
        """Whether what is sent is what is committed."""
        return self.lost == 0 and self.rolled_back_sent == 0 and self.sent == self.committed

    def __str__(self) -> str:
        kills = ", ".join(f"{name} {count}" for name, count in sorted(self.kills.items()))
        return (
            f"{self.shop:<10} {self.known_commits} commits and {self.known_rollbacks} rollbacks known to the client, "
            f"{self.unknown} not; {self.committed} orders in the database, {self.sent} of them sent ({self.twice} more than "
            f"once), {self.lost} lost, {self.rolled_back_sent} sent without an order; killed: {kills}; {self.seconds:.0f} s"
        )


class Run:
    """One shop, one database, one broker."""

    def __init__(
        self, shop: str, node: RabbitNode, server: PostgresServer, database: str, *, tasks: int, seed: int, pause: float
    ) -> None:
        self.shop = shop
        self.node = node
        self.server = server
        self._tasks = tasks
        self._random = random.Random(seed)
        # Each thread has its own, so that one seed is one run.
        self._chances = [random.Random(self._random.random()) for _ in range(2)]
        self.folder = Path(tempfile.mkdtemp(prefix="amqtask-outbox-"))
        self.journal = Journal(self.folder / "journal")
        # What an earlier run's relay published last may still be on its way.
        self._queue = f"shop-{uuid.uuid4().hex[:8]}"
        self._environment = {
            "SHOP_DATABASE": database, "SHOP_QUEUE": self._queue, "AMQTASK_BROKER_URL": node.url, "DJANGO_SETTINGS_MODULE": "",
        }  # fmt: skip
        module = SHOPS[shop]
        told = [module, str(self.folder / "journal"), str(tasks), str(pause)]
        self.web = self._program("web", ["-m", "integration.apps.outbox_web", *told])
        amqtask = ["-m", "amqtask", "-A", module]
        self.relays = [
            self._program("relay", [*amqtask, "relay", "--interval", "0.1", "--batch", "20"]),
            self._program("worker", [*amqtask, "worker", "-Q", "idle", "-P", "solo", "--relay", "-l", "INFO"]),
        ]
        self.kills: Counter[str] = Counter()
        # Ends of the web process that no outage of the database explains; and whether there was one since its start.
        self._crashes = 0
        self._state = threading.Lock()
        self._is_away = False
        self._outages = self._outages_at_start = 0
        self._over = threading.Event()

    def _program(self, name: str, command: list[str]) -> Program:
        return Program(name, command, self._environment, self.folder)

    def run(self) -> Report:
        """Raises: NeverHappened."""
        started = time.monotonic()
        module = SHOPS[self.shop]
        self._python(f"import {module} as shop; shop.prepare()")
        # Otherwise the first kill may come so soon after a queue's declaration that RabbitMQ forgets it.
        self._amqtask("topology", "declare", "-Q", f"{self._queue},idle")
        self.node.settle()
        programs = [self.web, *self.relays]
        others = [threading.Thread(target=hurt) for hurt in (self._hurt_broker, self._hurt_database)]
        with ExitStack() as stack:
            for program in programs:
                stack.callback(program.kill)
                program.start()
            for other in others:
                stack.callback(other.join)
            stack.callback(self._over.set)
            for other in others:
                other.start()
            for program in self._victims(programs):
                if not self._is_running():
                    break
                self._hurt(program)
                time.sleep(self._random.uniform(0.2, 1.5))
            self._over.set()
            for other in others:
                other.join()
            for relay in self.relays:
                relay.start()
            eventually(
                lambda: self._waiting() == 0, 120, what=lambda: f"rows are left:\n{self.relays[0].log}", every=0.5
            )
        report = self._report(time.monotonic() - started)
        shutil.rmtree(self.folder)
        return report

    def _is_running(self) -> bool:
        code = self.web.exit_code
        if code in (None, 0):
            return code is None
        # Its database was killed, as a rule. It is started again as its supervisor would.
        with self._state:
            was_there = not self._is_away and self._outages == self._outages_at_start
            self._outages_at_start = -1 if self._is_away else self._outages
        self._crashes += was_there
        assert self._crashes <= 2, f"the web process ended with {code}:\n{self.web.log}"
        self.web.start()
        return True

    def _victims(self, programs: list[Program]) -> Iterator[Program]:
        """For ever, in any order; each has its turn among the first."""
        while True:
            yield from self._random.sample(programs, len(programs))

    def _hurt(self, program: Program) -> None:
        if program.kill():
            self.kills[program.name] += 1
            program.start()

    def _hurt_broker(self) -> None:
        chance = self._chances[0]
        pause = chance.uniform(*SOON)
        while not self._over.wait(pause):
            self.node.kill()
            self.kills["broker"] += 1
            self._over.wait(chance.uniform(0.0, 2.0))
            self.node.start()
            pause = chance.uniform(2.0, 6.0)

    def _hurt_database(self) -> None:
        chance = self._chances[1]
        pause = chance.uniform(*SOON)
        while not self._over.wait(pause):
            with self._state:
                self._is_away = True
                self._outages += 1
            self.server.kill()
            self.kills["database"] += 1
            self._over.wait(chance.uniform(0.0, 1.0))
            self.server.start()
            with self._state:
                self._is_away = False
            pause = chance.uniform(3.0, 10.0)

    # -- what came of it

    def _amqtask(self, *words: str) -> str:
        return self._run("-m", "amqtask", "-A", SHOPS[self.shop], *words)

    def _python(self, code: str) -> str:
        return self._run("-c", code)

    def _run(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env={**os.environ, **self._environment}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _waiting(self) -> int:
        """Rows in the outbox."""
        return int(self._python(f"import {SHOPS[self.shop]} as shop; print(shop.app.outbox.store().waiting().rows)"))

    def _sent(self) -> list[str]:
        """The ids of all messages in the queue."""
        found = []
        with pika.BlockingConnection(pika.URLParameters(self.node.url)) as connection:
            channel = connection.channel()
            while (taken := channel.basic_get(self._queue, auto_ack=True))[0] is not None:
                found.append(taken[1].headers["id"])
        return found

    def _report(self, seconds: float) -> Report:
        code = f"import {SHOPS[self.shop]} as shop; print(*sorted(shop.ordered()))"
        committed = set(self._python(code).split())
        journal = self.journal
        known = journal.ids("ended", "commit")
        rolled_back = journal.ids("ended", "rollback", "fail")
        begun = journal.ids("begun", "commit", "rollback", "fail")
        assert known <= committed, f"the database lost {len(known - committed)} commits"
        assert not rolled_back & committed
        counts = Counter(self._sent())
        return Report(
            self.shop,
            known_commits=len(known),
            known_rollbacks=len(rolled_back),
            unknown=len(begun - known - rolled_back),
            committed=len(committed),
            sent=len(set(counts) & committed),
            twice=sum(1 for count in counts.values() if count > 1),
            lost=len(committed - set(counts)),
            rolled_back_sent=len(set(counts) - committed),
            kills=self.kills,
            seconds=seconds,
        )


def run(shop: str, node: RabbitNode, server: PostgresServer, *, tasks: int, seed: int, pause: float = 0.02) -> Report:
    """One run on a database of its own."""
    programs = postgres_programs()
    postgres = Postgres(server.url, f"{programs}/psql")
    database = postgres.create_database()
    # The server of the tests answers a commit before it is written, which a kill would show.
    postgres.execute(f"ALTER DATABASE {urlsplit(database).path[1:]} SET synchronous_commit = on")
    return Run(shop, node, server, database, tasks=tasks, seed=seed, pause=pause).run()


@contextmanager
def database_server() -> Iterator[PostgresServer]:
    """A PostgreSQL that may be killed."""
    server = PostgresServer(postgres_programs())
    try:
        yield server.start()
    finally:
        server.remove()


@contextmanager
def broker() -> Iterator[RabbitNode]:
    """A node that may be killed."""
    node = RabbitNode("outbox")
    try:
        yield node.start()
    finally:
        node.remove()


def main() -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m integration.outbox")
    parser.add_argument("shops", nargs="*", metavar="SHOP", help=f"of {', '.join(SHOPS)} [all]")
    parser.add_argument("--tasks", type=int, default=TASKS)
    parser.add_argument("--seed", type=int, default=random.randrange(1000))
    options = parser.parse_args()
    if strange := set(options.shops) - set(SHOPS):
        parser.error(f"there is no {', '.join(sorted(strange))}")
    is_right = True
    with database_server() as server, broker() as node:
        for shop in options.shops or SHOPS:
            report = run(shop, node, server, tasks=options.tasks, seed=options.seed)
            print(f"{report} (seed {options.seed})", flush=True)
            is_right = is_right and report.is_right
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())

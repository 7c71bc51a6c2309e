"""Nothing lost on Redis: numbered tasks (plain, delayed, retried, chains) while something goes wrong; counts how often each ran.

    python -m integration.redis_faults [TASKS] [FAULT …]
    python -m integration.redis_faults long [SECONDS]

Two workers (`prefork`, two slots each) and a producer run while it happens. `twice` is explained by what a run was told: its
message was redelivered (held by a process that died, or acknowledged to a Redis that lost that), or a call was published again
because its confirm was lost. What is explained by neither is a failure, as is each task that was accepted and did not run.

`long`: a task and an ETA of ten minutes (SECONDS) with leases of 30 s, each of which must run once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from amqtask import AmqTask, chain
from amqtask.exceptions import PublishError
from integration import celery_peer
from integration.celery_peer import CeleryWorker
from integration.servers import RedisServer, redis_sentinel
from integration.waiting import PATIENT, eventually
from integration.workers import WorkerProcess

APP = "integration.apps.staged"
TASKS = 2000
# Of ten tasks seven are plain; each number has these stages.
STAGES = {
    "plain": ("once",),
    "delayed": ("later",),
    "retried": ("try-0", "try-1"),
    "chained": ("step-0", "step-1", "step-2"),
}
KINDS = ("plain", "plain", "delayed", "plain", "retried", "plain", "plain", "chained", "plain", "plain")
PATIENCE = 240.0


@dataclass
class Report:
    """What came of one fault."""

    fault: str
    tasks: int
    refused: int = 0
    runs: int = 0
    lost: list[str] = field(default_factory=list)
    redelivered: int = 0
    published_twice: int = 0
    unexplained: list[str] = field(default_factory=list)
    dead: int = 0
    seconds: float = 0.0

    COLUMNS = (
        "fault", "tasks", "calls refused", "runs", "lost", "again: redelivered", "again: published twice", "unexplained",
        "dead letters", "seconds",
    )  # fmt: skip
    HEAD = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}"

    def __str__(self) -> str:
        cells = (
            self.fault, self.tasks, self.refused, self.runs, len(self.lost), self.redelivered, self.published_twice,
            len(self.unexplained), self.dead, f"{self.seconds:.0f}",
        )  # fmt: skip
        return f"| {' | '.join(map(str, cells))} |"


class Trial:
    """A Redis, two workers, a producer, and a file of what ran."""

    def __init__(self, url: str, server: RedisServer, *, tasks: int = TASKS, master: str = "") -> None:
        self.server = server
        self.tasks = tasks
        self.file = Path(tempfile.mkstemp(prefix="amqtask-staged-")[1])
        self.queue = f"staged-{self.file.name}"
        self.environment = {
            "AMQTASK_BROKER_URL": url, "STAGED_FILE": str(self.file), "STAGED_QUEUE": self.queue, "STAGED_MASTER": master,
        }  # fmt: skip
        self.app = AmqTask("producer", broker=url, set_as_current=False, **PATIENT)
        self.app.conf.task_default_queue = self.queue
        if master:
            self.app.conf.broker_transport_options = {"master_name": master}
        self.workers = [self.worker(number) for number in range(2)]
        self.accepted: set[int] = set()
        self.refused = 0

    def worker(self, number: int, *options: str) -> WorkerProcess:
        """Not started."""
        return WorkerProcess(
            APP, "-c", "2", "-Q", self.queue, "-n", f"{number}-{self.file.name}@%h", *options,
            environment=self.environment,
        )  # fmt: skip

    @property
    def client(self) -> Any:
        """Redis as an operator sees it."""
        return redis.Redis.from_url(self.server.url)

    def run(self, name: str, fault: Callable[[Trial], contextlib.AbstractContextManager[None]]) -> Report:
        """Publish half before and half during the fault; wait until everything ran and nothing waits."""
        began = time.monotonic()
        self.publish(range(self.tasks // 2))
        producer = threading.Thread(target=self.publish, args=(range(self.tasks // 2, self.tasks),), daemon=True)
        with ExitStack() as stack:
            for worker in self.workers:
                stack.callback(worker.kill)
                worker.start(wait=False)
            eventually(lambda: len(self.runs()) > self.tasks // 20, 120, what="no task runs")
            producer.start()
            with fault(self):
                producer.join()
            with contextlib.suppress(AssertionError):  # counted below
                eventually(self.is_over, PATIENCE, every=0.5)
            for worker in self.workers:
                worker.stop()
            report = self.report(name)
        report.seconds = time.monotonic() - began
        self.app.close()
        self.file.unlink()
        return report

    def publish(self, numbers: range) -> None:
        """As a careful producer does: again when the call says that it failed."""
        for number in numbers:
            while True:
                try:
                    self.call(number)
                    break
                except PublishError:
                    self.refused += 1
                    time.sleep(0.2)
            self.accepted.add(number)

    def call(self, number: int) -> None:
        """One number, of its kind."""
        run = self.app.signature("staged.run")
        match KINDS[number % 10]:
            case "plain":
                run.clone((number, "once")).apply_async()
            case "delayed":
                run.clone((number, "later")).apply_async(countdown=1.0 + number % 3)
            case "retried":
                self.app.send_task("staged.again", (number,))
            case _:
                steps = [
                    self.app.signature("staged.run", (number, f"step-{step}"), immutable=True) for step in range(3)
                ]
                chain(*steps).apply_async()

    # -- counting

    def runs(self) -> list[list[str]]:
        """Number, stage, id, redelivered, whose, of each run."""
        return [line.split() for line in self.file.read_text().splitlines()]

    def wanted(self) -> set[tuple[str, str]]:
        """What must run at least once."""
        return {(str(number), stage) for number in self.accepted for stage in STAGES[KINDS[number % 10]]}

    def is_over(self) -> bool:
        """Whether everything has run and been acknowledged."""
        done = {(number, stage) for number, stage, *_ in self.runs()}
        try:
            waiting = self.client.llen(self.queue) + self.client.hlen("unacked") + self.client.zcard("amqtask.delay")
        except redis.RedisError:
            return False
        return self.wanted() <= done and not waiting

    def report(self, name: str) -> Report:
        """Count it."""
        runs = self.runs()
        by_stage: dict[tuple[str, str], list[list[str]]] = defaultdict(list)
        for run in runs:
            by_stage[run[0], run[1]].append(run)
        found = Report(name, self.tasks, self.refused, len(runs))
        found.lost = [" ".join(each) for each in sorted(self.wanted() - set(by_stage))]
        for stage, several in by_stage.items():
            ids = Counter(run[2] for run in several)
            extra = len(several) - 1
            again = sum(run[3] == "1" for run in several)
            # The same call with another id: its caller was told that it failed. With the same id: the publisher sent it again,
            # because the connection ended before the confirm came; that happens to a message once. What follows comes twice, too.
            twice = max(len(ids) - 1, int(extra - again == 1))
            found.redelivered += min(extra, again)
            found.published_twice += min(extra - min(extra, again), twice)
            if extra > again + twice:
                found.unexplained.append(" ".join(stage))
        with contextlib.suppress(redis.RedisError):
            found.dead = self.client.llen(f"{self.queue}.dead")
        return found


# -- the faults: each is over when its block is left, or goes on until then


@contextlib.contextmanager
def kill_main(trial: Trial) -> Iterator[None]:
    """SIGKILL of a worker's main process, three times."""
    for number in range(3):
        victim = trial.workers[number % 2]
        progress(trial)
        victim.signal(signal.SIGKILL)
        victim.wait()
        victim.start()
    yield


@contextlib.contextmanager
def kill_children(trial: Trial) -> Iterator[None]:
    """SIGKILL of all processes of both workers' pools, three times."""
    for _ in range(3):
        progress(trial)
        for child in [child for worker in trial.workers for child in worker.children]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    yield


@contextlib.contextmanager
def kill_clients(trial: Trial) -> Iterator[None]:
    """CLIENT KILL of everybody, until all calls are made."""
    over = threading.Event()

    def go_on() -> None:
        while not over.wait(0.3):
            trial.client.client_kill_filter(_type="normal", skipme=True)

    killer = threading.Thread(target=go_on, daemon=True)
    killer.start()
    yield
    over.set()
    killer.join()


@contextlib.contextmanager
def restart(trial: Trial) -> Iterator[None]:
    """SIGKILL of Redis, which comes back with its append-only file, twice."""
    for _ in range(2):
        progress(trial)
        trial.server.kill()
        trial.server.start()
    yield


@contextlib.contextmanager
def pause(trial: Trial) -> Iterator[None]:
    """Redis stands still for 15 s."""
    progress(trial)
    assert trial.server.pid is not None
    os.kill(trial.server.pid, signal.SIGSTOP)
    time.sleep(15)  # the fault itself
    os.kill(trial.server.pid, signal.SIGCONT)
    yield


@contextlib.contextmanager
def memory(trial: Trial) -> Iterator[None]:
    """No memory for 10 s."""
    progress(trial)
    trial.client.config_set("maxmemory", "1")
    time.sleep(10)  # the fault itself
    trial.client.config_set("maxmemory", "0")
    yield


@contextlib.contextmanager
def failover(trial: Trial) -> Iterator[None]:
    """SIGKILL of the master; the sentinel promotes its replica."""
    progress(trial)
    trial.server.kill()
    yield


@contextlib.contextmanager
def celery(trial: Trial) -> Iterator[None]:
    """A Celery worker on the same queue; and one of ours is killed."""
    environment = {**trial.environment, "STAGED_CELERY": "1"}
    python_path = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    with CeleryWorker({**os.environ, **environment, **python_path}, trial.queue, app=APP):
        progress(trial)
        trial.workers[0].signal(signal.SIGKILL)
        trial.workers[0].wait()
        trial.workers[0].start()
        yield
        with contextlib.suppress(AssertionError):  # counted later
            eventually(trial.is_over, PATIENCE, every=0.5)


def progress(trial: Trial) -> None:
    """Some more have run."""
    goal = min(len(trial.runs()) + trial.tasks // 10, trial.tasks)
    eventually(lambda: len(trial.runs()) >= goal, 120, what=lambda: f"only {len(trial.runs())} runs")


Fault = Callable[[Trial], contextlib.AbstractContextManager[None]]
FAULTS: dict[str, Fault] = {
    "main process killed": kill_main,
    "children killed": kill_children,
    "all clients killed": kill_clients,
    "Redis restarted": restart,
    "Redis paused 15 s": pause,
    "memory limit hit": memory,
    "failover by Sentinel": failover,
    "beside Celery's workers": celery,
}
# What may be lost there is what the replica did not have: it is counted, and said in docs/redis.md.
MAY_LOSE = frozenset({"failover by Sentinel"})


def run_fault(name: str, tasks: int) -> Report:
    """On servers of its own."""
    fault = FAULTS[name]
    if fault is failover:
        with redis_sentinel() as sentinel:
            trial = Trial(sentinel.url, sentinel.master, tasks=tasks, master=sentinel.master_name)
            before = trial.server
            trial.server = before

            @contextlib.contextmanager
            def follow(trial: Trial) -> Iterator[None]:
                with failover(trial):
                    trial.server = sentinel.replica
                    yield

            return trial.run(name, follow)
    server = RedisServer("--appendonly", "yes", "--appendfsync", "always")
    try:
        server.start()
        return Trial(server.url, server, tasks=tasks).run(name, fault)
    finally:
        server.remove()


def run_long(seconds: float, lease: float | None = None) -> Counter[str]:
    """How often a task that takes so long ran, and one whose ETA is so far away; two workers are there all the time."""
    server = RedisServer("--appendonly", "yes")
    with ExitStack() as stack:
        stack.callback(server.remove)
        server.start()
        trial = Trial(server.url, server)
        if lease is not None:
            trial.environment["STAGED_LEASE"] = str(lease)
        for worker in trial.workers:
            stack.callback(worker.kill)
            worker.start()
        run = trial.app.signature("staged.run")
        run.clone((1, "long", seconds)).apply_async()
        run.clone((2, "later")).apply_async(countdown=seconds)
        eventually(lambda: len(trial.runs()) >= 2, seconds + 120, every=1.0)
        eventually(lambda: not trial.client.hlen("unacked"), 60, every=0.5)
        trial.app.close()
        return Counter(stage for _, stage, *_ in trial.runs())


def main() -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m integration.redis_faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tasks", nargs="?", default=str(TASKS), help="how many, or `long`")
    parser.add_argument("faults", nargs="*")
    options = parser.parse_args()
    if options.tasks == "long":
        found = run_long(float(next(iter(options.faults), 600)))
        print(f"runs: {dict(found)}")
        return int(found != Counter(long=1, later=1))
    chosen = [name for name in FAULTS if not options.faults or any(word in name for word in options.faults)]
    if any(FAULTS[name] is celery for name in chosen):
        celery_peer.python()  # installed now, not while it is measured
    reports = []
    for name in chosen:
        reports.append(run_fault(name, int(options.tasks)))
        print(f"{Report.HEAD}\n{reports[-1]}", flush=True)
        for what in ("lost", "unexplained"):
            several: list[str] = getattr(reports[-1], what)
            if several:
                print(f"  {what}: {', '.join(several[:20])}", flush=True)
    print("\n".join([Report.HEAD, *map(str, reports)]))
    return int(any(report.unexplained or (report.lost and report.fault not in MAY_LOSE) for report in reports))


if __name__ == "__main__":
    sys.exit(main())

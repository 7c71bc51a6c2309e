"""Two beats and a worker, a task each second, and leaders that die: no due time without a run, duplicates by their id.

    python -m integration.beats [--seconds 120] [--kills 3] [--cuts 0] [--unconfirmed 0] [--root DIR]

A *kill* is SIGKILL of the leading beat; a new beat is started in its place. A *cut* swallows all that the leader's
connections say, both ways, without closing them, until another one leads; then it heals. *Unconfirmed*: the broker gets
what is due, but the leader never hears of it: that due time runs twice. `--root` is a folder with another
RabbitMQ version in it.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from integration.faults import Forwarder
from integration.nodes import RabbitNode, apt_install, rabbitmq_installed
from integration.waiting import LONG
from integration.workers import BeatProcess, WorkerProcess, eventually

APP = "integration.apps.beaten"
EVERY = timedelta(seconds=1)


@dataclass
class Report:
    """What came of one run."""

    # Ids by due time.
    runs: dict[datetime, list[str]]
    # Seconds from each fault to the next beat's leading.
    takeovers: list[tuple[str, float]] = field(default_factory=list)

    @property
    def expected(self) -> list[datetime]:
        """Each due time from the first to the last that ran."""
        first, last = min(self.runs), max(self.runs)
        return [first + number * EVERY for number in range(round((last - first) / EVERY) + 1)]

    @property
    def missing(self) -> list[datetime]:
        """Due times without a run."""
        return [due for due in self.expected if due not in self.runs]

    @property
    def strange(self) -> list[datetime]:
        """Runs for what was never due."""
        return sorted(set(self.runs) - set(self.expected))

    @property
    def duplicates(self) -> dict[datetime, list[str]]:
        """Due times that ran more than once."""
        return {due: ids for due, ids in self.runs.items() if len(ids) > 1}

    @property
    def confused(self) -> dict[datetime, list[str]]:
        """Due times that ran under different ids."""
        return {due: ids for due, ids in self.runs.items() if len(set(ids)) > 1}

    @property
    def is_good(self) -> bool:
        """Whether nothing is missing and every duplicate can be told."""
        return not (self.missing or self.strange or self.confused)

    def __str__(self) -> str:
        took = ", ".join(f"{fault} {seconds:.1f} s" for fault, seconds in self.takeovers) or "none"
        rows = [
            ("due times", len(self.expected)),
            ("without a run", len(self.missing)),
            ("with more than one run", len(self.duplicates)),
            ("  of these under different ids", len(self.confused)),
            ("runs for no due time", len(self.strange)),
            ("takeovers", took),
        ]
        return "\n".join(f"{name:<32} {value}" for name, value in rows)


class Beats:
    """One worker and two beats on one broker; each beat has a road of its own to it."""

    def __init__(self, url: str, stack: ExitStack, folder: Path) -> None:
        self._url = url
        self._stack = stack
        self._folder = folder
        self._file = folder / "runs"
        self._file.touch()
        self._name = f"beats-{uuid.uuid4().hex[:8]}"
        self.environment = {"BEATS_FILE": str(self._file), "BEATS_QUEUE": self._name, "BEATS_NAME": self._name}
        self.beats: list[tuple[BeatProcess, Forwarder]] = []
        self.takeovers: list[tuple[str, float]] = []

    @property
    def work_queue(self) -> str:
        """What the worker consumes."""
        return self._name

    @property
    def leader_queue(self) -> str:
        """The queue that holds their state."""
        return f"amqtask.beat.{self._name}.{self._name}"

    def start(self) -> None:
        """The worker, then two beats, one of which leads."""
        worker = WorkerProcess(APP, "-P", "solo", environment={**self.environment, "AMQTASK_BROKER_URL": self._url})
        self._stack.enter_context(worker)
        self.add()
        self.add()
        eventually(lambda: self.leader is not None, what="nobody leads")

    def add(self) -> None:
        """One more beat."""
        road = self._stack.enter_context(Forwarder(self._url))
        file = self._folder / f"schedule-{len(self.beats)}-{time.time_ns()}"
        beat = BeatProcess(APP, "-s", str(file), environment={**self.environment, "AMQTASK_BROKER_URL": road.url})
        self._stack.enter_context(beat)
        self.beats.append((beat, road))

    @property
    def leader(self) -> tuple[BeatProcess, Forwarder] | None:
        """Who leads, by what they say."""
        return next((each for each in self.beats if each[0].is_leading), None)

    def kill_leader(self) -> None:
        """SIGKILL; another one takes its place among the waiting."""
        leader = self.await_leader()
        self.beats.remove(leader)
        started = time.monotonic()
        leader[0].signal(signal.SIGKILL)
        self.await_leader()
        self.takeovers.append(("killed", time.monotonic() - started))
        self.add()

    def cut_leader(self) -> None:
        """Nothing passes any more, and nobody is told."""
        leader = self.await_leader()
        started = time.monotonic()
        leader[1].stall(new_ones=True)
        others = [each for each in self.beats if each is not leader]
        eventually(lambda: any(beat.is_leading for beat, _ in others), what="nobody took over")
        self.takeovers.append(("cut off", time.monotonic() - started))
        leader[1].heal()
        eventually(lambda: not leader[0].is_leading, what="the one that was cut off still thinks that it leads")

    def lose_confirm(self) -> None:
        """The broker gets what is due, and its answers do not come back any more."""
        leader = self.await_leader()
        started = time.monotonic()
        leader[1].hold_after(b"celery_beat_task")
        eventually(lambda: not leader[0].is_leading, what="the leader still leads")
        self.await_leader()
        leader[1].heal()
        self.takeovers.append(("unconfirmed", time.monotonic() - started))

    def await_leader(self) -> tuple[BeatProcess, Forwarder]:
        """Who leads, once somebody does."""
        eventually(lambda: self.leader is not None, what="nobody leads")
        found = self.leader
        assert found is not None
        return found

    @property
    def runs(self) -> dict[datetime, list[str]]:
        """What the worker wrote down."""
        found: dict[datetime, list[str]] = defaultdict(list)
        for line in self._file.read_text().splitlines():
            task_id, due, _ = line.split("\t")
            found[datetime.fromisoformat(due)].append(task_id)
        return found

    def await_runs(self, count: int, timeout: float = LONG) -> None:
        """Until so many due times have run."""
        eventually(lambda: len(self.runs) >= count, timeout, what=lambda: f"{len(self.runs)} of {count} ran", every=0.1)

    def report(self) -> Report:
        """So far."""
        return Report(self.runs, self.takeovers)


def run(url: str, *, seconds: int, kills: int, cuts: int = 0, unconfirmed: int = 0) -> Report:
    """A schedule each second for `seconds`, faults spread over it."""
    faults = [Beats.kill_leader] * kills + [Beats.cut_leader] * cuts + [Beats.lose_confirm] * unconfirmed
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="amqtask-beats-")))
        beats = Beats(url, stack, folder)
        beats.start()
        for number, fault in enumerate(faults, 1):
            beats.await_runs(seconds * number // (len(faults) + 1), 60 + seconds)
            fault(beats)
        beats.await_runs(seconds, 60 + seconds)
        return beats.report()


def main() -> int:
    """The exit code says whether each due time has its run."""
    parser = argparse.ArgumentParser(prog="python -m integration.beats")
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--cuts", type=int, default=0)
    parser.add_argument("--unconfirmed", type=int, default=0)
    parser.add_argument("--root", default="", help="a folder (chroot) with another RabbitMQ version")
    options = parser.parse_args()
    if not options.root and not rabbitmq_installed():
        apt_install("rabbitmq-server")
    with ExitStack() as stack:
        node = RabbitNode(root=options.root)
        stack.callback(node.remove)
        node.start()
        report = run(
            node.url,
            seconds=options.seconds,
            kills=options.kills,
            cuts=options.cuts,
            unconfirmed=options.unconfirmed,
        )
    print(report, flush=True)
    return 0 if report.is_good else 1


if __name__ == "__main__":
    sys.exit(main())

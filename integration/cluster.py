"""A cluster of three nodes that fails in every way, under workers, producers, workflows, delayed tasks and beats.

    python -m integration.cluster [--scenario NAME …] [--short] [--versions 3.10 4.0 4.3] [--roots DIR] [--table FILE]

For each scenario it prints what was accepted and refused, what ran, ran twice, was lost or is stuck, and for how many seconds
nobody published or worked while the cluster, by a bare client's view (integration.probing), did. The exit code says whether
nothing was lost or stuck and the seconds kept to LIMITS. `--keep DIR` keeps the logs and the lines that were counted.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from integration.apps.clustered import QUEUE, RARE
from integration.faults import Forwarder
from integration.nodes import Cluster, RabbitNode, apt_install, rabbitmq_installed
from integration.probing import Probe, Stretch, without
from integration.roots import RELEASES, root_of
from integration.tally import COLUMNS, LIMITS, Row, Tally
from integration.waiting import NeverHappened
from integration.workers import BeatProcess, LoggedProcess, WorkerProcess, eventually

APP = "integration.apps.clustered"
VHOST = "work"
PRODUCERS = ("sync", "async", "forked", "delayed")
WORKERS = {"prefork": ("-P", "prefork", "-c", "2"), "eventlet": ("-P", "eventlet", "-c", "10")}


@dataclass(frozen=True)
class Sizes:
    """How much of everything; seconds."""

    delayed: int = 5000
    # From the producers' start to the first ETA, and from the first to the last.
    ahead: float = 10.0
    spread: float = 30.0
    # How long the faults last.
    fault: float = 15.0
    pause: float = 20.0
    closing: float = 60.0
    # How long what was accepted may take after the fault before it is stuck.
    patience: float = 60.0


SHORT = Sizes(delayed=300, spread=10.0, fault=6.0, pause=8.0, closing=12.0, patience=40.0)


class World:
    """The cluster and everybody who uses it; scenarios hurt it."""

    def __init__(self, cluster: Cluster, folder: Path, sizes: Sizes) -> None:
        self.cluster = cluster
        self.sizes = sizes
        self.folder = folder
        self.roads: list[Forwarder] = []
        self.processes: dict[str, LoggedProcess] = {}
        # When a scenario deleted the queue of rare tasks: what was in it then is not lost by us.
        self.deletions: list[float] = []
        # When the cluster worked, but not for us.
        self.banned: list[Stretch] = []
        self._stack = ExitStack()

    def start(self, *, over_roads: bool) -> None:
        """Two workers and two beats; `over_roads`: through forwarders that can be stalled and cut."""
        self._add_vhost()
        urls = [f"{url}{VHOST}" for url in self.cluster.urls]
        if over_roads:
            self.roads = [self._stack.enter_context(Forwarder(url)) for url in urls]
            urls = [road.url for road in self.roads]
        self.environment = {"AMQTASK_BROKER_URL": ";".join(urls), "CLUSTER_FOLDER": str(self.folder)}
        for name, options in WORKERS.items():
            environment = {**self.environment, "CLUSTER_WORKER": name}
            worker = WorkerProcess(APP, *options, "-Q", f"{QUEUE},{RARE}", "-n", f"{name}@%h", environment=environment)
            self._add(name, worker)
        beats: list[BeatProcess] = []
        for number in range(2):
            file = str(self.folder / f"schedule-{number}")
            beats.append(BeatProcess(APP, "-s", file, environment=self.environment))
            self._add(f"beat{number}", beats[-1])
        eventually(lambda: any(beat.is_leading for beat in beats), what="no beat leads")

    def _add_vhost(self) -> None:
        node = self.cluster.nodes[0]
        if VHOST in node.ctl("list_vhosts", "name").split():
            node.ctl("delete_vhost", VHOST)
        node.add_vhost(VHOST)

    def _add(self, name: str, process: LoggedProcess) -> None:
        self._stack.callback(process.kill)
        self.processes[name] = process.start()

    def stop(self) -> None:
        """End everybody; the cluster stays."""
        for name, process in self.processes.items():
            process.kill()
            shutil.move(process.log_path, self.folder / f"{name}-{time.time():.0f}.log")
        self.processes.clear()
        self._stack.close()
        self.roads = []

    def dead(self) -> list[str]:
        """Workers and beats that have ended."""
        return [name for name, process in self.processes.items() if process.process.poll() is not None]

    def producer(self, kind: str, scenario: str) -> LoggedProcess:
        """One that calls from now on."""
        sizes = self.sizes
        options = {"delayed": sizes.delayed, "ahead": sizes.ahead, "spread": sizes.spread, "patience": sizes.patience}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "integration.producing", kind, scenario, *words]
        return LoggedProcess(command, ready="producer ready.", environment=self.environment)

    # -- faults

    def wait(self, seconds: float) -> None:
        """The fault itself, not a synchronisation."""
        time.sleep(seconds)

    def leader(self) -> RabbitNode:
        """The node that leads the workers' queue, with what it knows of its queues written down."""
        node = self.cluster.leader_of(QUEUE, VHOST)
        node.settle()
        return node

    def ctl(self, *arguments: str) -> str:
        """rabbitmqctl, asked of a node that runs."""
        return self.cluster.alive().ctl(*arguments)

    def left(self) -> dict[str, int]:
        """Messages by queue."""
        lines = self.ctl("list_queues", "-p", VHOST, "name", "messages").splitlines()
        pairs = (line.partition("\t") for line in lines)
        return {name: int(count) for name, _, count in pairs if count.isdigit()}

    def heal(self) -> None:
        """Whatever was done: it is well again."""
        for road in self.roads:
            road.heal()
        self.cluster.mend()


def calm(world: World) -> None:
    """No fault."""
    world.wait(world.sizes.fault)


def leader_killed(world: World) -> None:
    """SIGKILL of the node that leads the tasks' queue; it is started again."""
    node = world.leader()
    node.kill()
    world.wait(world.sizes.fault)
    node.start()


def leader_lost(world: World) -> None:
    """The same, but it never comes back."""
    world.leader().kill()
    world.wait(world.sizes.pause)


def rolling_restart(world: World) -> None:
    """Each node is stopped and started, one after the other."""
    for node in world.cluster.nodes:
        node.stop()
        node.start()
        world.cluster.await_whole()


def node_paused(world: World) -> None:
    """The node that leads the tasks' queue stands still (SIGSTOP), and goes on."""
    node = world.leader()
    node.pause()
    world.wait(world.sizes.pause)
    node.resume()


def partition(world: World) -> None:
    """The node that leads the tasks' queue is cut off from the others, not from its clients."""
    world.cluster.isolate(world.leader())
    world.wait(world.sizes.fault)
    world.cluster.heal()
    world.cluster.await_whole()


def majority_lost(world: World) -> None:
    """SIGKILL of two of three nodes; both are started again."""
    lost = world.cluster.nodes[1:]
    for node in lost:
        node.settle()
    for node in lost:
        node.kill()
    world.wait(world.sizes.fault)
    for node in lost:
        node.launch()
    world.cluster.await_whole()


def black_hole(world: World) -> None:
    """Nothing passes to one node any more, and nobody is told; then to the next."""
    for road in world.roads[:2]:
        road.stall(new_ones=True)
        world.wait(world.sizes.fault)
        road.heal()


def cut_anywhere(world: World) -> None:
    """Each connection ends after some bytes, half of them within the handshake."""
    for number, road in enumerate(world.roads):
        road.fray(number)
    world.wait(world.sizes.pause)
    for road in world.roads:
        road.heal()


def memory_alarm(world: World) -> None:
    """A node says that its memory is used up: nobody may publish."""
    world.ctl("set_vm_memory_high_watermark", "0.00001")
    world.wait(world.sizes.fault / 2)
    world.ctl("set_vm_memory_high_watermark", "0.4")


def disk_alarm(world: World) -> None:
    """A node says that its disk is full: nobody may publish."""
    world.ctl("set_disk_free_limit", "100000GB")
    world.wait(world.sizes.fault / 2)
    world.ctl("set_disk_free_limit", "50MB")


def queue_deleted(world: World) -> None:
    """Somebody deletes a queue that workers consume, three times; nobody but our own makes it anew."""
    for _ in range(3):
        # `--if-empty` is not for quorum queues; what was in it is gone with it.
        world.ctl("delete_queue", "-p", VHOST, RARE)
        world.deletions.append(time.time())
        world.wait(world.sizes.fault / 3)


def permission_taken(world: World) -> None:
    """The user may not use the virtual host any more, and is thrown out; then may again."""
    began = time.time()
    world.ctl("clear_permissions", "-p", VHOST, "guest")
    world.ctl("close_all_connections", "--vhost", VHOST, "no permission")
    world.wait(world.sizes.fault / 2)
    world.ctl("set_permissions", "-p", VHOST, "guest", ".*", ".*", ".*")
    world.banned.append((began, time.time()))


def connections_closed(world: World) -> None:
    """All connections are closed from the broker's side, every two seconds."""
    end = time.monotonic() + world.sizes.closing
    while time.monotonic() < end:
        began = time.monotonic()
        world.ctl("close_all_connections", "--vhost", VHOST, "again")
        world.wait(max(0.0, began + 2 - time.monotonic()))


DIRECT: dict[str, Callable[[World], None]] = {
    "calm": calm,
    "leader-killed": leader_killed,
    "leader-lost": leader_lost,
    "rolling-restart": rolling_restart,
    "node-paused": node_paused,
    "partition": partition,
    "majority-lost": majority_lost,
    "memory-alarm": memory_alarm,
    "disk-alarm": disk_alarm,
    "queue-deleted": queue_deleted,
    "permission-taken": permission_taken,
    "connections-closed": connections_closed,
}
ON_ROADS: dict[str, Callable[[World], None]] = {"black-hole": black_hole, "cut-anywhere": cut_anywhere}
SCENARIOS = {**DIRECT, **ON_ROADS}
# What the tests run.
SHORTEST = ("leader-killed", "connections-closed")


class Suite:
    """Scenario after scenario on one cluster; the workers live on as long as all is well."""

    def __init__(self, world: World, probe: Probe, *, told: Callable[[str], object] = lambda _: None) -> None:
        self._world = world
        self._probe = probe
        self._told = told
        self._numbers = itertools.count(1)
        self._is_over_roads: bool | None = None

    def run(self, name: str) -> Row:
        """One scenario."""
        world, over_roads = self._world, name in ON_ROADS
        if self._is_over_roads != over_roads:
            world.stop()
            world.start(over_roads=over_roads)
            self._is_over_roads = over_roads
        row = self._hurt(name, f"{name}-{next(self._numbers)}")
        if not row.is_good:
            # Whatever is wedged does not spoil the next one.
            world.stop()
            self._is_over_roads = None
        return row

    def _hurt(self, name: str, scenario: str) -> Row:
        world = self._world
        tally = Tally(world.folder, scenario)
        began = time.time()
        with ExitStack() as stack:
            producers = {kind: stack.enter_context(world.producer(kind, scenario).start()) for kind in PRODUCERS}
            eventually(lambda: tally.ran() > 50, what="nothing runs")
            self._told(f"{name}: begins after {time.time() - began:.1f} s")
            SCENARIOS[name](world)
            self._told(f"{name}: healed after {time.time() - began:.1f} s")
            world.wait(5)
            (world.folder / f"over-{scenario}").touch()
            over = time.time()
            stuck = self._drain(tally, producers, (began, over), began + world.sizes.ahead + world.sizes.spread)
        dead = world.dead()
        works = without(self._probe.stretches(began, time.time()), world.banned)
        row = tally.row(name, works, (began, over), left=world.left(), deletions=world.deletions)
        world.heal()
        return replace(
            row, stuck=row.stuck + len(stuck) + len(dead), notes=[*row.notes, *stuck, *(f"{w} ended" for w in dead)]
        )

    def _drain(self, tally: Tally, producers: dict[str, LoggedProcess], during: Stretch, last_eta: float) -> list[str]:
        """Wait until all that was accepted has run and all results are there, or patience ends; who is stuck."""
        patience = self._world.sizes.patience + max(0.0, last_eta - time.time())

        def is_done() -> bool:
            have_ended = all(each.process.poll() is not None for each in producers.values())
            return have_ended and not tally.missing() and not tally.missed(during)

        try:
            eventually(is_done, patience, every=0.5)
        except NeverHappened:
            self._told(f"not done after {patience:.0f} s more")
        stuck = []
        for kind, process in producers.items():
            try:
                process.wait(self._world.sizes.patience / 4)
            except NeverHappened as error:
                (self._world.folder / f"{tally.scenario}-{kind}.stuck").write_text(str(error))
                stuck.append(f"the {kind} producer hangs")
        return stuck


def run(
    root: str, names: Sequence[str], sizes: Sizes, folder: Path, told: Callable[[str], object] = lambda _: None
) -> list[Row]:
    """The scenarios on one version: those without forwarders first."""
    rows = []
    with Cluster(root=root) as cluster, Probe(cluster.urls) as probe:
        world = World(cluster, folder, sizes)
        suite = Suite(world, probe, told=told)
        try:
            for name in sorted(names, key=list(SCENARIOS).index):
                rows.append(suite.run(name))
                told(str(rows[-1]))
        finally:
            world.stop()
    return rows


def table(version: str, rows: Sequence[Row]) -> str:
    """Markdown."""
    head = [f"RabbitMQ {version}, {date.today():%d %B %Y}:", "", "| " + " | ".join(COLUMNS) + " |"]
    return "\n".join([*head, "| --- " * len(COLUMNS) + "|", *("| " + " | ".join(row.cells) + " |" for row in rows), ""])


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m integration.cluster")
    parser.add_argument("--scenario", action="append", choices=list(SCENARIOS), help="only these")
    parser.add_argument("--short", action="store_true", help="less of everything, and only what the tests run")
    parser.add_argument("--delayed", type=int, help="how many delayed tasks; fewer on a busy machine")
    parser.add_argument("--versions", nargs="*", choices=sorted(RELEASES), help="default: this machine's RabbitMQ")
    parser.add_argument("--roots", type=Path, default=Path(".roots"), help="where other versions are, or are put")
    parser.add_argument("--table", type=Path, help="a file that gets the tables, in Markdown")
    parser.add_argument("--keep", type=Path, help="a folder for logs and what was counted")
    options = parser.parse_args()
    # Whoever ends it, also where Ctrl+C is ignored (in the background): the nodes and all others end with it.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: sys.exit(130))
    if not options.versions and not rabbitmq_installed():
        apt_install("rabbitmq-server")
    names = options.scenario or (SHORTEST if options.short else list(SCENARIOS))
    sizes = SHORT if options.short else Sizes()
    if options.delayed is not None:
        sizes = replace(sizes, delayed=options.delayed)
    is_good, tables = True, []
    for version in options.versions or ["installed"]:
        root = "" if version == "installed" else root_of(version, options.roots.resolve())
        folder = Path(tempfile.mkdtemp(prefix="amqtask-cluster-"))
        rows = run(root, names, sizes, folder, lambda text: print(text, flush=True))
        tables.append(table(version, rows))
        print(f"\n{tables[-1]}\n{LIMITS}", flush=True)
        is_good = is_good and all(row.is_good for row in rows)
        if options.keep is not None:
            options.keep.mkdir(parents=True, exist_ok=True)
            shutil.move(folder, options.keep / f"{version}-{time.time():.0f}")
        else:
            shutil.rmtree(folder)
    if options.table is not None:
        options.table.write_text("\n".join(tables))
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())

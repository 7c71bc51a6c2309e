"""How a worker is configured: `WorkerOptions` from the command line, `WorkerSetup` for the worker's parts."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Protocol

from amqtask.execution.chain_steps import Perhaps, Stops
from amqtask.pool import Loop
from amqtask.topology.declarations import CLASSIC, broker_limit
from amqtask.worker.revoked import MAX_IDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from amqtask.execution.chain_steps import SharedFlag
    from amqtask.execution.contract import TaskLike
    from amqtask.execution.request import Request
    from amqtask.ground.shapes import SettingValues
    from amqtask.protocol.entities import Queue
    from amqtask.topology.delays import DelayPlan
    from amqtask.topology.slots import QueueSlots


# -- WorkerOptions: the options of `amqtask worker`, checked once and frozen; and the default number of slots.


class WorkerOptions(NamedTuple):
    """None means "not given": the app's setting decides. Times are seconds, memory is KiB (as in Celery).

    `queues` may have slots (amqtask.topology.slots). `autoscale` is (max, min), in Celery's order. `prefetch` is the number of
    unanswered deliveries per queue; `prefetch_multiplier` the same as a multiple of the slots; neither given: the window adapts.
    `hostname` is the finished node name (`celery@host`), with `%h` and its like already expanded.
    """

    queues: tuple[str, ...] = ()
    exclude_queues: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    pool: str | None = None
    concurrency: int | None = None
    hostname: str | None = None
    loglevel: str = "WARNING"
    logfile: str | None = None
    log_format: str | None = None
    optimization: str | None = None
    prefetch: int | None = None
    prefetch_multiplier: float | None = None
    disable_prefetch: bool | None = None
    max_tasks_per_child: int | None = None
    max_memory_per_child: int | None = None
    time_limit: float | None = None
    soft_time_limit: float | None = None
    autoscale: tuple[int, int] | None = None
    purge: bool = False
    task_events: bool | None = None
    relay: bool | None = None
    heartbeat_interval: float | None = None
    without_gossip: bool = False
    without_mingle: bool = False
    without_heartbeat: bool = False
    statedb: str | None = None
    pidfile: str | None = None
    # Ports for Prometheus (/metrics) and for probes (/live, /ready), and the address they listen on. Not settings: each
    # worker of a host needs its own.
    metrics_port: int | None = None
    health_port: int | None = None
    http_host: str = "0.0.0.0"
    # The command line sets these off for a worker that runs inside a test or another program.
    install_signals: bool = True
    banner: bool = True
    # -B: the scheduler runs on this worker's loop; -s and --scheduler are its file and its source of entries.
    beat: bool = False
    schedule: str | None = None
    scheduler: str | None = None
    # Options that the application adds (app.user_options).
    of_app: SettingValues = MappingProxyType({})


CGROUPS = Path("/sys/fs/cgroup")


def usable_processors(root: Path = CGROUPS) -> int:
    """The default number of slots; at least 1. A quota of 1.5 processors counts as 2."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(root)
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def _quota(root: Path) -> float | None:
    """cgroup v2 `cpu.max`, else v1 `cpu.cfs_quota_us` (https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files)."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        except OSError:
            return None
    try:
        processors = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return None
    return processors if processors > 0 else None


# -- WorkerSetup: a worker's configuration, as plain data that `assembly` makes; and the contracts of a worker's parts.


class WorkQueue(NamedTuple):
    """A queue to consume, and its dead-letter queue (None: it has none)."""

    queue: Queue
    dead_letter: Queue | None


class WorkQueues(dict[str, WorkQueue]):
    """All queues that a worker consumes or has consumed, by name: requests of the latter may still be running."""

    def __init__(self, queues: Iterable[WorkQueue], delivery_limit: int | None) -> None:
        super().__init__((work.queue.name, work) for work in queues)
        self._delivery_limit = delivery_limit

    def dead_letter_queue(self, queue: str) -> Queue | None:
        """The dead-letter queue of a queue, None where there is none."""
        work = self.get(queue)
        return work.dead_letter if work is not None else None

    def delivery_limit(self, queue: str) -> int | None:
        """How often a message of a queue may be delivered to a task: the queue's own argument, else the setting."""
        limit = self.broker_limit(queue)
        return self._delivery_limit if limit is None or limit == broker_limit(self._delivery_limit) else limit

    def broker_limit(self, queue: str) -> int | None:
        """After how many deliveries the broker dead-letters a message of a queue by itself; None: it does not."""
        work = self.get(queue)
        limit = work.queue.argument_map.get("x-delivery-limit") if work is not None else None
        return limit if isinstance(limit, int) else None

    def is_last_run(self, request: Request) -> bool:
        """Whether its message is dead-lettered if its process dies once more."""
        limit = self.delivery_limit(request.queue)
        return limit is not None and 0 < limit <= request.attempts + 1

    def is_counting(self, queue: str) -> bool:
        """Whether the broker counts the deliveries of a queue's messages; of a queue whose type only the broker knows it may."""
        work = self.get(queue)
        return work is None or work.queue.argument_map.get("x-queue-type") != CLASSIC


class RunnableLoop(Loop, Protocol):
    """The I/O loop, with the methods that only its owner calls."""

    def run(self) -> None:
        """Run until `stop`."""

    def stop(self) -> None: ...

    def close(self) -> None:
        """Release its descriptors, after it has stopped and when it is not called any more."""


class WorkerSetup(NamedTuple):
    """Times are seconds. `prefetch` None lets the window adapt. The time limits are for tasks that set none.

    `most_slots` is autoscale's maximum: the windows are sized for it, so that the backlog can be seen.
    """

    hostname: str
    queues: tuple[WorkQueue, ...]
    tasks: Mapping[str, TaskLike]
    delays: DelayPlan
    # Running requests that are asked to end.
    stops: Stops
    # Queues that are not consumed before somebody resumes them.
    paused: frozenset[str] = frozenset()
    # Slots of queues; also of some that this worker does not consume.
    queue_slots: Mapping[str, QueueSlots] = MappingProxyType({})
    most_slots: int | None = None
    prefetch: int | None = None
    delivery_limit: int | None = 5
    # For so long the broker may take a connection that fell silent for alive, and deliver to it.
    silence_seconds: float = 180.0
    # Content types of protocol v1 bodies, which the worker itself has to decode (slots decode v2 bodies).
    accept: frozenset[str] = frozenset({"application/json"})
    time_limit: float | None = None
    soft_time_limit: float | None = None
    # Task name to rate limit ('10/s'), for tasks that have one.
    rate_limits: Mapping[str, str | float] = MappingProxyType({})
    # For how many seconds a worker runs the steps of a chain without the broker; 0: each step goes through the broker.
    chain_seconds: float = 0.0
    # On while slots that are processes may do so, too.
    slot_steps: SharedFlag | None = None
    # Where slots look whether a next step may be revoked; None: they leave all steps to the worker once anything is.
    perhaps_revoked: Perhaps | None = None
    shutdown_timeout: float | None = None
    soft_shutdown_timeout: float = 0.0
    soft_shutdown_on_idle: bool = False
    term_is_quit: bool = False
    install_signals: bool = True
    # A file that keeps revoked ids and stamps from run to run (--statedb).
    statedb: str | None = None
    # How many revoked ids are remembered, and for how long (None: until there are too many).
    revokes_max: int = MAX_IDS
    revoke_expires: float | None = None


class Service(Protocol):
    """Started when the worker starts, stopped before its connections close; both may be called twice."""

    name: str

    def start(self) -> None: ...

    def stop(self) -> None: ...

"""WorkerOptions: the options of `amqtask worker`, checked once and frozen; and the default number of slots."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amqtask.ground.shapes import SettingValues


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """None means "not given": the app's setting decides. Times are seconds, memory is KiB (as in Celery).

    `autoscale` is (max, min), in Celery's order. `prefetch` is the number of unanswered deliveries per queue;
    `prefetch_multiplier` the same as a multiple of the slots; neither given: the window adapts itself.
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
    of_app: SettingValues = field(default_factory=dict)


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

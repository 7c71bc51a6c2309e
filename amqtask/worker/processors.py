"""How many processors this process may use: the machine's number, its affinity, and its container's quota."""

from __future__ import annotations

import math
import os
from pathlib import Path

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

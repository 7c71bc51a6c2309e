"""This process: what it was forked from, who started it, how much memory it has."""

from __future__ import annotations

import os
import sys
import traceback
from typing import NoReturn

# -- Forks. A process that a task forked with os.fork and that returned from the task must not continue as a second slot.

# How many forks this process comes from; in a list, because it is read twice per task: a system call (getpid) costs ten
# times as much.
FORKS = [0]
_is_counting = False


def count_forks() -> None:
    """Count forks in FORKS from now on, so that a forked child differs from its parent; may be called often."""
    global _is_counting
    if not _is_counting:
        _is_counting = True
        os.register_at_fork(after_in_child=_count)


def _count() -> None:
    FORKS[0] += 1


def end_forked(error: BaseException | None) -> NoReturn:
    """End this process like a program that has returned, or that raised `error`."""
    code = 0
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif error is not None:
        traceback.print_exception(error)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()
    os._exit(code & 0xFF)


# -- Its place in a pool

# Which process of its pool this one is, counted from 1; 0 in every other process.
POOL_INDEX = [0]


# -- The parent

_PR_SET_PDEATHSIG = 1


def signal_at_parents_end(signum: int) -> None:
    """Let Linux send this process the signal when the thread that started it has ended; nothing elsewhere. The parent may have
    ended before this call."""
    if sys.platform.startswith("linux"):
        import ctypes  # noqa: PLC0415 - most processes need it never

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum)


# -- Memory


def resident_bytes() -> int:
    """The resident memory of this process; where that is not available, the most that it ever had."""
    import resource  # noqa: PLC0415 - Windows, where calls are made from, has none

    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        pass  # not Linux
    try:
        import psutil  # noqa: PLC0415 - it need not be installed
    except ImportError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return int(psutil.Process().memory_info().rss)

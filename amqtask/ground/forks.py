"""A process that a task forked with os.fork and that returned from the task must not continue as a second slot."""

from __future__ import annotations

import os
import sys
import traceback
from typing import NoReturn

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

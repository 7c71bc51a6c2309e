"""`celery.platforms`: exit codes and the system's name."""

from __future__ import annotations

import os
import signal as _signals
import sys

__all__ = [
    "EX_FAILURE",
    "EX_OK",
    "EX_UNAVAILABLE",
    "EX_USAGE",
    "IS_WINDOWS",
    "IS_macOS",
    "SYSTEM",
    "isatty",
    "signal_name",
]

SYSTEM = sys.platform.capitalize()
IS_macOS, IS_WINDOWS = sys.platform == "darwin", sys.platform == "win32"
EX_OK, EX_FAILURE, EX_USAGE, EX_UNAVAILABLE = 0, 1, 64, 69


def isatty(fh: object) -> bool:
    """Whether it is a terminal."""
    return bool(fh is not None and os.isatty(fh.fileno()))  # type: ignore[attr-defined] # a file, or it has no fileno


def signal_name(signum: int) -> str:
    """`TERM` of 15."""
    return _signals.Signals(signum).name.removeprefix("SIG")

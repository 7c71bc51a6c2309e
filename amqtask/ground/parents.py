"""Processes that end with the one that started them, however that ended."""

from __future__ import annotations

import ctypes
import sys

_PR_SET_PDEATHSIG = 1


def signal_at_parents_end(signum: int) -> None:
    """Let Linux send this process the signal when the thread that started it has ended; nothing elsewhere. The parent may have
    ended before this call."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum)

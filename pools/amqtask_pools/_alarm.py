"""The timer of soft limits, independent of the timers of tasks: `signal.alarm` in a task neither stops it nor is stopped by it.

A process has one ITIMER_REAL and one handler for SIGALRM, and libraries for timeouts use both in tasks. So where the system
lets a program make timers (timer_create: Linux), we make our own, with a signal that no library uses. Elsewhere it is
ITIMER_REAL after all, and a task's own alarm ends its soft limit.
"""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

# The signal may come in our own code, just before or after the task; it comes again after so many seconds.
TRY_AGAIN = 0.01
_CLOCK_MONOTONIC, _SIGEV_SIGNAL = 1, 0


class _SigEvent(ctypes.Structure):
    """struct sigevent, see sigevent(3type)."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("rest", ctypes.c_byte * 64),
    )


class _TimerSpec(ctypes.Structure):
    """struct itimerspec, see itimerspec(3type): seconds and nanoseconds, of the interval and of the first time."""

    _fields_ = tuple((name, ctypes.c_long) for name in ("every_s", "every_ns", "first_s", "first_ns"))


class Alarm:
    """Calls `ring(frame)` in the main thread, which must make it: at the time of `set`, or when the process gets `signum`."""

    def __init__(self, ring: Callable[[FrameType | None], None]) -> None:
        self._library, self._timer = _make_timer()
        self.signum = int(signal.SIGALRM) if self._library is None else _OWN_SIGNAL
        self._before = signal.signal(self.signum, lambda _, frame: ring(frame))

    def set(self, seconds: float) -> None:
        """Ring in so many seconds, and again until `set(0)`."""
        if self._library is None:
            signal.setitimer(signal.ITIMER_REAL, seconds, TRY_AGAIN)
            return
        spec = _TimerSpec(*_split(TRY_AGAIN), *_split(seconds))
        if self._library.timer_settime(self._timer, 0, ctypes.byref(spec), None):
            raise OSError(ctypes.get_errno(), "timer_settime")

    def close(self) -> None:
        """Never ring again; may be called twice."""
        self.set(0)
        signal.signal(self.signum, self._before)


# Real-time signals have no meaning of their own; glibc and musl use the lowest ones themselves.
_OWN_SIGNAL = int(signal.SIGRTMAX) - 5 if sys.platform.startswith("linux") else 0


def _make_timer() -> tuple[Any, ctypes.c_void_p]:
    """The C library and the timer's number; None where there are no such timers, or the container forbids them."""
    timer = ctypes.c_void_p()
    if not sys.platform.startswith("linux"):
        return None, timer
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "timer_create"):  # glibc before 2.34
        library = ctypes.CDLL("librt.so.1", use_errno=True)
    event = _SigEvent(signo=_OWN_SIGNAL, notify=_SIGEV_SIGNAL)
    if library.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
        return None, timer
    return library, timer


def _split(seconds: float) -> tuple[int, int]:
    nanoseconds = int(seconds * 1e9)
    return nanoseconds // 10**9, nanoseconds % 10**9

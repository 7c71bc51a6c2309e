"""Time limits of a process: the soft one is raised by a timer in it, the hard one is watched by its parent."""

from __future__ import annotations

import ctypes
import signal
import sys
import time
from collections.abc import Callable
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import SoftTimeLimitExceeded
from amqtask.execution.coroutines import Interruptible, clear, drive
from amqtask.execution.executor import Executor
from amqtask.execution.gated import BatchedExecutor
from amqtask.ground.loop import OneTimer

if TYPE_CHECKING:
    from amqtask.pool import Loop

# -- The timer of soft limits, independent of the timers of tasks: `signal.alarm` in a task neither stops it nor is stopped by
# it.
#
# A process has one ITIMER_REAL and one handler for SIGALRM, and libraries for timeouts use both in tasks. So where the system
# lets a program make timers (timer_create: Linux), we make our own, with a signal that no library uses. Elsewhere it is
# ITIMER_REAL after all, and a task's own alarm ends its soft limit.


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


class SoftLimits:
    """In a child's main thread: `begin` before a task that has a soft limit, `end` after each task."""

    def __init__(self) -> None:
        # Raises the soft limit in the running task.
        self._strike: ThreadInterrupt | None = None
        # Made for the first task that needs it.
        self._alarm: Alarm | None = None

    def begin(self, seconds: float) -> None:
        """The task that begins now may run so long."""
        self._strike = ThreadInterrupt(SoftTimeLimitExceeded(seconds), self._set_timer)
        self._set_timer(max(seconds, 1e-6))

    def strike_now(self, reason: str, frame: FrameType | None) -> None:
        """Raise the soft limit in the running task now. In a coroutine it is raised later: the alarm rings again."""
        self._strike = ThreadInterrupt(SoftTimeLimitExceeded(reason), self._set_timer)
        self._strike(frame)

    def end(self) -> None:
        """The task has ended: nothing may be raised any more."""
        if self._strike is not None:
            self._strike.end()
            self._strike = None

    def _ring(self, frame: FrameType | None) -> None:
        if self._strike is not None:
            self._strike(frame)

    def _set_timer(self, seconds: float) -> None:
        if self._alarm is None:
            self._alarm = Alarm(self._ring)
        self._alarm.set(seconds)


class HardLimits:
    """One timer for all hard limits: it is due at the earliest deadline, and `look` returns the next one."""

    def __init__(self, loop: Loop, look: Callable[[], float | None]) -> None:
        self._look = look
        self._timer = OneTimer(loop)
        self._due = 0.0

    def watch(self, deadline: float) -> None:
        """Look no later than at this time (of time.monotonic)."""
        if not self._timer.is_set or deadline < self._due:
            self._due = deadline
            self._timer.set(max(0.0, deadline - time.monotonic()), self._is_due)

    def stop(self) -> None:
        """Stop the timer."""
        self._timer.cancel()

    def _is_due(self) -> None:
        deadline = self._look()
        if deadline is not None:
            self.watch(deadline)


# -- How a signal handler raises an error in the running task: in the task's own code, but not inside an event loop.
#
# Raised inside a loop it would hit any of the loop's tasks, or the loop's own bookkeeping: the right coroutine might not get it,
# and another one never be woken again. So a loop is asked to interrupt the coroutine. Only when the loop does not run for
# LOOP_PATIENCE, because a call blocks it, the error is raised in that call.

# Seconds.
LOOP_PATIENCE = 1.0
_EXECUTE = frozenset({Executor.execute_here.__code__, BatchedExecutor.call_function.__code__})
_OWN_CODE: CodeType = Interruptible.__await__.__code__
_DRIVE, _CLEAR = drive.__code__, clear.__code__


class ThreadInterrupt:
    """Raises one error in the running task. `set_timer(seconds)` makes the signal come again; 0: no more."""

    def __init__(self, error: BaseException, set_timer: Callable[[float], object]) -> None:
        self._error = error
        self._set_timer = set_timer
        self._is_told = False
        self._is_over = False

    def __call__(self, frame: FrameType | None) -> None:
        """Called with the frame that the signal interrupted; does nothing when no task runs, or only its loop is cleared."""
        driving: FrameType | None = None
        is_own = False
        while frame is not None and frame.f_code not in _EXECUTE:
            if frame.f_code is _CLEAR:
                return
            is_own |= frame.f_code is _OWN_CODE
            driving = frame if frame.f_code is _DRIVE else driving
            frame = frame.f_back
        if frame is None or self._is_over:
            return
        if driving is None or is_own:
            self.end()
            raise self._error
        self._set_timer(LOOP_PATIENCE)
        if self._is_told:
            raise self._error
        self._is_told = True
        running: Interruptible = driving.f_locals["running"]
        running.interrupt_soon(self._error, self.end)

    def end(self) -> None:
        """Stop: the error was raised, or is not needed any more."""
        if not self._is_over:
            self._is_over = True
            self._set_timer(0)

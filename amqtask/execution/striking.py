"""How a signal handler raises an error in the task that runs: where its own code is, but not in the midst of an event loop.

Raised there it would hit whichever of the loop's tasks is at work, or the loop's own bookkeeping: the coroutine that it is meant
for might never hear of it, and another never be woken again. So there the loop is asked to interrupt the coroutine. Only when it
does not turn for LOOP_PATIENCE, because something blocks it, the error is raised in what does.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType, FrameType

from amqtask.execution.coroutines import Interruptible, clear, drive
from amqtask.execution.executor import Executor

# Seconds.
LOOP_PATIENCE = 1.0
_EXECUTE = Executor._execute.__code__
_OWN_CODE: CodeType = Interruptible.__await__.__code__
_DRIVE, _CLEAR = drive.__code__, clear.__code__


class Strike:
    """One error for the task that runs. `set_timer(seconds)` has it called again; 0: no more."""

    def __init__(self, error: BaseException, set_timer: Callable[[float], object]) -> None:
        self._error = error
        self._set_timer = set_timer
        self._is_told = False
        self._is_over = False

    def __call__(self, frame: FrameType | None) -> None:
        """With the frame that the signal interrupted; does nothing where no task runs, or only what one has left on its loop."""
        driving: FrameType | None = None
        is_own = False
        while frame is not None and frame.f_code is not _EXECUTE:
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
        """It was raised, or is not needed any more."""
        if not self._is_over:
            self._is_over = True
            self._set_timer(0)

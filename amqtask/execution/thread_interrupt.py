"""How a signal handler raises an error in the running task: in the task's own code, but not inside an event loop.

Raised inside a loop it would hit any of the loop's tasks, or the loop's own bookkeeping: the right coroutine might never get it,
and another one never be woken again. So a loop is asked to interrupt the coroutine. Only when the loop does not run for
LOOP_PATIENCE, because a call blocks it, the error is raised in that call.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType, FrameType

from amqtask.execution.batched import BatchedExecutor
from amqtask.execution.coroutines import Interruptible, clear, drive
from amqtask.execution.executor import Executor

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

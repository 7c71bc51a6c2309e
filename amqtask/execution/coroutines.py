"""Runs coroutines of `async def` tasks, on loops that are reused, and can interrupt them from outside.

A loop can only cancel a task. Interruptible drives the coroutine itself and so can raise any exception (the soft time limit, the
end of the worker) at the `await` where the coroutine waits.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import SoftTimeLimitExceeded, Terminated
from amqtask.ground.printable import bounded_logger

if TYPE_CHECKING:
    from amqtask.ground.shapes import CoroutineOf

logger = bounded_logger("amqtask.execution")
# Seconds that tasks which a coroutine left on its loop may take to end, after each of two cancellations.
GRACE = 5.0


def run_for_all(loop: asyncio.AbstractEventLoop, is_stopped: Callable[[], bool]) -> None:
    """Run a loop that many tasks share until `is_stopped`, also when one of them stops it, or when a coroutine that one has left
    running raises SystemExit or KeyboardInterrupt, with which asyncio leaves its loop."""
    while True:
        try:
            loop.run_forever()
            error = None
        except (SystemExit, KeyboardInterrupt) as raised:
            error = raised
        if is_stopped():
            return
        what = "a task has stopped it" if error is None else f"a coroutine that a task has left there raised {error!r}"
        logger.error("the event loop goes on, as other tasks need it: %s", what)


class Interruptible:
    """Await it once, in the asyncio `task` that is set here. `interrupt` is called on that task's loop."""

    __slots__ = ("_coroutine", "_has_begun", "_pending", "task")

    def __init__(self, coroutine: CoroutineOf[object]) -> None:
        self._coroutine = coroutine
        self._pending: BaseException | None = None
        self._has_begun = False
        self.task: asyncio.Task[object] | None = None

    def interrupt(self, error: BaseException) -> None:
        """Raise `error` in the coroutine; it is a CancelledError, too, so that task groups and the like clean up."""
        if self.task is None or not self.task.done():
            self._pending = error
            if self.task is not None and self._has_begun:
                self.task.cancel()

    def interrupt_soon(self, error: BaseException, on_interrupted: Callable[[], object]) -> None:
        """Like `interrupt`, from a signal handler, with the loop's next turn."""

        def interrupt() -> None:
            on_interrupted()
            self.interrupt(error)

        if self.task is not None:
            self.task.get_loop().call_soon_threadsafe(interrupt)

    def __await__(self) -> Generator[object, Any, Any]:
        coroutine = self._coroutine
        error: BaseException | None = None
        self._has_begun = True
        if self._pending is not None and self.task is not None:
            self.task.cancel()  # at its first await; a task that is cancelled before it begins never begins
        while True:
            try:
                waited_for = coroutine.send(None) if error is None else coroutine.throw(error)
            except StopIteration as stop:
                return stop.value
            try:
                yield waited_for
                error = None
            except BaseException as cancelled:  # noqa: BLE001 - whatever the loop raises belongs to the coroutine
                error = self._meant_by(cancelled)

    def _meant_by(self, cancelled: BaseException) -> BaseException:
        pending, self._pending = self._pending, None
        if pending is None:
            return cancelled
        uncancel = getattr(self.task, "uncancel", None)  # Python 3.11 counts cancellations
        if uncancel is not None:
            uncancel()
        return as_cancellation(pending)


def as_cancellation(error: BaseException) -> BaseException:
    """The same error, of a class that derives from its own class and from asyncio.CancelledError."""
    combined = _also_cancelled(type(error))
    twin: BaseException = combined.__new__(combined, *error.args)
    twin.args = error.args
    twin.__dict__.update(error.__dict__)
    return twin


def _also_cancelled(exception_type: type[BaseException]) -> type[BaseException]:
    # Under its own name, so that a stored failure says SoftTimeLimitExceeded.
    names = {"__module__": exception_type.__module__, "__qualname__": exception_type.__qualname__}
    combined: type[BaseException] = type(exception_type.__name__, (exception_type, asyncio.CancelledError), names)
    return combined


class CoroutineRunner:
    """Runs coroutines to their end for callers without a loop. Keeps as many loops as were needed at once.

    After a fork the child makes its own loops: a loop's selector must not be shared.
    """

    def __init__(self) -> None:
        self._idle: list[asyncio.AbstractEventLoop] = []
        self._parents: list[asyncio.AbstractEventLoop] = []
        self._process = os.getpid()

    def __call__(self, coroutine: CoroutineOf[object]) -> Any:
        """Run the coroutine and return its result. Tasks that it left on the loop are cancelled."""
        if self._process != os.getpid():
            # Kept, not closed: closing would remove the parent's sockets from the selector that both share.
            self._parents, self._idle, self._process = self._idle, [], os.getpid()
        try:
            loop = self._idle.pop()
        except IndexError:
            loop = asyncio.new_event_loop()
        try:
            value, error = drive(loop, Interruptible(coroutine))
        finally:
            if clear(loop):
                self._idle.append(loop)
            else:
                loop.close()
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        """Close the unused loops."""
        while self._idle and self._process == os.getpid():
            self._idle.pop().close()

    __del__ = close


async def _caught(running: Interruptible) -> tuple[object, BaseException | None]:
    # The error is returned as a value: with a SystemExit a Task would end the loop.
    try:
        return await running, None
    except BaseException as error:  # noqa: BLE001 - raised again by the runner
        return None, error


def drive(loop: asyncio.AbstractEventLoop, running: Interruptible) -> tuple[object, BaseException | None]:
    """Run the loop until the coroutine has ended: its value, or its error."""
    task = loop.create_task(_caught(running))
    running.task = task
    while True:
        try:
            loop.run_until_complete(task)
            return task.result()
        except (SoftTimeLimitExceeded, Terminated) as signalled:
            # A signal handler raised it in the loop's own code, for the task.
            running.interrupt(signalled)


def clear(loop: asyncio.AbstractEventLoop) -> bool:
    """Cancel the tasks that remain on a loop; whether all ended. Twice, because before Python 3.12 `asyncio.wait_for` may
    swallow a cancellation (python/cpython#86296)."""
    for _ in range(2):
        remaining = asyncio.all_tasks(loop)
        if not remaining:
            return True
        for task in remaining:
            task.cancel()
        loop.run_until_complete(_ends_of(remaining))
    remaining = asyncio.all_tasks(loop)
    if remaining:
        logger.error(
            "a coroutine that a task left running does not end when it is cancelled, and is left behind: %s", remaining
        )
    return not remaining


async def _ends_of(tasks: set[asyncio.Task[object]]) -> None:
    done, _ = await asyncio.wait(tasks, timeout=GRACE)
    await asyncio.gather(*done, return_exceptions=True)  # their errors do not matter

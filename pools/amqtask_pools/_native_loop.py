"""One asyncio loop in a thread of the operating system, for the `async def` tasks of green threads.

The green thread that runs such a task waits in its hub; the two sides talk through a pipe that the worker's I/O loop
reads, because nothing of a patched standard library may be waited for by two native threads.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
from collections import deque
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from amqtask.execution.coroutines import Interruptible

if TYPE_CHECKING:
    from amqtask.pool import Loop
    from amqtask_pools._green import Hub


class _Call:
    """One coroutine, on its way there and back."""

    __slots__ = ("context", "coroutine", "error", "green", "is_done", "value")

    def __init__(self, coroutine: Coroutine[Any, Any, Any], green: Any) -> None:
        self.coroutine = Interruptible(coroutine)
        self.context = contextvars.copy_context()
        self.green = green
        self.is_done = False
        self.value: Any = None
        self.error: BaseException | None = None


class NativeLoop:
    """`run` from green threads; everything else of the hub goes on meanwhile."""

    def __init__(self, hub: Hub, loop: Loop) -> None:
        self._hub = hub
        self._loop = loop
        self._aloop: asyncio.AbstractEventLoop | None = None
        self._calls: deque[_Call] = deque()
        self._done: deque[_Call] = deque()
        self._is_start_due = False
        self._is_wake_up_due = False
        self._reader, self._writer = -1, -1

    def start(self) -> None:
        """From a green thread."""
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        # The I/O loop may be waiting, in which case it would not see a reader that is just added.
        self._loop.call_soon_threadsafe(lambda: self._loop.add_reader(self._reader, self._wake_up))
        self._hub.start_native_thread(self._run_loop)

    def stop(self) -> None:
        """What still runs on it ends with the process."""
        if self._aloop is not None:
            self._aloop.call_soon_threadsafe(self._aloop.stop)
        if self._reader >= 0:
            self._loop.remove_reader(self._reader)
            # The writer stays open: the other thread may be about to use it.
            os.close(self._reader)
            self._reader = -1

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """From a green thread: its result. What is thrown into the green thread is raised in the coroutine."""
        call = _Call(coroutine, self._hub.current())
        aloop = self._await_loop(coroutine)
        self._calls.append(call)
        if not self._is_start_due:
            self._is_start_due = True
            aloop.call_soon_threadsafe(self._start_waiting)
        while not call.is_done:
            try:
                self._hub.wait()
            except BaseException as error:  # noqa: BLE001 - a limit, or the end: the coroutine answers it
                aloop.call_soon_threadsafe(call.coroutine.interrupt, error)
        if call.error is not None:
            raise call.error
        return call.value

    def _await_loop(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.AbstractEventLoop:
        try:
            while self._aloop is None:
                self._hub.sleep(0.001)
        except BaseException:
            coroutine.close()
            raise
        return self._aloop

    def _wake_up(self) -> None:
        """On the worker's I/O loop: some are done."""
        os.read(self._reader, 64)
        self._is_wake_up_due = False
        while self._done:
            self._hub.call_soon(_resume, self._done.popleft())

    # -- in the other thread

    def _run_loop(self) -> None:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        self._aloop = loop
        try:
            loop.run_forever()
        finally:
            loop.close()

    def _start_waiting(self) -> None:
        assert self._aloop is not None
        self._is_start_due = False
        while self._calls:
            call = self._calls.popleft()
            call.coroutine.task = call.context.run(self._aloop.create_task, self._finish(call))

    async def _finish(self, call: _Call) -> None:
        try:
            call.value = await call.coroutine
        except BaseException as error:  # noqa: BLE001 - raised again in the green thread
            call.error = error
        call.is_done = True
        self._done.append(call)
        if not self._is_wake_up_due:
            self._is_wake_up_due = True
            os.write(self._writer, b"\0")


def _resume(call: _Call) -> None:
    """In the hub."""
    call.green.switch()

"""One asyncio loop in a green thread of its own, for the `async def` tasks of the eventlet and gevent pools.

It runs in the hub's thread, so that objects that tasks share (a logger, a connection pool, a queue) are shared between green
threads only: the locks of a patched standard library do not work between threads of the operating system. While the loop
has nothing to do, the hub waits for the file descriptor of its selector.

Other green threads must not see a running loop: `asyncio.run` refuses to work in a thread that has one, and Django refuses its
synchronous ORM. So whenever the loop's green thread is left, asyncio's state of the thread is restored: no running loop, or the
loop of a task that called `asyncio.run`, and what runs in it.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
from collections.abc import Callable, Mapping
from selectors import BaseSelector
from typing import TYPE_CHECKING, Any

import greenlet

from amqtask.execution.coroutines import Interruptible, run_for_all

if TYPE_CHECKING:
    from selectors import DefaultSelector, SelectorKey

    from _typeshed import FileDescriptorLike

    from amqtask.ground.shapes import CoroutineOf
    from amqtask_pools._hub import Hub


class _Call:
    """One coroutine and the green thread that waits for it."""

    __slots__ = ("context", "coroutine", "error", "green", "is_done", "value")

    def __init__(self, coroutine: CoroutineOf[object], green: Any) -> None:
        self.coroutine = Interruptible(coroutine)
        self.context = contextvars.copy_context()
        self.green = green
        self.is_done = False
        self.value: Any = None
        self.error: BaseException | None = None


class GreenLoop:
    """`run` is called from green threads; the hub runs others meanwhile."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._selector = _HubSelector(hub)
        self._aloop = asyncio.SelectorEventLoop(self._selector)
        self._is_stopped = False

    def start(self) -> None:
        """Start the loop's green thread, with the hub's next turn."""
        self._hub.spawn(self._turn)

    def stop(self) -> None:
        """Stop the loop; coroutines that still run end with the process."""
        self._is_stopped = True
        self._soon(self._aloop.stop)

    def run(self, coroutine: CoroutineOf[object]) -> Any:
        """From a green thread: the coroutine's result. An exception thrown into the green thread is raised in the coroutine."""
        call = _Call(coroutine, self._hub.current())
        self._soon(self._begin, call)
        while not call.is_done:
            try:
                self._hub.wait()
            except BaseException as error:  # noqa: BLE001 - a limit, or the end: the coroutine answers it
                self._soon(call.coroutine.interrupt, error)
        if call.error is not None:
            raise call.error
        return call.value

    def _soon(self, callback: Callable[..., object], *arguments: object) -> None:
        self._aloop.call_soon(callback, *arguments)
        self._selector.wake()

    # -- in the loop's green thread

    def _turn(self) -> None:
        with _ThreadShare(self._hub.current()):
            try:
                run_for_all(self._aloop, lambda: self._is_stopped)
            finally:
                self._aloop.close()

    def _begin(self, call: _Call) -> None:
        call.coroutine.task = call.context.run(self._aloop.create_task, self.finish(call))

    async def finish(self, call: _Call) -> None:
        """Run the coroutine, then wake the green thread that waits for it."""
        try:
            call.value = await call.coroutine
        except BaseException as error:  # noqa: BLE001 - raised again in the green thread
            call.error = error
        call.is_done = True
        self._hub.call_soon(_resume, call)


def _resume(call: _Call) -> None:
    """In the hub: switch to the green thread that waits for the call."""
    call.green.switch()


class _ThreadShare:
    """asyncio's state per thread (running loop and task): this loop's while its green thread runs, else that of the others."""

    def __init__(self, green: object) -> None:
        self._green = green
        self._kept = _taken()
        self._traced_before: Any = None

    def __enter__(self) -> None:
        _put(None, None, (None, None))
        self._traced_before = greenlet.settrace(self._on_switch)

    def __exit__(self, *_: object) -> None:
        greenlet.settrace(self._traced_before)
        _put(*self._kept)

    def _on_switch(self, event: str, ends: tuple[object, object]) -> None:
        if self._green in ends:
            kept, self._kept = self._kept, _taken()
            _put(*kept)
        if self._traced_before is not None:
            self._traced_before(event, ends)


def _taken() -> tuple[asyncio.AbstractEventLoop | None, asyncio.Task[Any] | None, tuple[Any, Any]]:
    """The running loop, the task that runs in it, and the hooks. Since Python 3.14 the task is the thread's, not the loop's."""
    loop = asyncio._get_running_loop()
    task = asyncio.current_task(loop) if loop is not None and sys.version_info >= (3, 14) else None
    if loop is not None and task is not None:
        asyncio.tasks._leave_task(loop, task)
    return loop, task, sys.get_asyncgen_hooks()


def _put(loop: asyncio.AbstractEventLoop | None, task: asyncio.Task[Any] | None, hooks: tuple[Any, Any]) -> None:
    asyncio._set_running_loop(loop)
    if loop is not None and task is not None:
        asyncio.tasks._enter_task(loop, task)
    sys.set_asyncgen_hooks(*hooks)


class _HubSelector(BaseSelector):
    """The system's selector, with a `select` that waits in the hub."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._selector: DefaultSelector = hub.native_selector()
        self._green: Any = None

    def register(self, fileobj: FileDescriptorLike, events: int, data: object = None) -> SelectorKey:
        """The system's."""
        return self._selector.register(fileobj, events, data)

    def unregister(self, fileobj: FileDescriptorLike) -> SelectorKey:
        """The system's."""
        return self._selector.unregister(fileobj)

    def get_map(self) -> Mapping[FileDescriptorLike, SelectorKey]:
        """The system's."""
        return self._selector.get_map()

    def close(self) -> None:
        """The system's."""
        self._selector.close()

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        """`timeout` in seconds, None: for ever."""
        ready = self._selector.select(0)
        if ready:
            return ready
        try:
            # Also when the loop is busy: other green threads must get their turn.
            self._green = self._hub.current()
            self._hub.wait_readable(self._selector.fileno(), timeout)
        finally:
            self._green = None
        return self._selector.select(0)

    def wake(self) -> None:
        """End `select`: the loop has something to do."""
        if self._green is not None:
            self._hub.call_soon(self._switch)

    def _switch(self) -> None:
        green, self._green = self._green, None
        if green is not None:
            green.switch()

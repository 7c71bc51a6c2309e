"""Lets a coroutine await a result that a thread delivers by a call."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Protocol

from amqtask.backends.mailbox import too_late
from amqtask.ground.deadlines import arrival
from amqtask.protocol.result import ResultMessage

OnResult = Callable[[ResultMessage], None]
# Called with the result, or with why there will be none.
Arrived = Callable[[ResultMessage | Exception], None]


class CallsBack(Protocol):
    """A backend that calls when a result is ready."""

    def add_callback(self, task_id: str, callback: OnResult) -> None: ...

    def cancel_callback(self, task_id: str, callback: OnResult) -> None: ...


async def await_arrival(
    task_id: str, timeout: float | None, subscribe: Callable[[Arrived], Callable[[], None]]
) -> ResultMessage:
    """The result that `arrived` is called with, from any thread, after `subscribe(arrived)`, which returns how to unsubscribe.

    Raises: TimeoutError, the error that arrived."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[ResultMessage] = loop.create_future()

    def settle(result_or_error: ResultMessage | Exception) -> None:
        if future.done():
            return
        if isinstance(result_or_error, Exception):
            future.set_exception(result_or_error)
        else:
            future.set_result(result_or_error)

    def arrived(result_or_error: ResultMessage | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed, and nobody waits there any more
            loop.call_soon_threadsafe(settle, result_or_error)

    cancel = subscribe(arrived)
    try:
        return await arrival(future, timeout)
    except asyncio.TimeoutError:
        raise too_late([task_id], 1, timeout) from None
    finally:
        cancel()


async def await_callback(backend: CallsBack, task_id: str, timeout: float | None) -> ResultMessage:
    """The result, when the backend's thread delivers it. Raises: TimeoutError."""

    def subscribe(arrived: Arrived) -> Callable[[], None]:
        backend.add_callback(task_id, arrived)
        return lambda: backend.cancel_callback(task_id, arrived)

    return await await_arrival(task_id, timeout, subscribe)

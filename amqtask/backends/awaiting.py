"""From a callback on some thread to a coroutine that awaits it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from amqtask.backends.waiting import too_late
from amqtask.protocol.result import ResultMessage

OnResult = Callable[[ResultMessage], None]


class CallsBack(Protocol):
    """A backend that calls when a result is ready."""

    def add_callback(self, task_id: str, callback: OnResult) -> None: ...

    def cancel_callback(self, task_id: str, callback: OnResult) -> None: ...


async def await_callback(backend: CallsBack, task_id: str, timeout: float | None) -> ResultMessage:
    """The result, when the backend's thread says so. Raises: TimeoutError."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[ResultMessage] = loop.create_future()

    def settle(result: ResultMessage) -> None:
        if not future.done():
            future.set_result(result)

    def arrived(result: ResultMessage) -> None:
        loop.call_soon_threadsafe(settle, result)

    backend.add_callback(task_id, arrived)
    try:
        return await asyncio.wait_for(future, timeout)
    except asyncio.TimeoutError:
        raise too_late([task_id], 1, timeout) from None
    finally:
        backend.cancel_callback(task_id, arrived)

"""Awaiting that ends in time, and keeps no cancellation to itself.

`asyncio.wait_for` waits until what it cancels has ended, however long that takes; and before Python 3.12 it may swallow the
cancellation of whoever awaits it (python/cpython#81839, #86296). Here a deadline is kept, and a cancellation passed on, even
when a library does neither: what does not end is left behind, cancelled.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar, overload

T = TypeVar("T")
# What is cancelled and goes on is cancelled again after so many seconds, and so often, before nobody waits for it any more.
GRACE, ATTEMPTS = 0.1, 3
# Event loops hold tasks by weak references only.
_left_behind: set[asyncio.Future[Any]] = set()


@overload
def end_of(timeout: float) -> float: ...
@overload
def end_of(timeout: float | None) -> float | None: ...
def end_of(timeout: float | None) -> float | None:
    """When so many seconds have passed, on the monotonic clock; None: never. Raises: TypeError, ValueError."""
    if timeout is None:
        return None
    try:
        end = time.monotonic() + timeout  # also with other libraries' numbers
    except TypeError:
        raise TypeError(f"timeout is a number of seconds, or None, not {timeout!r}") from None
    if math.isnan(end):  # no time is at or after it
        raise ValueError("timeout is a number of seconds, or None, not nan")
    return end


async def arrival(future: asyncio.Future[T], timeout: float | None) -> T:
    """The result of a bare future, one that somebody sets. Raises: asyncio.TimeoutError after `timeout` seconds."""
    if timeout is None:
        return await future
    timer = future.get_loop().call_later(max(0.0, timeout), _expire, future)
    try:
        return await future
    finally:
        timer.cancel()


def _expire(future: asyncio.Future[T]) -> None:
    if not future.done():
        future.set_exception(asyncio.TimeoutError())


async def ended(
    awaitable: Awaitable[T], seconds: float, give_back: Callable[[T], object] | None = None
) -> asyncio.Future[T] | None:
    """The future of a coroutine that has ended, well or not; None when it has not within so many seconds, and was cancelled.

    `give_back(result)` is called if it succeeds all the same, after the deadline or our caller's cancellation."""
    if seconds <= 0 and asyncio.iscoroutine(awaitable):
        awaitable.close()
        return None
    task = asyncio.ensure_future(awaitable)
    try:
        await asyncio.wait({task}, timeout=max(0.0, seconds))
        if task.done():
            return task
        await _cancelled({task})
    except asyncio.CancelledError:
        leave_behind(task, give_back)
        await _cancelled({task})
        raise
    if task.done() and not task.cancelled() and task.exception() is None:
        return task
    leave_behind(task, give_back)
    return None


def leave_behind(awaitable: Awaitable[T], give_back: Callable[[T], object] | None = None) -> None:
    """Let a cancelled task end with nobody who waits for it."""

    def on_ended(task: asyncio.Future[T]) -> None:
        _left_behind.discard(task)
        if not task.cancelled() and task.exception() is None and give_back is not None:
            give_back(task.result())

    task = asyncio.ensure_future(awaitable)
    _left_behind.add(task)
    task.add_done_callback(on_ended)


async def cancel_all(tasks: Iterable[asyncio.Future[T]]) -> None:
    """Cancel tasks and let them end, so that nothing of them is left when their loop stops now."""
    futures = set(tasks)
    for task in futures:
        leave_behind(task)
    await _cancelled(futures)


async def _cancelled(tasks: set[asyncio.Future[T]]) -> None:
    for _ in range(ATTEMPTS):
        for task in tasks:
            task.cancel()
        tasks = {task for task in tasks if not task.done()}
        if not tasks:
            return
        await asyncio.wait(tasks, timeout=GRACE)

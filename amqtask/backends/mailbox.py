"""Results of this process by task id: what is known, who waits; shared by the stores that push results to the caller.

A result stays for as long as somebody holds its AsyncResult. Of those that nobody holds, the oldest go first: past
`capacity` if they were never read (a caller may have kept the id only), past `recent` if they were. So a process that publishes
for ever and looks at few of its results does not grow for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol
from weakref import ref

from amqtask import states
from amqtask.exceptions import TimeoutError
from amqtask.ground.deadlines import arrival
from amqtask.protocol.result import ResultMessage

OnResult = Callable[[ResultMessage], None]
CAPACITY = 100_000
RECENT = 1_000


class Mailbox:
    """The newest result per task; callbacks run once, when a result is ready.

    Safe across threads, and in signal handlers that interrupt one: there is no lock. Each step is one of a dictionary's own, and
    at no time between two of them is a result that was known in no place. Dead holders are swept, not reported: a weak
    reference's callback would swallow an exception that strikes in it.
    """

    def __init__(self, capacity: int = CAPACITY, recent: int = RECENT) -> None:
        self._capacity = capacity
        self._recent = recent
        self._unread: OrderedDict[str, ResultMessage] = OrderedDict()
        self._read: OrderedDict[str, ResultMessage] = OrderedDict()
        # Past the limits, but somebody holds (or held) them; swept when it has doubled, as the holders are.
        self._held: dict[str, ResultMessage] = {}
        self._sweep_at = 1_000
        self._holders: dict[str, ref[Any]] = {}
        self._sweep_holders_at = 1_000
        self._callbacks: dict[str, list[OnResult]] = {}

    def __len__(self) -> int:
        return len(self._unread) + len(self._read) + len(self._held)

    def hold(self, task_id: str, holder: object) -> None:
        """Keep the result for as long as `holder` lives."""
        self._holders[task_id] = ref(holder)
        if len(self._holders) > self._sweep_holders_at:
            for held_id, reference in list(self._holders.items()):
                if reference() is None:
                    self._holders.pop(held_id, None)
            self._sweep_holders_at = max(1_000, 2 * len(self._holders))

    def _is_held(self, task_id: str) -> bool:
        reference = self._holders.get(task_id)
        return reference is not None and reference() is not None

    def expected(self) -> list[str]:
        """The tasks whose results somebody holds or waits for, and that have not come."""
        held = [task_id for task_id in list(self._holders) if self._is_held(task_id)]
        return [task_id for task_id in dict.fromkeys([*held, *self._callbacks]) if not self.is_ready(task_id)]

    def put(self, result: ResultMessage) -> None:
        """Note a result; a final one is never overwritten by an earlier state, nor SUCCESS by anything."""
        task_id = result.task_id
        stored = self._find(task_id)
        if stored is not None and _outranks(stored, result):
            return
        self._unread[task_id] = result
        self._unread.move_to_end(task_id)
        self._read.pop(task_id, None)
        self._held.pop(task_id, None)
        self._trim(self._unread, self._capacity)
        if result.is_ready:
            waiting = self._callbacks.pop(task_id, [])
            for callback in list(waiting):
                if _taken(waiting, callback):
                    callback(result)

    def find(self, task_id: str) -> ResultMessage | None:
        """The newest result of a task, or None."""
        return self._find(task_id)

    def is_ready(self, task_id: str) -> bool:
        """Whether the final result has come."""
        stored = self._find(task_id)
        return stored is not None and stored.is_ready

    def take(self, task_id: str) -> ResultMessage | None:
        """The same as `find`, for somebody who keeps a final result."""
        stored = self._find(task_id)
        if stored is not None and stored.is_ready and task_id in self._unread:
            self._read[task_id] = stored
            self._unread.pop(task_id, None)
            self._trim(self._read, self._recent)
        return stored

    def forget(self, task_id: str) -> None:
        """Drop the result."""
        for results in (self._unread, self._read, self._held):
            results.pop(task_id, None)

    def when_ready(self, task_id: str, callback: OnResult) -> None:
        """Call `callback` once, now or when the result comes."""
        waiting = self._callbacks.setdefault(task_id, [])
        waiting.append(callback)
        stored = self._find(task_id)
        if stored is not None and stored.is_ready and _taken(waiting, callback):
            callback(stored)  # it has come between the two

    def cancel(self, task_id: str, callback: OnResult) -> None:
        """Cancel a callback."""
        waiting = self._callbacks.get(task_id, [])
        if _taken(waiting, callback) and not waiting:
            self._callbacks.pop(task_id, None)

    def _find(self, task_id: str) -> ResultMessage | None:
        return self._unread.get(task_id) or self._read.get(task_id) or self._held.get(task_id)

    def _trim(self, results: OrderedDict[str, ResultMessage], limit: int) -> None:
        while len(results) > limit:
            task_id, result = next(iter(results.items()))
            if self._is_held(task_id):
                self._held[task_id] = result
            results.pop(task_id, None)
        if len(self._held) > self._sweep_at:
            for held_id in list(self._held):
                if not self._is_held(held_id):
                    self._held.pop(held_id, None)
            self._sweep_at = max(1_000, 2 * len(self._held))


def _outranks(stored: ResultMessage, new: ResultMessage) -> bool:
    return stored.status == states.SUCCESS or (stored.is_ready and not new.is_ready)


def _taken(waiting: list[OnResult], callback: OnResult) -> bool:
    """Take a callback off the list; whoever succeeds calls it."""
    try:
        waiting.remove(callback)
    except ValueError:
        return False
    return True


class Arrivals:
    """The results of some tasks in the order in which they become ready; cheap to ask however many are awaited."""

    def __init__(self, mailbox: Mailbox, task_ids: Sequence[str]) -> None:
        self._mailbox = mailbox
        self._task_ids = task_ids
        self._missing = set(task_ids)
        self.ready: deque[ResultMessage] = deque()
        for task_id in list(self._missing):
            mailbox.when_ready(task_id, self._arrived)

    def _arrived(self, result: ResultMessage) -> None:
        self._missing.discard(result.task_id)
        self.ready.append(result)

    @property
    def missing(self) -> int:
        """How many results have not come."""
        return len(self._missing)

    def __bool__(self) -> bool:
        return bool(self.ready)

    def next(self) -> ResultMessage:
        """The next result that has come."""
        result = self.ready.popleft()
        self._mailbox.take(result.task_id)
        return result

    def each(self, timeout: float | None, wait: Callable[[float | None], bool]) -> Iterator[tuple[str, ResultMessage]]:
        """All of them by task id, within `timeout` seconds. `wait(deadline)`: whether one has come. Raises: TimeoutError."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self or self._missing:
            if not self and not wait(deadline):
                raise too_late(self._task_ids, self.missing, timeout)
            while self:
                result = self.next()
                yield result.task_id, result

    def close(self) -> None:
        """Stop waiting."""
        for task_id in list(self._missing):
            self._mailbox.cancel(task_id, self._arrived)


def too_late(task_ids: Sequence[str], missing: int, timeout: float | None) -> TimeoutError:
    """The error for results that did not come in time."""
    seconds = f"{timeout or 0:g} s"
    if len(task_ids) == 1:
        return TimeoutError(f"no result of task {task_ids[0]} within {seconds}")
    return TimeoutError(f"{missing} of {len(task_ids)} results did not come within {seconds}")


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

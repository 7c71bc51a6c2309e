"""Results of this process by task id: what is known, who waits; shared by the stores that push results to the caller.

A result stays for as long as somebody holds its AsyncResult. Of those that nobody holds, the oldest go first: past
`capacity` if they were never read (a caller may have kept the id only), past `recent` if they were. So a process that publishes
for ever and looks at few of its results does not grow for ever.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakValueDictionary

from amqtask import states
from amqtask.exceptions import TimeoutError
from amqtask.printable import bounded_logger
from amqtask.protocol.result import ResultMessage

logger = bounded_logger("amqtask.backends")
OnResult = Callable[[ResultMessage], None]
CAPACITY = 100_000
RECENT = 1_000


class Mailbox:
    """The newest result per task; callbacks run once, when a result is ready. Safe across threads."""

    def __init__(self, capacity: int = CAPACITY, recent: int = RECENT) -> None:
        self._capacity = capacity
        self._recent = recent
        self._lock = threading.Lock()
        self._unread: OrderedDict[str, ResultMessage] = OrderedDict()
        self._read: OrderedDict[str, ResultMessage] = OrderedDict()
        # Past the limits, but somebody holds (or held) them; swept when it has doubled.
        self._held: dict[str, ResultMessage] = {}
        self._sweep_at = 1_000
        self._holders: WeakValueDictionary[str, Any] = WeakValueDictionary()
        self._callbacks: dict[str, list[OnResult]] = {}

    def __len__(self) -> int:
        return len(self._unread) + len(self._read) + len(self._held)

    def hold(self, task_id: str, holder: object) -> None:
        """Keep the result for as long as `holder` lives."""
        self._holders[task_id] = holder

    def put(self, result: ResultMessage) -> None:
        """Note a result; a final one is never overwritten by an earlier state, nor SUCCESS by anything."""
        task_id = result.task_id
        with self._lock:
            known = self._find(task_id)
            if known is not None and _outranks(known, result):
                return
            self._drop(task_id)
            self._unread[task_id] = result
            self._trim(self._unread, self._capacity)
            callbacks = self._callbacks.pop(task_id, ()) if result.is_ready else ()
        for callback in callbacks:
            _call(callback, result)

    def get(self, task_id: str) -> ResultMessage | None:
        """What is known."""
        with self._lock:
            return self._find(task_id)

    def is_ready(self, task_id: str) -> bool:
        """Whether the final result is known."""
        known = self._unread.get(task_id) or self._read.get(task_id) or self._held.get(task_id)
        return known is not None and known.is_ready

    def take(self, task_id: str) -> ResultMessage | None:
        """The same as `get`, for somebody who keeps a final result."""
        with self._lock:
            known = self._find(task_id)
            if known is not None and known.is_ready and self._unread.pop(task_id, None) is not None:
                self._read[task_id] = known
                self._trim(self._read, self._recent)
            return known

    def forget(self, task_id: str) -> None:
        """Drop it."""
        with self._lock:
            self._drop(task_id)

    def when_ready(self, task_id: str, callback: OnResult) -> None:
        """Call once, now or when the result comes."""
        with self._lock:
            known = self._find(task_id)
            if known is None or not known.is_ready:
                self._callbacks.setdefault(task_id, []).append(callback)
                return
        _call(callback, known)

    def cancel(self, task_id: str, callback: OnResult) -> None:
        """Do not call it any more."""
        with self._lock:
            waiting = self._callbacks.get(task_id)
            if waiting is not None and callback in waiting:
                waiting.remove(callback)
                if not waiting:
                    del self._callbacks[task_id]

    def _find(self, task_id: str) -> ResultMessage | None:
        return self._unread.get(task_id) or self._read.get(task_id) or self._held.get(task_id)

    def _drop(self, task_id: str) -> None:
        for place in (self._unread, self._read, self._held):
            if place.pop(task_id, None) is not None:
                return

    def _trim(self, place: OrderedDict[str, ResultMessage], limit: int) -> None:
        while len(place) > limit:
            task_id, result = place.popitem(last=False)
            if task_id in self._holders:
                self._held[task_id] = result
        if len(self._held) > self._sweep_at:
            self._held = {task_id: result for task_id, result in self._held.items() if task_id in self._holders}
            self._sweep_at = max(1_000, 2 * len(self._held))


def _outranks(known: ResultMessage, new: ResultMessage) -> bool:
    return known.status == states.SUCCESS or (known.is_ready and not new.is_ready)


def _call(callback: OnResult, result: ResultMessage) -> None:
    try:
        callback(result)
    except Exception:
        logger.exception("a callback for the result of task %s failed", result.task_id)


class Arrivals:
    """The results of some tasks in the order in which they become ready; cheap to ask however many are awaited."""

    def __init__(self, mailbox: Mailbox, task_ids: Iterable[str]) -> None:
        self._mailbox = mailbox
        self._left = set(task_ids)
        self.ready: deque[ResultMessage] = deque()
        for task_id in list(self._left):
            mailbox.when_ready(task_id, self._arrived)

    def _arrived(self, result: ResultMessage) -> None:
        self._left.discard(result.task_id)
        self.ready.append(result)

    @property
    def missing(self) -> int:
        """How many have not come."""
        return len(self._left)

    def __bool__(self) -> bool:
        return bool(self.ready)

    def next(self) -> ResultMessage:
        """The next one that is here."""
        result = self.ready.popleft()
        self._mailbox.take(result.task_id)
        return result

    def close(self) -> None:
        """Nobody waits any more."""
        for task_id in list(self._left):
            self._mailbox.cancel(task_id, self._arrived)


def too_late(task_ids: Sequence[str], missing: int, timeout: float | None) -> TimeoutError:
    """The error for results that did not come in time."""
    seconds = f"{timeout or 0:g} s"
    if len(task_ids) == 1:
        return TimeoutError(f"no result of task {task_ids[0]} within {seconds}")
    return TimeoutError(f"{missing} of {len(task_ids)} results did not come within {seconds}")

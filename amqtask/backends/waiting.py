"""Results of this process by task id: what is known, who waits; shared by the stores that push results to the caller."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

from amqtask.protocol.result import ResultMessage

logger = logging.getLogger("amqtask.backends")
OnResult = Callable[[ResultMessage], None]
# Ready results that nobody has fetched; the oldest go first.
CAPACITY = 100_000


class Mailbox:
    """The newest result per task; callbacks run once, when a result is ready."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._results: OrderedDict[str, ResultMessage] = OrderedDict()
        self._callbacks: dict[str, list[OnResult]] = {}
        self._capacity = capacity

    def put(self, result: ResultMessage) -> None:
        """Note a result; a ready one is never overwritten by an earlier state."""
        known = self._results.get(result.task_id)
        if known is not None and known.is_ready and not result.is_ready:
            return
        self._results[result.task_id] = result
        if len(self._results) > self._capacity:
            self._results.popitem(last=False)
        if result.is_ready:
            for callback in self._callbacks.pop(result.task_id, ()):
                try:
                    callback(result)
                except Exception:
                    logger.exception("a callback for the result of task %s failed", result.task_id)

    def get(self, task_id: str) -> ResultMessage | None:
        """What is known."""
        return self._results.get(task_id)

    def is_ready(self, task_id: str) -> bool:
        """Whether the final result is known."""
        known = self._results.get(task_id)
        return known is not None and known.is_ready

    def forget(self, task_id: str) -> None:
        """Drop it."""
        self._results.pop(task_id, None)

    def when_ready(self, task_id: str, callback: OnResult) -> None:
        """Call once, now or when the result comes."""
        known = self._results.get(task_id)
        if known is not None and known.is_ready:
            callback(known)
        else:
            self._callbacks.setdefault(task_id, []).append(callback)
            known = self._results.get(task_id)  # it may have come in between, on another thread
            if known is not None and known.is_ready:
                waiting = self._callbacks.get(task_id, [])
                if callback in waiting:
                    waiting.remove(callback)
                    callback(known)

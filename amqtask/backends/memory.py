"""`cache+memory://`: results in this process, for tests and eager tasks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

from amqtask.backends.async_wait import await_callback
from amqtask.backends.chords import MemoryChords
from amqtask.backends.contract import BackendOptions, KnownStore
from amqtask.backends.mailbox import Arrivals, Mailbox, too_late
from amqtask.protocol.message import Message
from amqtask.protocol.result import ResultMessage, decode_result, encode_result
from amqtask.protocol.serialization import content_types


class MemoryBackend(MemoryChords, KnownStore):
    """See amqtask.backends.contract.ResultBackend. Values pass through the serializer, as they would elsewhere."""

    # What nobody holds goes by itself (amqtask.backends.mailbox).
    supports_autoexpire = True

    def __init__(self, options: BackendOptions) -> None:
        super().__init__(options.serializer)
        self._serializer = options.serializer
        self._accept = content_types([options.serializer])
        self._mailbox = Mailbox()
        self._changed = threading.Condition()
        self._groups: dict[str, object] = {}

    def message_for(self, result: ResultMessage, reply_to: str | None, correlation_id: str | None) -> Message | None:
        """None: results stay in this process."""
        return None

    def store(self, result: ResultMessage) -> None:
        """Keep a copy, as another process would read it. Raises: EncodeError."""
        self._mailbox.put(decode_result(*encode_result(result, self._serializer), self._accept))
        with self._changed:
            self._changed.notify_all()

    def reply_to(self) -> str:
        """None needed."""
        return ""

    def prepare(self, task_ids: Sequence[str], timeout: float | None = None) -> None:
        """Nothing to prepare."""

    def hold(self, task_id: str, holder: object) -> None:
        """Keep the result while `holder` lives."""
        self._mailbox.hold(task_id, holder)

    def find(self, task_id: str) -> ResultMessage | None:
        """The stored result, or None."""
        return self._mailbox.find(task_id)

    def wait(
        self, task_id: str, *, timeout: float | None, on_interval: Callable[[], None] | None = None
    ) -> ResultMessage:
        """Block until the result is there."""
        return next(self.iter_ready([task_id], timeout=timeout))[1]

    async def await_result(self, task_id: str, *, timeout: float | None) -> ResultMessage:
        """`wait` for an event loop."""
        return await await_callback(self, task_id, timeout)

    def iter_ready(self, task_ids: Sequence[str], *, timeout: float | None) -> Iterator[tuple[str, ResultMessage]]:
        """Each result as it is stored."""
        deadline = None if timeout is None else time.monotonic() + timeout
        arrivals = Arrivals(self._mailbox, task_ids)
        try:
            while arrivals or arrivals.missing:
                with self._changed:
                    remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
                    if not self._changed.wait_for(lambda: bool(arrivals), remaining):
                        raise too_late(task_ids, arrivals.missing, timeout)
                while arrivals:
                    result = arrivals.next()
                    yield result.task_id, result
        finally:
            arrivals.close()

    def add_callback(self, task_id: str, callback: Callable[[ResultMessage], None]) -> None:
        """Call once when the result is stored."""
        self._mailbox.when_ready(task_id, callback)

    def cancel_callback(self, task_id: str, callback: Callable[[ResultMessage], None]) -> None:
        """Cancel a callback."""
        self._mailbox.cancel(task_id, callback)

    def forget(self, task_id: str) -> None:
        """Drop the result."""
        self._mailbox.forget(task_id)

    def save_group(self, group_id: str, members: object) -> None:
        """Keep a group's results (their ids)."""
        self._groups[group_id] = members

    def restore_group(self, group_id: str) -> object:
        """What `save_group` kept; None when there is nothing."""
        return self._groups.get(group_id)

    def delete_group(self, group_id: str) -> None:
        """Delete the group."""
        self._groups.pop(group_id, None)

    def cleanup(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to close."""

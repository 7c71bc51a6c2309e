"""`cache+memory://`: results in this process, for tests and eager tasks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from amqtask.backends.contract import BackendOptions
from amqtask.backends.rpc import hand_over
from amqtask.backends.waiting import Mailbox
from amqtask.exceptions import TimeoutError
from amqtask.message import Message
from amqtask.protocol.result import ResultMessage, decode_result, encode_result
from amqtask.serialization import content_types


class MemoryBackend:
    """See amqtask.backends.contract.ResultBackend. Values pass through the serializer, as they would elsewhere."""

    def __init__(self, options: BackendOptions) -> None:
        self._options = options
        self._mailbox = Mailbox()
        self._changed = threading.Condition()

    def message_for(self, result: ResultMessage, reply_to: str | None, correlation_id: str | None) -> Message | None:
        """Nothing travels."""
        return None

    def store(self, result: ResultMessage) -> None:
        """Keep a copy, as another process would read it. Raises: EncodeError."""
        body, content_type, content_encoding = encode_result(result, self._options.serializer)
        copy = decode_result(body, content_type, content_encoding, content_types([self._options.serializer]))
        with self._changed:
            self._mailbox.put(copy)
            self._changed.notify_all()

    def reply_to(self) -> str:
        """None needed."""
        return ""

    def prepare(self, task_ids: Sequence[str]) -> None:
        """Nothing to prepare."""

    def get(self, task_id: str) -> ResultMessage | None:
        """What is known."""
        return self._mailbox.get(task_id)

    def wait(
        self, task_id: str, *, timeout: float | None, on_interval: Callable[[], None] | None = None
    ) -> ResultMessage:
        """Block until the result is there."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._mailbox.is_ready(task_id), timeout):
                raise TimeoutError(f"no result of task {task_id} within {timeout:g} s")
            found = self._mailbox.get(task_id)
        assert found is not None
        return found

    async def await_result(self, task_id: str, *, timeout: float | None) -> ResultMessage:
        """The same for an event loop."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ResultMessage] = loop.create_future()
        self.add_callback(task_id, lambda result: hand_over(loop, future, result))
        try:
            return await asyncio.wait_for(future, timeout)
        except asyncio.TimeoutError:
            raise TimeoutError(f"no result of task {task_id} within {timeout:g} s") from None

    def iter_ready(self, task_ids: Sequence[str], *, timeout: float | None) -> Iterator[tuple[str, ResultMessage]]:
        """Each as it is stored; `timeout` is for the next one."""
        left = dict.fromkeys(task_ids)
        while left:
            deadline = None if timeout is None else time.monotonic() + timeout
            with self._changed:
                wait = None if deadline is None else max(0.0, deadline - time.monotonic())
                if not self._changed.wait_for(lambda: any(map(self._mailbox.is_ready, left)), wait):
                    raise TimeoutError(f"{len(left)} of {len(task_ids)} results did not come within {timeout:g} s")
                ready = [task_id for task_id in left if self._mailbox.is_ready(task_id)]
            for task_id in ready:
                del left[task_id]
                found = self._mailbox.get(task_id)
                assert found is not None
                yield task_id, found

    def add_callback(self, task_id: str, callback: Callable[[ResultMessage], None]) -> None:
        """Call once when the result is stored."""
        with self._changed:
            self._mailbox.when_ready(task_id, callback)

    def forget(self, task_id: str) -> None:
        """Drop it."""
        self._mailbox.forget(task_id)

    def close(self) -> None:
        """Nothing to close."""

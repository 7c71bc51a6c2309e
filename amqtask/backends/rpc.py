"""`rpc://`: results travel as messages to a queue of the caller's process (Celery's rpc backend, celery/backends/rpc.py).

One reply queue per process, durable, with `x-expires`, not auto-delete: results that come while the caller is disconnected wait
for it. Only the process that published a task can read its result.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence

from amqtask.backends.contract import BackendOptions
from amqtask.backends.waiting import Mailbox
from amqtask.entities import Queue, arguments
from amqtask.exceptions import BackendUnreachable, BrokerUnreachable, MessageError, TimeoutError
from amqtask.message import Delivery, Message, Properties
from amqtask.protocol.result import ResultMessage, decode_result, encode_result
from amqtask.transport.replies import ReplyConsumer

logger = logging.getLogger("amqtask.backends")


class RpcBackend:
    """See amqtask.backends.contract.ResultBackend."""

    def __init__(self, options: BackendOptions) -> None:
        self._options = options
        self._pid = -1

    # -- the worker's end

    def message_for(self, result: ResultMessage, reply_to: str | None, correlation_id: str | None) -> Message | None:
        """The message to the caller's queue; a caller that is gone loses nothing but its own interest."""
        body, content_type, content_encoding = encode_result(result, self._options.serializer)
        return Message(
            body,
            Properties(
                content_type=content_type,
                content_encoding=content_encoding,
                delivery_mode=2 if self._options.persistent else 1,
                correlation_id=correlation_id or result.task_id,
                priority=0,
            ),
            "",
            reply_to or "",
            mandatory=False,
        )

    def store(self, result: ResultMessage) -> None:
        """Nothing: the worker publishes what `message_for` returned."""

    # -- the caller's end

    def reply_to(self) -> str:
        """The name of this process's queue."""
        self._own()
        return self._queue.name

    def prepare(self, task_ids: Sequence[str]) -> None:
        """Make sure that the queue exists before a worker may answer."""
        self._own()
        self._replies.ensure(self._options.connect_timeout)

    def get(self, task_id: str) -> ResultMessage | None:
        """What has come so far."""
        self._own()
        if not self._mailbox.is_ready(task_id):
            self._replies.poll()
        return self._mailbox.get(task_id)

    def wait(
        self, task_id: str, *, timeout: float | None, on_interval: Callable[[], None] | None = None
    ) -> ResultMessage:
        """Block until the result has come."""
        self._own()
        deadline = None if timeout is None else time.monotonic() + timeout
        mailbox = self._mailbox

        def is_ready() -> bool:
            return mailbox.is_ready(task_id)

        if not is_ready() and not self._drive(is_ready, deadline):
            raise TimeoutError(f"no result of task {task_id} within {timeout:g} s")
        found = mailbox.get(task_id)
        assert found is not None
        return found

    async def await_result(self, task_id: str, *, timeout: float | None) -> ResultMessage:
        """The same for an event loop; the queue is read by a background thread from now on."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ResultMessage] = loop.create_future()

        self.add_callback(task_id, lambda result: hand_over(loop, future, result))
        try:
            return await asyncio.wait_for(future, timeout)
        except asyncio.TimeoutError:
            raise TimeoutError(f"no result of task {task_id} within {timeout:g} s") from None

    def iter_ready(self, task_ids: Sequence[str], *, timeout: float | None) -> Iterator[tuple[str, ResultMessage]]:
        """Each as it comes; `timeout` is for the next one."""
        self._own()
        left = dict.fromkeys(task_ids)
        mailbox = self._mailbox
        while left:
            ready = [task_id for task_id in left if mailbox.is_ready(task_id)]
            for task_id in ready:
                del left[task_id]
                found = mailbox.get(task_id)
                assert found is not None
                yield task_id, found
            if left and not ready:
                deadline = None if timeout is None else time.monotonic() + timeout
                if not self._drive(lambda: any(mailbox.is_ready(task_id) for task_id in left), deadline):
                    raise TimeoutError(f"{len(left)} of {len(task_ids)} results did not come within {timeout:g} s")

    def add_callback(self, task_id: str, callback: Callable[[ResultMessage], None]) -> None:
        """Call once when the result comes."""
        self._own()
        self._mailbox.when_ready(task_id, callback)
        self._replies.start_thread()

    def forget(self, task_id: str) -> None:
        """Drop what is known of it."""
        self._own()
        self._mailbox.forget(task_id)

    def close(self) -> None:
        """Delete the queue."""
        if self._pid == os.getpid():
            self._replies.close()
        self._pid = -1

    def _own(self) -> None:
        """A forked child has a queue of its own."""
        if self._pid == os.getpid():
            return
        self._pid = os.getpid()
        expires = self._options.expires
        given = {"x-expires": int(expires * 1000)} if expires else None
        self._queue = Queue(str(uuid.uuid4()), arguments=arguments(given))
        self._mailbox = Mailbox()
        self._replies = ReplyConsumer(
            self._options.brokers,
            self._queue,
            self._on_reply,
            connect_timeout=self._options.connect_timeout,
        )

    def _drive(self, done: Callable[[], bool], deadline: float | None) -> bool:
        try:
            return self._replies.drive(done, deadline)
        except BrokerUnreachable as error:
            raise BackendUnreachable(f"results cannot be read: {error}") from error

    def _on_reply(self, delivery: Delivery) -> None:
        properties = delivery.properties
        try:
            result = decode_result(
                delivery.body, properties.content_type, properties.content_encoding, self._options.accept
            )
        except MessageError as error:
            logger.error("a result message (%s) cannot be read: %s", properties.correlation_id, error)
            if properties.correlation_id:
                self._mailbox.put(_unreadable(properties.correlation_id, error))
            return
        self._mailbox.put(result)


def hand_over(loop: asyncio.AbstractEventLoop, future: asyncio.Future[ResultMessage], result: ResultMessage) -> None:
    """Set a future of another thread's loop, unless its waiter has given up."""

    def settle() -> None:
        if not future.done():
            future.set_result(result)

    loop.call_soon_threadsafe(settle)


def _unreadable(task_id: str, error: MessageError) -> ResultMessage:
    """Who waits for it gets the reason instead of a timeout."""
    described = {"exc_type": type(error).__name__, "exc_message": [str(error)], "exc_module": type(error).__module__}
    return ResultMessage(task_id, "FAILURE", described)

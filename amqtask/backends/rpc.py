"""`rpc://`: results travel as messages to a queue of the caller's process (Celery's rpc backend, celery/backends/rpc.py).

One reply queue per process, durable, with `x-expires`, not auto-delete: results that come while the caller is disconnected wait
for it. Only the process that published a task can read its result.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from weakref import ref

from amqtask import states
from amqtask.backends.contract import Arrived, BackendOptions, KnownStore, await_arrival, too_late
from amqtask.exceptions import BackendUnreachable, ConfigurationError, MessageError, PublishError, ResultLost
from amqtask.ground.deadlines import end_of
from amqtask.ground.lazy import ByProcess
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.compression import compress, decompress
from amqtask.protocol.entities import Queue, arguments
from amqtask.protocol.message import Delivery, Message, Properties
from amqtask.protocol.result import ResultMessage, decode_result, encode_result, exception_as_dict, is_reply_queue
from amqtask.protocol.serialization import content_types
from amqtask.transport.queue_reader import CLOSED, QueueReader

if TYPE_CHECKING:
    from amqtask.ground.shapes import QueueArgumentDict

logger = bounded_logger("amqtask.backends")
# Seconds between looks at the queue of a process that publishes and reads no results.
READ_EVERY = 0.1
MOST_KNOWN = 1000


# -- Results of this process by task id: what is known, who waits; also for the store that keeps them in memory.
#
# A result stays for as long as somebody holds its AsyncResult. Of those that nobody holds, the oldest go first: past
# `capacity` if they were never read (a caller may have kept the id only), past `recent` if they were. So a process that publishes
# for ever and looks at few of its results does not grow for ever.

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
        stored = self.find(task_id)
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
        return self._unread.get(task_id) or self._read.get(task_id) or self._held.get(task_id)

    def is_ready(self, task_id: str) -> bool:
        """Whether the final result has come."""
        stored = self.find(task_id)
        return stored is not None and stored.is_ready

    def take(self, task_id: str) -> ResultMessage | None:
        """The same as `find`, for somebody who keeps a final result."""
        stored = self.find(task_id)
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
        stored = self.find(task_id)
        if stored is not None and stored.is_ready and _taken(waiting, callback):
            callback(stored)  # it has come between the two

    def cancel(self, task_id: str, callback: OnResult) -> None:
        """Cancel a callback."""
        waiting = self._callbacks.get(task_id, [])
        if _taken(waiting, callback) and not waiting:
            self._callbacks.pop(task_id, None)

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
        deadline = end_of(timeout)
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


# -- over the broker


class _Inbox:
    """The results of one process: its reply queue, the consumer, and the mailbox of what has come."""

    def __init__(self, options: BackendOptions) -> None:
        transport_options = dict(options.transport_options)
        self._queue_type = str(transport_options.get("queue_type") or "classic")
        self._expires = options.expires
        self.mailbox = Mailbox(int(transport_options.get("unread_results") or CAPACITY))
        self.read_again_at = 0.0
        # The coroutines that wait, which nobody else would tell that there will be no more results.
        self.awaiting: set[Arrived] = set()
        # The names of queues whose results nobody reads any more.
        self.given_up: set[str] = set()
        self._accept = content_types(options.accept)
        self._largest_body = options.largest_body
        self.replies = QueueReader(
            options.brokers,
            self._new_queue(),
            self._on_reply,
            connect_timeout=options.connect_timeout,
            on_queue_lost=self._on_queue_lost,
        )

    @property
    def queue(self) -> Queue:
        """Where results come now."""
        return self.replies.queue

    def _new_queue(self) -> Queue:
        # Classic by default: one reader and short messages; three copies of each result cost more than they are worth to most.
        queue_arguments: QueueArgumentDict = {"x-queue-type": self._queue_type}
        if self._expires:
            queue_arguments["x-expires"] = max(1, int(self._expires * 1000))
        return Queue(str(uuid.uuid4()), arguments=arguments(queue_arguments))

    def _on_queue_lost(self, error: PublishError) -> Queue:
        """The queue is on a node that is away, with the results in it and those that are still sent there. Returns a new
        queue, on a node that works; those who wait get ResultLost."""
        lost, queue = self.queue, self._new_queue()
        # Before those who wait are looked for: who begins to wait afterwards sees it.
        self.given_up.add(lost.name)
        missing = self.mailbox.expected()
        logger.warning(
            "the queue of results %s is on a node that is away (%s); results come to %s from now on, %d are lost",
            lost.name, error, queue.name, len(missing),
        )  # fmt: skip
        for task_id in missing:
            self.tell_lost(task_id, lost.name)
        return queue

    def tell_lost(self, task_id: str, queue: str) -> None:
        """Whoever waits for the result of that task gets ResultLost, unless it has come."""
        reason = ResultLost(
            f"the result of task {task_id} is lost: the queue of results {queue} was on a node that is away. "
            "The task itself may have run, or run yet"
        )
        self.mailbox.put(ResultMessage(task_id, states.FAILURE, exception_as_dict(reason)))

    def _on_reply(self, delivery: Delivery) -> None:
        properties, body = delivery.properties, delivery.body
        try:
            if properties.headers and properties.headers.get("compression"):
                body = decompress(body, properties.headers["compression"], self._largest_body)
            result = decode_result(body, properties.content_type, properties.content_encoding, self._accept)
        except MessageError as error:
            logger.error("a result message (%s) cannot be read: %s", properties.correlation_id, error)
            if properties.correlation_id:
                # Who waits for it gets the reason instead of a timeout.
                self.mailbox.put(ResultMessage(properties.correlation_id, states.FAILURE, exception_as_dict(error)))
            return
        self.mailbox.put(result)


class RpcBackend(KnownStore):
    """See amqtask.backends.contract.ResultBackend.

    `transport_options`: `unread_results`, how many results that nobody holds or has read are kept (100,000); `queue_type`, of the
    queues of results ("classic"; "quorum" for ones that survive the loss of a node).
    """

    # The broker drops messages and queues.
    supports_autoexpire = True

    def __init__(self, options: BackendOptions) -> None:
        queue_type = dict(options.transport_options).get("queue_type")
        if queue_type not in (None, "classic", "quorum"):
            raise ConfigurationError(
                f"result_backend_transport_options: queue_type is 'classic' or 'quorum', not {queue_type!r}"
            )
        self._options = options
        self._expiration = str(max(1, int(options.expires * 1000))) if options.expires else None
        # Names that passed for reply queues, so that each is looked at once.
        self._reply_queues: set[str] = set()
        self._inboxes = ByProcess(lambda: _Inbox(options), lambda inbox: inbox.replies.close())

    # -- the worker's end

    def message_for(self, result: ResultMessage, reply_to: str | None, correlation_id: str | None) -> Message | None:
        """The message to the caller's queue; None when nobody asked. A caller that is gone loses only its own result."""
        if not reply_to:
            return None
        if reply_to not in self._reply_queues and not self._takes(reply_to, result.task_id):
            return None
        body, content_type, content_encoding = encode_result(result, self._options.serializer)
        headers: dict[str, Any] = {}
        if self._options.compression:
            body, headers["compression"] = compress(body, self._options.compression)
        return Message(
            body,
            Properties(
                headers=headers,
                content_type=content_type,
                content_encoding=content_encoding,
                delivery_mode=2 if self._options.persistent else 1,
                correlation_id=correlation_id or result.task_id,
                priority=0,
                # Messages to one queue are routed alike, so that any name will do to know a returned one by.
                message_id=result.task_id,
                # A reader that lives but does not read must not fill the broker.
                expiration=self._expiration,
            ),
            "",
            reply_to,
            # A caller that is gone loses a state that is on its way, and nobody looks for it.
            mandatory=result.is_ready,
        )

    def _takes(self, reply_to: str, task_id: str) -> bool:
        """Whether a name is that of a reply queue: whoever publishes a task names it, and must not reach a worker's mailbox
        or another queue with it."""
        if not is_reply_queue(reply_to, self._options.settings.get("result_reply_queues") or ()):
            logger.warning(
                "The result of task %s is not sent: its reply_to, %.60r, is not a reply queue (a UUID; see result_reply_queues)",
                task_id, reply_to,
            )  # fmt: skip
            return False
        if len(self._reply_queues) >= MOST_KNOWN:
            self._reply_queues.clear()
        self._reply_queues.add(reply_to)
        return True

    def store(self, result: ResultMessage) -> None:
        """Do nothing: the worker publishes what `message_for` returned."""

    # -- the caller's end

    def reply_to(self) -> str:
        """The name of this process's queue."""
        return self._inbox().queue.name

    def prepare(self, task_ids: Sequence[str], timeout: float | None = None) -> None:
        """Make sure that the queue exists before a worker may answer; read it now and then, even if nobody waits.

        Raises: BrokerUnreachable, AccessRefused."""
        self._inbox().replies.ensure(self._patience(timeout))
        self.keep_reading()

    @property
    def reply_queue(self) -> Queue:
        """This process's queue, for calls that are published later by another one."""
        return self._inbox().queue

    def keep_reading(self) -> None:
        """Read the queue now and then, and do without it while the broker is away."""
        inbox = self._inbox()
        now = time.monotonic()
        if now >= inbox.read_again_at:
            inbox.read_again_at = now + READ_EVERY
            inbox.replies.poll()

    def start_reading(self) -> None:
        """`keep_reading` for an event loop: in a thread, and without waiting for it."""
        self._inbox().replies.start_thread()

    async def aprepare(self, timeout: float | None = None) -> None:
        """`prepare` for an event loop: a thread reads the queue from now on."""
        inbox = self._inbox()
        if not inbox.replies.is_consuming:
            await asyncio.to_thread(inbox.replies.ensure, self._patience(timeout))
        inbox.replies.start_thread()

    def _patience(self, timeout: float | None) -> float:
        limits = (self._options.connect_timeout, self._options.publish_timeout if timeout is None else timeout)
        return min(limit for limit in limits if limit is not None)

    def hold(self, task_id: str, holder: object) -> None:
        """Keep the result while `holder` lives."""
        self._inbox().mailbox.hold(task_id, holder)

    def sent(self, task_id: str, reply_to: str) -> None:
        """Tell its holder, if the queue was given up while the call was on its way."""
        inbox = self._inbox()
        if reply_to in inbox.given_up:
            inbox.tell_lost(task_id, reply_to)

    def find(self, task_id: str) -> ResultMessage | None:
        """The result, if it has come."""
        inbox = self._inbox()
        result = inbox.mailbox.find(task_id)
        # After a failure the success of another run of the task may be on its way.
        if result is None or result.status != states.SUCCESS:
            inbox.replies.poll()
        return inbox.mailbox.take(task_id)

    def wait(self, task_id: str, *, timeout: float | None) -> ResultMessage:
        """Block until the result has come."""
        inbox = self._inbox()
        mailbox = inbox.mailbox
        if not mailbox.is_ready(task_id):
            deadline = end_of(timeout)
            if not self._drive(inbox, lambda: mailbox.is_ready(task_id), deadline):
                raise too_late([task_id], 1, timeout)
        result = mailbox.take(task_id)
        assert result is not None
        return result

    async def await_result(self, task_id: str, *, timeout: float | None) -> ResultMessage:
        """`wait` for an event loop; a background thread reads the queue from now on."""
        inbox = self._inbox()

        def subscribe(arrived: Arrived) -> Callable[[], None]:
            def cancel() -> None:
                inbox.awaiting.discard(arrived)
                inbox.mailbox.cancel(task_id, arrived)

            inbox.awaiting.add(arrived)
            inbox.mailbox.when_ready(task_id, arrived)
            inbox.replies.start_thread()
            return cancel

        return await await_arrival(task_id, timeout, subscribe)

    def iter_ready(self, task_ids: Sequence[str], *, timeout: float | None) -> Iterator[tuple[str, ResultMessage]]:
        """Each result as it comes."""
        inbox = self._inbox()
        with contextlib.closing(Arrivals(inbox.mailbox, task_ids)) as arrivals:
            if not timeout and arrivals.missing:
                inbox.replies.poll()
            yield from arrivals.each(timeout, lambda deadline: self._drive(inbox, arrivals.__bool__, deadline))

    def add_callback(self, task_id: str, callback: Callable[[ResultMessage], None]) -> None:
        """Call once when the result comes, from a thread that reads the queue from now on."""
        inbox = self._inbox()
        inbox.mailbox.when_ready(task_id, callback)
        inbox.replies.start_thread()

    def forget(self, task_id: str) -> None:
        """Drop the result."""
        self._inbox().mailbox.forget(task_id)

    def close(self) -> None:
        """Delete the queue."""
        inbox = self._inboxes.pop()
        if inbox is not None:
            try:
                inbox.replies.close()
            finally:
                for arrived in list(inbox.awaiting):
                    arrived(BackendUnreachable(CLOSED))

    def _inbox(self) -> _Inbox:
        """The inbox of this process: a forked child has a queue of its own, and closes its copy of the parent's socket."""
        return self._inboxes.made.get(os.getpid()) or self._inboxes.get()

    def _drive(self, inbox: _Inbox, done: Callable[[], bool], deadline: float | None) -> bool:
        try:
            return inbox.replies.drive(done, deadline)
        except PublishError as error:
            raise BackendUnreachable(f"results cannot be read: {error}") from error

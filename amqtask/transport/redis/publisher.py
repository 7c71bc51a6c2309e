"""The publishers' contracts and the queue reader's over redis-py."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import redis

from amqtask.exceptions import AccessRefused, PublishError
from amqtask.ground.lazy import ByProcess
from amqtask.ground.printable import bounded_logger
from amqtask.ground.strikes import let_through
from amqtask.protocol.entities import Declaration
from amqtask.protocol.message import Delivery
from amqtask.topology.declarations import consumption
from amqtask.transport.redis.layout import OWN_SECONDS, Command, Layout, Outgoing, incoming, list_keys, owner
from amqtask.transport.redis.lines import Line, LinePool
from amqtask.transport.redis.publishing import (
    Batch,
    Declared,
    evalsha,
    prepare,
    publish_error,
    publishing,
    reply_error,
    until,
)
from amqtask.transport.redis.scripts import DISOWN, OWN, PUBLISH
from amqtask.transport.redis.servers import close_idle

if TYPE_CHECKING:
    from amqtask.protocol.entities import Queue
    from amqtask.protocol.message import Message
    from amqtask.transport.redis.servers import Deployment


FAILURES = (redis.RedisError, OSError)
# A client's own socket timeout ends a wait that has no deadline (seconds).
LONGEST = 3600.0
# How long an event may wait for Redis (seconds).
ANSWER_SECONDS = 1.0


def converse(connection: Any, commands: Sequence[Command], deadline: float) -> list[Any]:
    """Send commands over a connection of redis-py, and read their replies; errors that Redis answers are among them.

    Raises: redis.TimeoutError at the deadline (monotonic seconds), redis.ConnectionError.
    """
    replies: list[Any] = []
    try:
        connection.send_packed_command(connection.pack_commands(commands))
        for _ in commands:
            if not connection.can_read(min(LONGEST, max(0.0, deadline - time.monotonic()))):
                raise redis.TimeoutError("no answer before the deadline")
            try:
                replies.append(connection.read_response(disable_decoding=True))
            except redis.ResponseError as error:
                replies.append(error)
    except AttributeError as error:  # an exception that struck before has left it half closed
        raise redis.ConnectionError(f"the connection was closed: {error}") from error
    if any(map(_is_refused, replies)):
        connection.disconnect()
    return replies


def _is_refused(reply: object) -> bool:
    """Whether the server is a replica: its name may lead to the master by now."""
    return isinstance(reply, redis.ReadOnlyError)


@contextlib.contextmanager
def borrowed(client: Any) -> Any:
    """A connection of the client's pool; one over which something went wrong is closed."""
    pool = client.connection_pool
    connection = pool.get_connection()
    try:
        yield connection
    except BaseException:
        connection.disconnect()
        raise
    finally:
        pool.release(connection)


def answers_of(client: Any, commands: Sequence[Command], deadline: float) -> list[Any]:
    """The answers to commands over a connection of the client's pool.

    Raises: redis.RedisError, OSError; also the first error that Redis answers."""
    with borrowed(client) as connection:
        answers = converse(connection, commands, deadline)
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


class Conversations:
    """With one Redis, for the threads of one process: each over a line, where there is one, else over redis-py's connection."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._lines = LinePool(
            lambda: client,
            lambda place: Line(place, client.connection_pool.connection_kwargs["socket_connect_timeout"]),
        )

    def ask(self, commands: Callable[[], Sequence[Command]], deadline: float) -> list[Any]:
        """As `converse`; `commands` is called when there is a connection. Raises: redis.RedisError, OSError."""
        line = self._lines.take()
        if line is None:
            with borrowed(self._client) as connection:
                replies = converse(connection, commands(), deadline)
                line = self._lines.open()
                if line is not None:
                    connection.disconnect()  # so that there is one for each thread
        else:
            try:
                replies = line.converse(commands(), deadline)
            except BaseException as error:
                self._lines.drop(line, error)
                raise
        if line is None:
            return replies
        # What refuses one command may be no master any more: redis-py finds the present one.
        if any(isinstance(reply, Exception) for reply in replies):
            self._lines.drop(line)
        else:
            self._lines.put(line)
        return replies

    def close(self) -> None:
        """Close those that nobody uses."""
        self._lines.close()


class RedisPublisher:
    """See amqtask.transport.contract.Publisher. redis-py's pool is safe for threads, greenlets and forks."""

    def __init__(
        self, deployment: Deployment, layout: Layout, *, timeout: float | None, on_warning: Callable[[str], None]
    ) -> None:
        self._server = deployment.name
        self._client = deployment.client()
        self._conversations = ByProcess(lambda: Conversations(self._client))
        self._timeout = timeout
        self._declared = Declared(layout, on_warning)

    def publish(self, message: Message, *, timeout: float | None = None) -> None:
        """Publish; raises the named error of what went wrong."""
        error = self.publish_many((message,), timeout=timeout)[0]
        if error is not None:
            raise error

    def publish_many(self, messages: Sequence[Message], *, timeout: float | None = None) -> list[PublishError | None]:
        """One entry per message, None for a stored one."""
        batch = Batch(messages, self._declared, until(timeout, self._timeout), self._server)
        while not batch.is_done:
            try:
                pause = batch.take(self._conversations.get().ask(batch.commands, batch.deadline))
            except FAILURES as error:
                let_through(error)
                pause = batch.failed(error)
            if pause:
                time.sleep(pause)
        return batch.errors

    def declare(self, entities: Sequence[Declaration], *, timeout: float | None = None) -> None:
        """Declare now. Raises: PublishError."""
        self._declared.forget(entities)
        missing = self._declared.missing(entities)
        try:
            replies = answers_of(self._client, [command for command, _ in missing], until(timeout, self._timeout))
        except FAILURES as error:
            self._declared.forget(entities)
            let_through(error)
            raise publish_error(error, self._server) from error
        for (_, on_reply), reply in zip(missing, replies, strict=True):
            on_reply(reply)

    def close(self) -> None:
        """Close the connections."""
        self._conversations.end(Conversations.close)
        close_idle(self._client)


class RedisAsyncPublisher:
    """See amqtask.transport.contract.AsyncPublisher; each event loop has connections of its own."""

    def __init__(
        self, deployment: Deployment, layout: Layout, *, timeout: float | None, on_warning: Callable[[str], None]
    ) -> None:
        self._deployment = deployment
        self._timeout = timeout
        self._declared = Declared(layout, on_warning)
        self._clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Any] = weakref.WeakKeyDictionary()

    async def connect(self, *, timeout: float | None = None) -> None:
        """Connect now. Raises: PublishError."""
        seconds = self._timeout if timeout is None else timeout
        try:
            await asyncio.wait_for((await self._client()).ping(), seconds)
        except (*FAILURES, asyncio.TimeoutError) as error:
            let_through(error)
            raise publish_error(error, self._deployment.name) from error

    async def publish(self, message: Message, *, timeout: float | None = None) -> None:
        """Publish; raises the named error of what went wrong."""
        error = (await self.publish_many((message,), timeout=timeout))[0]
        if error is not None:
            raise error

    async def publish_many(
        self, messages: Sequence[Message], *, timeout: float | None = None
    ) -> list[PublishError | None]:
        """One entry per message, None for a stored one."""
        batch = Batch(messages, self._declared, until(timeout, self._timeout), self._deployment.name)
        client = await self._client()
        while not batch.is_done:
            seconds = min(LONGEST, max(0.0, batch.deadline - time.monotonic()))
            try:
                pause = batch.take(await asyncio.wait_for(_run(client, batch.commands), seconds))
            except (*FAILURES, asyncio.TimeoutError) as error:
                let_through(error)
                pause = batch.failed(error)
            if pause:
                await asyncio.sleep(pause)
        return batch.errors

    async def close(self) -> None:
        """Close the connections of this event loop."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    async def _client(self) -> Any:
        loop = asyncio.get_running_loop()
        client = self._clients.get(loop)
        if client is None:
            client = self._clients[loop] = await self._deployment.async_client()
        return client


async def _run(client: Any, commands: Callable[[], Sequence[Command]]) -> list[Any]:
    """The replies to commands, which are asked for when there is a connection: before that nothing has left."""
    async with client.pipeline(transaction=False) as pipeline:
        pipeline.connection = await pipeline.connection_pool.get_connection()
        for command in commands():
            pipeline.execute_command(*command)
        replies: list[Any] = await pipeline.execute(raise_on_error=False)
    if any(map(_is_refused, replies)) and hasattr(client, "connection_pool"):
        await client.connection_pool.disconnect(inuse_connections=False)
    return replies


class RedisEventPublisher:
    """See amqtask.transport.contract.EventPublisher."""

    def __init__(self, deployment: Deployment, layout: Layout, *, on_warning: Callable[[str], None]) -> None:
        self._client = deployment.client()
        self._declared = Declared(layout, on_warning)
        self._retry_at = 0.0

    def publish(self, messages: Sequence[Message]) -> None:
        """Publish these messages, or drop them."""
        if time.monotonic() < self._retry_at:
            return
        commands: list[Command] = []
        for message in messages:
            leaving = prepare(message)
            if isinstance(leaving, Outgoing):
                commands += (command for command, _ in self._declared.missing(message.declare))
                commands.append(evalsha(self._declared.layout, *publishing(self._declared.layout, leaving)))
        try:
            with borrowed(self._client) as connection:
                deadline = time.monotonic() + ANSWER_SECONDS
                if any(map(_is_unknown, converse(connection, commands, deadline))):
                    converse(connection, [("SCRIPT", "LOAD", PUBLISH.source), *commands], deadline)
        except FAILURES as error:
            let_through(error)
            self._retry_at = time.monotonic() + 1.0

    def close(self) -> None:
        """Close the connections."""
        close_idle(self._client)


def _is_unknown(reply: object) -> bool:
    """Whether Redis does not know the script, and has done nothing."""
    error = reply_error(reply) if isinstance(reply, Exception) else None
    return error is not None and error.code == "NOSCRIPT"


logger = bounded_logger("amqtask.publisher")
# Seconds of one wait, after which the condition is looked at again; and before another attempt to connect.
SLICE, RETRY_PAUSE = 1.0, 0.2


class RedisQueueReader:
    """See amqtask.transport.contract.QueueReader; for one thread at a time."""

    def __init__(
        self, deployment: Deployment, layout: Layout, queue: Queue, on_delivery: Callable[[Delivery], None]
    ) -> None:
        self._server = deployment.name
        self._client = deployment.client()
        self._layout = layout
        self._queue = queue
        self._plan = consumption(queue)
        self._on_delivery = on_delivery
        self._pattern = layout.pattern(queue)
        self._keys = list_keys(layout.prefix, queue.name)
        self._channels: Any = None
        self._owner = owner(queue.name, uuid.uuid4().hex, self._plan)
        # When it was set up last (monotonic seconds): a queue that nobody owns is deleted after a while.
        self._ready_at: float | None = None
        self._next = 1

    def ensure(self, timeout: float) -> None:
        """Declare and subscribe. Raises: BrokerUnreachable, AccessRefused, PublishError."""
        deadline = time.monotonic() + timeout
        while not self._is_ready or (self._pattern is None and self._is_due_again):
            try:
                self._set_up(deadline)
            except FAILURES as error:
                let_through(error)
                wrong = publish_error(error, self._server)
                if isinstance(wrong, AccessRefused) or time.monotonic() + RETRY_PAUSE >= deadline:
                    raise wrong from error
                time.sleep(RETRY_PAUSE)

    @property
    def _is_ready(self) -> bool:
        return self._ready_at is not None

    @property
    def _is_due_again(self) -> bool:
        return self._ready_at is not None and time.monotonic() - self._ready_at > OWN_SECONDS / 6

    def drive(self, done: Callable[[], bool], deadline: float | None) -> bool:
        """Wait until `done()` or the deadline."""
        while not done():
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                return False
            seconds = SLICE if deadline is None else min(SLICE, deadline - now)
            try:
                self.ensure(seconds)
                text = self._next_message(seconds)
            except FAILURES as error:
                let_through(error)
                self._ready_at = None
                continue
            except PublishError:
                if deadline is not None and time.monotonic() >= deadline:
                    raise
                continue
            if text is not None:
                self._hand_over(text)
        return True

    def close(self) -> None:
        """Delete the queue, and disconnect."""
        try:
            if self._channels is not None:
                self._channels.close()
            elif self._is_ready:
                self._client.eval(DISOWN.source, 1, self._layout.prefix, self._owner)
        except FAILURES:
            pass  # workers delete it when nobody says any more that it is needed
        self._ready_at = None
        close_idle(self._client)

    def _set_up(self, deadline: float) -> None:
        if self._pattern is not None:
            self._channels = self._client.pubsub()
            self._channels.psubscribe(self._pattern)
            # The subscription is confirmed: what is published from now on comes here.
            self._channels.get_message(timeout=max(0.0, deadline - time.monotonic()))
        else:
            missing = Declared(self._layout, logger.warning).missing(self._plan)
            claim = ("EVAL", OWN.source, 1, self._layout.prefix, OWN_SECONDS, self._owner)
            answers_of(self._client, [*(command for command, _ in missing), claim], deadline)
        self._ready_at = time.monotonic()

    def _next_message(self, seconds: float) -> bytes | None:
        if self._channels is not None:
            message = self._channels.get_message(ignore_subscribe_messages=True, timeout=seconds)
            return message["data"] if message is not None and message["type"] == "pmessage" else None
        pop: Command = ("BRPOP", *self._keys, max(0.01, round(seconds, 2)))
        # Its own time limit is not exact; what comes after ours would be lost, so that we wait a little longer.
        (reply,) = answers_of(self._client, [pop], time.monotonic() + seconds + 2.0)
        return None if reply is None else reply[1]

    def _hand_over(self, text: bytes) -> None:
        number, self._next = self._next, self._next + 1
        delivery = incoming(text).delivery(self._queue.name, number)
        try:
            self._on_delivery(delivery)
        except Exception:
            logger.exception("a message on %s could not be handled", self._queue.name)

"""How one process talks to a Redis that keeps results, and how those wait there: threads, callbacks, coroutines."""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import redis
from redis.exceptions import ClusterDownError, MasterDownError, ReadOnlyError, RedisClusterException, TryAgainError

from amqtask.backends.contract import RetryPolicy, retrying
from amqtask.exceptions import BackendUnreachable
from amqtask.ground.deadlines import arrival
from amqtask.ground.printable import bounded_logger, clause
from amqtask.ground.strikes import let_through
from amqtask.protocol.result import ResultMessage
from amqtask.transport.redis.publishing import passes
from amqtask.transport.redis.servers import Deployment, close_idle

if TYPE_CHECKING:
    from amqtask.ground.shapes import CoroutineOf


# -- A Redis server as one process sees it: connections, subscriptions, bounded retries, and what its errors mean.


T = TypeVar("T")
# How long a server may be away before its callers are told, and the pauses between attempts (seconds).
RETRY_FOR, FIRST_PAUSE, LONGEST_PAUSE = 5.0, 0.05, 1.0
# All that the library raises; the errors of a cluster as a whole have a tree of their own.
ERRORS = (redis.RedisError, RedisClusterException)
# What another attempt may mend: no connection, a fail-over that is not complete, slots that are on the move.
TRANSIENT = (redis.ConnectionError, redis.TimeoutError, ReadOnlyError, MasterDownError, ClusterDownError, TryAgainError,
             RedisClusterException)  # fmt: skip
# A subscription to more channels is not worth undoing: its connection is closed.
REUSED_UP_TO = 50
IDLE_SUBSCRIPTIONS = 10


def is_hopeless(error: Exception) -> bool:
    """Whether another attempt would end in the same way."""
    if isinstance(error, redis.AuthenticationError) or not (isinstance(error, TRANSIENT) or passes(error)):
        return True
    return isinstance(error.__cause__ or error.__context__, ssl.SSLCertVerificationError)


def unreachable(name: str, error: BaseException) -> BackendUnreachable:
    """Our error for a server that does not do what it is asked to; `name` is the one that errors show."""
    if isinstance(error, redis.AuthenticationError):
        return BackendUnreachable(
            f"Redis at {name} refuses us: {clause(error)}. Is the password in result_backend right?"
        )
    if isinstance(error, TRANSIENT):
        return BackendUnreachable(
            f"Redis at {name} does not answer: {clause(error)}. Is it running there, and is result_backend right?"
        )
    return BackendUnreachable(f"Redis at {name} refused: {error}")


class Event(NamedTuple):
    """A message of a subscription; `value` None: the server has confirmed the channel, so look at the key now."""

    key: str
    value: bytes | None


class Subscription:
    """Channels over one connection."""

    def __init__(self, client: Any) -> None:
        self._pubsub = client.pubsub()
        self.most_keys = 0

    def add(self, keys: Iterable[str]) -> None:
        """Subscribe; `next` says when the server has confirmed each."""
        names = list(keys)
        self.most_keys = max(self.most_keys, len(names))
        for start in range(0, len(names), 1_000):
            self._pubsub.subscribe(*names[start : start + 1_000])

    def remove(self, *keys: str) -> None:
        """Unsubscribe; without keys from all."""
        self._pubsub.unsubscribe(*keys)

    def next(self, timeout: float) -> Event | None:
        """The next event within so many seconds. Raises: redis.ConnectionError."""
        deadline = time.monotonic() + timeout
        while True:
            message = self._pubsub.get_message(timeout=max(0.0, deadline - time.monotonic()))
            if message is not None and message["type"] in ("message", "subscribe"):
                return Event(message["channel"].decode(), message["data"] if message["type"] == "message" else None)
            if time.monotonic() >= deadline:
                return None

    def close(self) -> None:
        """Close the connection."""
        self._pubsub.close()


class RedisServer:
    """The connections of one process to a deployment; made anew after a fork."""

    def __init__(self, deployment: Deployment, patience: RetryPolicy) -> None:
        self.deployment = deployment
        self._patience = patience
        self._client: Any = None
        self._idle: deque[Subscription] = deque()

    @property
    def client(self) -> Any:
        """Made when it is first used: a cluster's client connects at once."""
        if self._client is None:
            self._client = self.deployment.client()
        return self._client

    def retrying(self, work: Callable[[Any], T], policy: RetryPolicy | None = None) -> T:
        """`work(client)`, again while the server is away. Raises: BackendUnreachable when the policy's time is over."""
        return retrying(
            lambda: self._attempt(work),
            policy or self._patience,
            errors=ERRORS,
            is_transient=lambda error: not is_hopeless(error),
            explain=lambda error: unreachable(self.deployment.name, error),
        )

    def _attempt(self, work: Callable[[Any], T]) -> T:
        try:
            return work(self.client)
        except ERRORS as error:
            let_through(error)
            if isinstance(error, ReadOnlyError):
                close_idle(self.client)  # it became a replica: its name may lead to the master by now
            raise

    def subscription(self) -> Subscription:
        """A subscription to nothing yet; an idle one if there is one."""
        try:
            return self._idle.pop()
        except IndexError:
            return Subscription(self.client)

    def release(self, subscription: Subscription, *, is_sound: bool) -> None:
        """Keep a subscription's connection for the next waiter, if it is sound and cheap to clear."""
        if is_sound and subscription.most_keys <= REUSED_UP_TO and len(self._idle) < IDLE_SUBSCRIPTIONS:
            try:
                subscription.remove()
                subscription.most_keys = 0
                self._idle.append(subscription)
                return
            except ERRORS:
                pass  # it broke just now: close it
        subscription.close()

    def close(self) -> None:
        """Close idle connections."""
        while self._idle:
            self._idle.pop().close()
        if self._client is not None:
            close_idle(self._client)


# -- Callbacks for results in Redis: one thread and one subscription for all that somebody waits for.
#
# To subscribe to one more key the thread is woken by a message on a channel of its own, so that it never has to poll, and no
# other thread touches its connection.

logger = bounded_logger("amqtask.backends")
OnResult = Callable[[ResultMessage], None]
# Seconds between looks at a silent connection (a dead one answers no ping).
SLICE = 15.0


class Callbacks:
    """`decode` reads the value of a key. The thread starts with the first callback and ends with `close`."""

    def __init__(self, server: RedisServer, decode: Callable[[str, bytes], ResultMessage]) -> None:
        self._server = server
        self._decode = decode
        self._lock = threading.Lock()
        self._waiting: dict[str, list[OnResult]] = {}
        self._new: set[str] = set()
        self._channel = f"amqtask-wake-{uuid.uuid4()}"
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    def add(self, key: str, callback: OnResult) -> None:
        """Call once when the key holds a final result. Raises: BackendUnreachable."""
        with self._lock:
            self._waiting.setdefault(key, []).append(callback)
            self._new.add(key)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="amqtask results", daemon=True)
                self._thread.start()
        self._wake()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            try:
                self._wake()
            except BackendUnreachable:
                return  # it sees that we are closed at its next attempt
            self._thread.join(timeout=5.0)

    def _wake(self) -> None:
        self._server.retrying(lambda client: client.publish(self._channel, b""))

    def _run(self) -> None:
        while not self._closed.is_set():
            subscription = None
            try:
                subscription = self._server.subscription()
                with self._lock:
                    self._new.update(self._waiting)
                subscription.add([self._channel])
                while not self._closed.is_set():
                    self._turn(subscription)
            except (*ERRORS, BackendUnreachable) as error:
                if not self._closed.is_set():
                    logger.warning("results cannot be waited for, trying again: %s", error)
                    self._closed.wait(LONGEST_PAUSE)
            finally:
                if subscription is not None:
                    self._server.release(subscription, is_sound=False)

    def _turn(self, subscription: Subscription) -> None:
        event = subscription.next(SLICE)
        if event is None:
            return
        if event.key == self._channel:  # confirmed, or woken
            with self._lock:
                new, self._new = self._new, set()
            if new:
                subscription.add(new)
            return
        value = event.value
        if value is None:
            value = self._server.retrying(lambda client: client.get(event.key))
        if value is not None:
            self._arrived(subscription, event.key, value)

    def _arrived(self, subscription: Subscription, key: str, value: bytes) -> None:
        result = self._decode(key, value)
        if not result.is_ready:
            return
        with self._lock:
            callbacks = self._waiting.pop(key, [])
            is_wanted_again = key in self._new
        if not is_wanted_again:
            subscription.remove(key)
        for callback in callbacks:
            try:
                callback(result)
            except Exception:  # a user's callback
                logger.exception("a callback for the result of task %s failed", result.task_id)


# -- Coroutines that wait for results in Redis: one connection to look, one subscription and one reader per event loop.
#
# They are opened by the first that waits and closed by the last, so nothing is left behind when a loop ends.

# Seconds after which a task that was cancelled and goes on is cancelled again.
CANCEL_AGAIN = 0.1
# Subscriptions that nobody needs any more are ended so many at once.
MOST_STALE = 500


class AsyncWaiters:
    """Belongs to one event loop; `decode` reads the value of a key."""

    def __init__(self, deployment: Deployment, decode: Callable[[str, bytes], ResultMessage], retry_for: float) -> None:
        self._deployment = deployment
        self._decode = decode
        self._retry_for = retry_for
        self._futures: dict[str, set[asyncio.Future[ResultMessage]]] = {}
        self._pubsub: Any = None
        self._new_keys: set[str] = set()
        self._stale: set[str] = set()
        self._reader: asyncio.Task[None] | None = None
        self._writer: asyncio.Task[None] | None = None

    async def wait(self, key: str, timeout: float | None) -> ResultMessage:
        """The result, when the key holds a final one. Raises: asyncio.TimeoutError, BackendUnreachable.

        What talks to Redis are tasks of their own: the client has `asyncio.wait_for` in it, which before Python 3.12 may
        swallow the cancellation of whoever awaits it, and with it this call's end (python/cpython#86296)."""
        future: asyncio.Future[ResultMessage] = asyncio.get_running_loop().create_future()
        self._futures.setdefault(key, set()).add(future)
        try:
            if self._reader is None or self._reader.done():
                self._reader = asyncio.create_task(self._read(), name="amqtask results")
                self._reader.add_done_callback(self._on_ended)
            else:
                self._subscribe([key])
            return await arrival(future, timeout)
        finally:
            waiting = self._futures.get(key, set())
            waiting.discard(future)
            if not waiting:
                self._futures.pop(key, None)
                self._stale.add(key)
            if not self._futures:
                await self._end()
            elif len(self._stale) >= MOST_STALE:
                self._subscribe(())

    async def _end(self) -> None:
        tasks = {task for task in (self._reader, self._writer) if task is not None}
        self._reader = self._writer = self._pubsub = None
        self._new_keys.clear()
        self._stale.clear()
        interrupted: asyncio.CancelledError | None = None
        while tasks:
            for task in tasks:
                task.cancel()
            try:
                _, tasks = await asyncio.wait(tasks, timeout=CANCEL_AGAIN)
            except asyncio.CancelledError as error:  # they must not be left as they are: one may go on for ever
                interrupted = error
        if interrupted is not None:
            raise interrupted

    def _subscribe(self, keys: Iterable[str]) -> None:
        """Have the writer subscribe to these keys; a reader that connects subscribes to all by itself."""
        if self._pubsub is None:
            return
        self._new_keys.update(keys)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write(), name="amqtask subscriptions")
            self._writer.add_done_callback(self._on_ended)

    async def _write(self) -> None:
        while (pubsub := self._pubsub) is not None:
            new_keys, self._new_keys = self._new_keys, set()
            try:
                if new_keys:
                    await pubsub.subscribe(*new_keys)
                elif len(self._stale) >= MOST_STALE:
                    # Whoever wants one of these again from now on is in `_new_keys`, whose turn is next.
                    stale, self._stale = self._stale.difference(self._futures), set()
                    if stale:
                        await pubsub.unsubscribe(*stale)
                else:
                    return
            except ERRORS:
                # The connection is broken. The reader sees that too and subscribes to all again, unless the client has
                # connected anew before it looked.
                self._new_keys |= new_keys
                await asyncio.sleep(FIRST_PAUSE)

    async def _read(self) -> None:
        give_up_at, pause = time.monotonic() + self._retry_for, FIRST_PAUSE
        while True:
            client = None
            try:
                client = await self._deployment.async_client()
                await client.ping()
                give_up_at, pause = time.monotonic() + self._retry_for, FIRST_PAUSE
                await self._read_from(client)
            except ERRORS as error:
                if is_hopeless(error) or time.monotonic() + pause > give_up_at:
                    raise unreachable(self._deployment.name, error) from error
            finally:
                if client is not None:
                    await _to_its_end(client.aclose())
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _read_from(self, client: Any) -> None:
        pubsub = client.pubsub()
        try:
            keys = list(self._futures)
            await pubsub.subscribe(*keys)
            self._pubsub = pubsub
            self._stale.clear()
            self._subscribe(key for key in self._futures if key not in keys)
            while True:
                message = await pubsub.get_message(timeout=SLICE)
                if message is None or message["type"] not in ("message", "subscribe"):
                    continue
                key = message["channel"].decode()
                # A confirmed subscription: look at what was stored before it.
                value = message["data"] if message["type"] == "message" else await client.get(key)
                if value is not None:
                    self._arrived(key, value)
        finally:
            if self._pubsub is pubsub:
                self._pubsub = None
            await _to_its_end(pubsub.aclose())

    def _arrived(self, key: str, value: bytes) -> None:
        futures = self._futures.get(key, set())
        result = self._decode(key, value)
        if result.is_ready:
            for future in futures:
                if not future.done():
                    future.set_result(result)

    def _on_ended(self, task: asyncio.Task[None]) -> None:
        """A reader or writer has ended: if it failed, those who wait get its error."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            for future in [future for futures in self._futures.values() for future in futures]:
                if not future.done():
                    future.set_exception(error)


async def _to_its_end(closing: CoroutineOf[None]) -> None:
    """Await a coroutine to its end, however often we are cancelled meanwhile."""
    task = asyncio.ensure_future(closing)
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:  # `_end` cancels again those that go on
            continue
    task.result()

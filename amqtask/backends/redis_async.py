"""Coroutines that wait for results in Redis: one connection to look, one subscription and one reader per event loop.

They are opened by the first that waits and closed by the last, so nothing is left behind when a loop ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from amqtask.backends.redis_server import ERRORS, FIRST_PAUSE, LONGEST_PAUSE, is_hopeless, unreachable
from amqtask.ground.deadlines import arrival
from amqtask.protocol.result import ResultMessage
from amqtask.transport.redis.servers import Deployment

if TYPE_CHECKING:
    from amqtask.ground.shapes import CoroutineOf

SLICE = 15.0
# Seconds after which a task that was cancelled and goes on is cancelled again.
CANCEL_AGAIN = 0.1
# Subscriptions that nobody needs any more are ended so many at once.
MOST_STALE = 500


class AsyncWaiters:
    """Belongs to one event loop; `decode` reads a stored value."""

    def __init__(self, deployment: Deployment, decode: Callable[[bytes], ResultMessage], retry_for: float) -> None:
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
        try:
            result = self._decode(value)
        except Exception as error:  # noqa: BLE001 - it belongs to those who wait for this value
            for future in futures:
                if not future.done():
                    future.set_exception(error)
            return
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

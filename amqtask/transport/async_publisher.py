"""AsyncPublisher: the publisher's promises for asyncio, over aio-pika; one connection per event loop.

Not aio-pika's robust connection: that one reconnects by itself and leaves a publish waiting meanwhile. Here each
publish has one total deadline, and reconnects within it. See amqtask.transport.async_line for the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import warnings
import weakref
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from amqtask.exceptions import PublishError, PublishTimeout
from amqtask.in_time import cancel_all, ended
from amqtask.message import Message
from amqtask.transport.async_line import Line, LineLost, Suspected, connect
from amqtask.transport.url import BrokerAddress

# How many publishes of one batch may wait for their confirm at once.
WINDOW = 500
# A line that was idle for so long is not trusted to be alive (seconds).
STALE_AFTER = 10.0
NO_DEADLINE = 365 * 86400.0
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 0.5


class _Home:
    """What belongs to one event loop: its line, and the lock that lets one task at a time connect."""

    def __init__(self) -> None:
        self.line: Line | None = None
        self.connecting = asyncio.Lock()


class AioPikaPublisher:
    """Publishes with confirms; see amqtask.transport.contract.AsyncPublisher.

    `timeout` is seconds for a whole publish (None: no deadline); a line that was idle for longer than `stale_after` seconds is
    not trusted to be alive.
    """

    def __init__(
        self,
        addresses: Sequence[BrokerAddress],
        *,
        timeout: float | None = 5.0,
        heartbeat: int | None = 60,
        connect_timeout: float = 4.0,
        client_name: str = "",
        stale_after: float = STALE_AFTER,
        on_warning: Callable[[str], None] | None = None,
    ) -> None:
        self._addresses = tuple(addresses)
        self._timeout = timeout
        self._heartbeat = heartbeat
        self._connect_timeout = connect_timeout
        self._client_name = client_name
        self._stale_after = stale_after
        self._warn = on_warning or _warn
        self._numbers = itertools.count(1)
        self._pid = os.getpid()
        self._homes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Home] = weakref.WeakKeyDictionary()
        # A forked child must not close its parent's connections, not even by forgetting them.
        self._inherited: list[Any] = []

    # -- the contract

    async def connect(self, *, timeout: float | None = None) -> None:
        """Connect this event loop now. Raises: BrokerUnreachable, AccessRefused, PublishTimeout."""
        await self._line(self._deadline(timeout))

    async def publish(self, message: Message, *, timeout: float | None = None) -> None:
        """Publish and wait for the confirm; raises the named error of what went wrong."""
        await self._publish(message, self._deadline(timeout))

    async def publish_many(
        self, messages: Sequence[Message], *, timeout: float | None = None
    ) -> list[PublishError | None]:
        """Pipelined, a window of messages at a time; one entry per message, None for a stored one."""
        deadline = self._deadline(timeout)
        errors: list[PublishError | None] = [None] * len(messages)
        numbered = iter(enumerate(messages))

        async def work() -> None:
            for index, message in numbered:
                try:
                    await self._publish(message, deadline)
                except PublishError as error:
                    errors[index] = error

        await _together([work() for _ in range(min(WINDOW, len(messages)))])
        return errors

    async def close(self) -> None:
        """Close this event loop's connection; the publisher opens a new one when it is used again."""
        home = self._home()
        line, home.line = home.line, None
        if line is not None:
            await line.close()

    # -- one message

    async def _publish(self, message: Message, deadline: float) -> None:
        if message.mandatory and not message.properties.message_id:
            message.properties.message_id = f"{os.getpid()}-{id(self):x}-{next(self._numbers)}"
        pause = FIRST_PAUSE
        is_suspect = False
        while True:
            line = await self._line(deadline)
            try:
                if await self._over(line, message, deadline, is_suspect):
                    return
            except Suspected:
                is_suspect = True
            except LineLost as lost:
                if not line.is_open:
                    self._drop(line)
                if _now() + pause >= deadline:
                    raise PublishTimeout(f"the connection was lost ({lost}) and the deadline passed") from lost
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)

    async def _over(self, line: Line, message: Message, deadline: float, is_suspect: bool) -> bool:
        """Over this line; False when it was idle for long and did not answer in half the time."""
        now = _now()
        was_idle = now - line.used_at > self._stale_after
        line.used_at = now
        patience = (now + deadline) / 2 if was_idle else deadline
        publish = line.publish_alone if is_suspect else line.publish
        try:
            await line.declare(message.declare, patience, self._warn)
            await publish(message, patience)
        except PublishTimeout:
            if was_idle and patience < deadline:
                self._drop(line)
                return False
            raise
        return True

    # -- the line of this event loop

    def _deadline(self, timeout: float | None) -> float:
        seconds = self._timeout if timeout is None else timeout
        return _now() + (NO_DEADLINE if seconds is None else seconds)

    def _home(self) -> _Home:
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._inherited += self._homes.values()
            self._homes = weakref.WeakKeyDictionary()
        loop = asyncio.get_running_loop()
        home = self._homes.get(loop)
        if home is None:
            # A line knows its loop, so one that ended without `close` would be kept here, and the loop with it.
            for over in [each for each in self._homes if each.is_closed()]:
                del self._homes[over]
                _silence(over)
            home = self._homes[loop] = _Home()
        return home

    async def _line(self, deadline: float) -> Line:
        home = self._home()
        if home.line is not None and home.line.is_open:
            return home.line
        release = home.connecting.release
        if await ended(home.connecting.acquire(), deadline - _now(), lambda _: release()) is None:
            raise PublishTimeout("the deadline passed while another task was connecting to the broker")
        try:
            if home.line is None or not home.line.is_open:
                home.line = await connect(
                    self._addresses,
                    deadline,
                    heartbeat=self._heartbeat,
                    connect_timeout=self._connect_timeout,
                    name=self._client_name,
                )
                at = self._addresses.index(home.line.address)
                self._addresses = self._addresses[at:] + self._addresses[:at]
            return home.line
        finally:
            release()

    def _drop(self, line: Line) -> None:
        home = self._home()
        if home.line is line:
            home.line = None
        line.abandon()


async def _together(workers: list[Coroutine[Any, Any, None]]) -> None:
    """Run all; when we are cancelled, none goes on."""
    tasks = [asyncio.ensure_future(worker) for worker in workers]
    try:
        await asyncio.gather(*tasks)
    finally:
        await cancel_all(tasks)


def _silence(loop: asyncio.AbstractEventLoop) -> None:
    """What aio-pika began when the loop ended, to say that the connection is closed, would complain when it is collected."""
    for task in asyncio.all_tasks(loop):
        coroutine = task.get_coro()
        if getattr(coroutine, "__qualname__", "").startswith("OneShotCallback."):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            with contextlib.suppress(RuntimeError):  # it asks the loop for one more turn
                coroutine.close()


def _now() -> float:
    return asyncio.get_running_loop().time()


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)

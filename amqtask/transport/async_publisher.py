"""AsyncPublisher: the publisher's contract for asyncio, over aio-pika; one connection per event loop.

Not aio-pika's robust connection: that one reconnects by itself and leaves a publish waiting meanwhile. Here each
publish has one total deadline, and reconnects within it. See amqtask.transport.async_line for the connection.

A dead line, and a line whose new channel refuses a message too (see confirms.py), is left for the next host. A message that was
under way when connections ended goes alone, over a line of its own, until it is known whether it is to blame.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import aio_pika
from aio_pika import exceptions as aio_errors
from aio_pika.abc import ConnectionParameter
from aiormq import exceptions as wire_errors
from pamqp import commands

from amqtask.exceptions import (
    AccessRefused,
    BrokerUnreachable,
    MessageRefused,
    PublishError,
    PublishRefused,
    PublishTimeout,
    Unroutable,
)
from amqtask.ground.deadlines import cancel_all, ended
from amqtask.protocol.entities import Declaration
from amqtask.protocol.message import Message
from amqtask.transport.async_line import Line, LineLost, Nacked, Suspected, is_ours, keep_quiet
from amqtask.transport.confirms import (
    AWAY_PAUSE,
    MOST_LOSSES,
    NO_DEADLINE,
    PATIENCE_SECONDS,
    Attempt,
    MessageIds,
    Refusing,
)
from amqtask.transport.declare import PATIENCE, KnownEntities
from amqtask.transport.errors import (
    ACCESS_REFUSED,
    NOT_ALLOWED,
    NOT_OFFERED,
    access_refused,
    connection_closed_for,
    unreachable,
)
from amqtask.transport.resolving import addresses_of, as_host, avoid
from amqtask.transport.url import EXTERNAL, BrokerAddress, HostTurns, beginning_with, client_properties

if TYPE_CHECKING:
    from amqtask.ground.shapes import CoroutineOf, OptionDict


# How many publishes of one batch may wait for their confirm at once.
WINDOW = 500
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 0.5


class _LoopState:
    """The state of one event loop: its line, and the lock that lets one task at a time connect."""

    def __init__(self) -> None:
        self.line: Line | None = None
        self.connecting = asyncio.Lock()
        # One suspect at a time.
        self.suspecting = asyncio.Lock()
        self.left_at = float("-inf")


class _Sending(Attempt):
    """One message under way, and how it goes again."""

    def __init__(self, message: Message, deadline: float) -> None:
        super().__init__(message)
        self.deadline = deadline
        self.pause = FIRST_PAUSE
        # The broker closed the channel or the connection while it was under way.
        self.is_suspect = self.is_alone = False


class AioPikaPublisher:
    """Publishes with confirms; see amqtask.transport.contract.AsyncPublisher.

    `timeout` is seconds for a whole publish (None: no deadline); a refused message is tried again for `nack_patience` of them.
    """

    def __init__(
        self,
        addresses: Sequence[BrokerAddress],
        *,
        timeout: float | None = 5.0,
        heartbeat: int | None = 60,
        connect_timeout: float = 4.0,
        client_name: str = "",
        nack_patience: float = PATIENCE_SECONDS,
        on_warning: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._addresses = tuple(addresses)
        self._timeout = timeout
        self._heartbeat = heartbeat
        self._connect_timeout = connect_timeout
        self._client_name = client_name
        self._nack_patience = nack_patience
        self._refusing = Refusing()
        self._known = KnownEntities()
        self._warn = on_warning
        self._ids = MessageIds()
        self._pid = os.getpid()
        self._states: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopState] = weakref.WeakKeyDictionary()
        # A forked child must not close its parent's connections, not even by forgetting them.
        self._inherited: list[object] = []

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
        state = self._state()
        line, state.line = state.line, None
        if line is not None:
            await line.close()

    # -- one message

    async def _publish(self, message: Message, deadline: float) -> None:
        self._ids.complete(message)
        sending = _Sending(message, deadline)
        while not await self._is_sent(sending):
            if sending.is_alone:
                await self._send_alone(sending)
                return

    async def _is_sent(self, sending: _Sending) -> bool:
        """One attempt. Raises: PublishErrors."""
        message, deadline = sending.message, sending.deadline
        line = await self._line(deadline)
        try:
            await self._declare(line, message.declare, deadline)
            await (line.publish_alone if sending.is_suspect else line.publish)(message, deadline)
        except Suspected:
            sending.is_suspect = True
        except Unroutable:
            if not sending.declares_anew():
                raise
            line.forget(message.declare)
        except Nacked as nacked:
            await self._after_nack(sending, line, nacked.error)
        except MessageRefused:
            raise
        except PublishRefused:
            # The queue's node is down: it may be back before the deadline.
            if _now() + AWAY_PAUSE >= deadline:
                raise
            await asyncio.sleep(AWAY_PAUSE)
        except LineLost as lost:
            if not line.is_open:
                self._drop(line)
                sending.losses += not line.is_dead
                sending.is_alone = line.was_nonsense or sending.is_suspicious
            await self._pause_after(sending, lost)
        else:
            return True
        return False

    async def _declare(self, line: Line, entities: Sequence[Declaration], deadline: float) -> None:
        """What is known from before is taken to exist when the broker does not answer in a part of the time."""
        is_known, now = self._known.issuperset(entities), _now()
        patience = min(PATIENCE, (deadline - now) / 4) if is_known else deadline - now
        try:
            if await line.declare(entities, now + patience, self._warn):
                self._known.note(entities)
        except PublishTimeout:
            if not is_known:
                raise
            line.trust(entities)

    async def _pause_after(self, sending: _Sending, lost: LineLost) -> None:
        if _now() + sending.pause >= sending.deadline:
            raise PublishTimeout(f"the connection was lost ({lost}) and the deadline passed") from lost
        await asyncio.sleep(sending.pause)
        sending.pause = min(sending.pause * 2, LONGEST_PAUSE)

    async def _after_nack(self, sending: _Sending, line: Line, error: PublishError) -> None:
        """The line has a new channel; when that does not help either, another host."""
        now = _now()
        pause = sending.pause_after_nack(self._refusing, now, min(sending.deadline, now + self._nack_patience))
        if pause is None:
            raise error
        state = self._state()
        is_due = sending.nacks > 1 and len(self._addresses) > 1 and now - state.left_at > self._nack_patience
        if is_due and state.line is line:
            state.left_at = now
            state.line = None
            self._begin_after(line)
            line.retire()
        await asyncio.sleep(pause)

    async def _send_alone(self, sending: _Sending) -> None:
        """Connections ended while this message was under way: on a line of its own only this message can be the reason."""
        lock = self._state().suspecting
        if await ended(lock.acquire(), sending.deadline - _now(), lambda _: lock.release()) is None:
            raise PublishTimeout("the deadline passed while another message was tried on a connection of its own")
        try:
            for losses in itertools.count(1):
                line = await self._connect(sending.deadline)
                try:
                    await self._declare(line, sending.message.declare, sending.deadline)
                    await line.publish_alone(sending.message, sending.deadline)
                except Nacked as nacked:
                    raise nacked.error from nacked
                except LineLost as lost:
                    if line.was_nonsense or losses >= MOST_LOSSES:
                        raise connection_closed_for(sending.message, lost) from lost
                    await self._pause_after(sending, lost)
                else:
                    return
                finally:
                    line.abandon()
        finally:
            lock.release()

    # -- the line of this event loop

    def _deadline(self, timeout: float | None) -> float:
        seconds = self._timeout if timeout is None else timeout
        return _now() + (NO_DEADLINE if seconds is None else seconds)

    def _state(self) -> _LoopState:
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._inherited += self._states.values()
            self._states = weakref.WeakKeyDictionary()
        loop = asyncio.get_running_loop()
        state = self._states.get(loop)
        if state is None:
            # A line knows its loop, so one that ended without `close` would be kept here, and the loop with it.
            for closed_loop in [other_loop for other_loop in self._states if other_loop.is_closed()]:
                del self._states[closed_loop]
                _silence(closed_loop)
            state = self._states[loop] = _LoopState()
        return state

    async def _line(self, deadline: float) -> Line:
        state = self._state()
        if state.line is not None and state.line.is_open:
            return state.line
        release = state.connecting.release
        if await ended(state.connecting.acquire(), deadline - _now(), lambda _: release()) is None:
            raise PublishTimeout("the deadline passed while another task was connecting to the broker")
        try:
            if state.line is None or not state.line.is_open:
                state.line = await self._connect(deadline)
                self._addresses = beginning_with(self._addresses, state.line.address)
            return state.line
        finally:
            release()

    async def _connect(self, deadline: float) -> Line:
        """A line to the first of the hosts that answers before the deadline, in turn and again.

        Raises: AccessRefused at once, BrokerUnreachable."""
        turns = HostTurns(self._addresses, deadline, self._connect_timeout, _now)
        while True:
            for address, seconds in turns:
                try:
                    line = await _open(address, _now() + seconds, self._heartbeat, self._client_name)
                except AccessRefused:
                    raise
                except BrokerUnreachable as error:
                    turns.failed(error)
                else:
                    line.has_other_hosts = len(self._addresses) > 1
                    return line
            await asyncio.sleep(turns.pause())

    def _begin_after(self, line: Line) -> None:
        """Have the next line go to another host first."""
        if self._addresses[0] == line.address:
            self._addresses = self._addresses[1:] + self._addresses[:1]

    def _drop(self, line: Line) -> None:
        state = self._state()
        if state.line is line:
            state.line = None
            if line.is_dead:
                self._begin_after(line)
        line.abandon()


async def _together(workers: list[CoroutineOf[None]]) -> None:
    """Run all of them; a cancellation cancels all."""
    tasks = [asyncio.ensure_future(worker) for worker in workers]
    try:
        await asyncio.gather(*tasks)
    finally:
        await cancel_all(tasks)


def _silence(loop: asyncio.AbstractEventLoop) -> None:
    """End what aio-pika began, when the loop ended, to report that the connection is closed: it would warn when collected."""
    for task in asyncio.all_tasks(loop):
        coroutine = task.get_coro()
        if getattr(coroutine, "__qualname__", "").startswith("OneShotCallback."):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            with contextlib.suppress(RuntimeError):  # it asks the loop for one more turn
                coroutine.close()


def _now() -> float:
    return asyncio.get_running_loop().time()


# -- From a host to a `Line`: each of its addresses in turn, within a deadline, with a named error.


class _Connection(aio_pika.Connection):
    """aio-pika's connection, able to check a certificate for another name than the host's."""

    PARAMETERS = (*aio_pika.Connection.PARAMETERS, ConnectionParameter("server_hostname", str, is_kwarg=True))

    async def _on_connection_close(self, closing: asyncio.Future[object]) -> None:
        # aio-pika pauses here for callbacks, which we have none of: a loop that closes in the pause leaves a task behind.
        with contextlib.suppress(asyncio.CancelledError):
            closing.exception()
        self.connected.clear()

    def __del__(self) -> None:
        # aio-pika's __del__ begins to close: a connection that never connected has nothing to close, and without its loop it
        # only leaves a warning of a coroutine that was never awaited.
        if self.transport is not None and asyncio._get_running_loop() is self.loop:
            super().__del__()


async def _open(address: BrokerAddress, deadline: float, heartbeat: int | None, name: str) -> Line:
    """A line to the first of the host's addresses that answers; none has the time of those after it. Raises: AccessRefused,
    BrokerUnreachable."""
    failure: BrokerUnreachable | None = None
    try:
        found = await addresses_of(address.host, address.port, deadline - _now())
    except TimeoutError:
        raise _late(address) from None
    except OSError as error:
        raise unreachable(error, [address]) from error
    for index, place in enumerate(found):
        seconds = (deadline - _now()) / (len(found) - index)
        opening = await ended(_open_at(place, address, heartbeat, name), seconds, Line.abandon)
        try:
            if opening is not None:
                return opening.result()
            failure = _late(address)
        except (OSError, aio_errors.AMQPError, asyncio.CancelledError) as error:
            failure = _unreachable(error, address)
        avoid(place)
    raise failure or _late(address)


def _late(address: BrokerAddress) -> BrokerUnreachable:
    return BrokerUnreachable(f"{address.safe_url} did not answer in time")


async def _open_at(place: Any, address: BrokerAddress, heartbeat: int | None, name: str) -> Line:
    is_ours.set(True)  # of this task, which is ours
    keep_quiet()
    tls = address.tls
    options: OptionDict = {"heartbeat": address.heartbeat if address.heartbeat is not None else heartbeat}
    if tls is not None:
        options["server_hostname"] = tls.server_hostname or address.host
    if address.login_method == EXTERNAL:
        options["auth"] = EXTERNAL
    connection = await aio_pika.connect(
        host=as_host(place),
        port=place[1],
        login=address.user,
        password=address.password,
        virtualhost=address.vhost,
        ssl=tls is not None,
        ssl_context=tls.context() if tls is not None else None,
        client_properties=client_properties(name),
        connection_class=_Connection,
        **options,
    )
    return Line(address, connection)


def _unreachable(error: BaseException, address: BrokerAddress) -> BrokerUnreachable:
    """Our error for a failed attempt; a refusal by the broker is raised at once."""
    closing = _closing_of_handshake(error)
    if isinstance(error, wire_errors.AuthenticationError):
        raise access_refused(address, f"{NOT_OFFERED}: {error}", is_login=True) from error
    code, text = (closing.reply_code, closing.reply_text or "") if closing is not None else (0, str(error))
    if isinstance(error, aio_errors.ProbableAuthenticationError) or code == ACCESS_REFUSED:
        raise access_refused(address, text, is_login="vhost" not in text) from error
    if code == NOT_ALLOWED and "limit" not in text:
        raise access_refused(address, text, is_login=False) from error
    return unreachable(error if closing is None else ConnectionError(f"{code} {text}"), [address])


def _closing_of_handshake(error: BaseException) -> commands.Connection.Close | None:
    """The broker's connection.close in answer to connection.open, the step that names the virtual host. aiormq reports the method
    that it expected and drops the broker's text; the frame is still in the local variables of the traceback."""
    tb = error.__traceback__
    while tb is not None:
        amqp_frame = tb.tb_frame.f_locals.get("frame")
        if isinstance(amqp_frame, commands.Connection.Close):
            return amqp_frame
        tb = tb.tb_next
    return None

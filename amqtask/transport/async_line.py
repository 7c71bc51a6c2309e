"""One aio-pika connection with a confirming channel: declare, publish, each with a deadline and a named error.

A channel that the broker closed is replaced; a connection that ended ends the line. Times are those of the event loop.

A connection may be dead without a close: the host lost its power, a firewall dropped the connection from its table. So when
something is awaited and nothing has come for two looks, the line asks the broker for a channel; if the broker does not open
one, the line is dead, and the messages that waited on it may go over another line.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from aio_pika import exceptions as aio_errors
from aiormq import exceptions as wire_errors
from pamqp import commands

from amqtask.exceptions import PublishError, PublishTimeout
from amqtask.ground.deadlines import ended, leave_behind
from amqtask.protocol.entities import Declaration
from amqtask.protocol.message import Message
from amqtask.transport.confirms import Trusted
from amqtask.transport.content import FRAME_MAX, UNWRITABLE, encode_properties, unwritable
from amqtask.transport.contract import Refusal
from amqtask.transport.declare import DeclaredEntities, check_name, declaring, entity_name
from amqtask.transport.errors import (
    ACCESS_REFUSED,
    NOT_FOUND,
    PRECONDITION_FAILED,
    blocked,
    channel_error,
    culprits,
    refused,
    unroutable,
)
from amqtask.transport.url import BrokerAddress

Warn = Callable[[str], None]
# With these codes a broker closes the connection of a client that sent invalid frames.
_NONSENSE = (
    wire_errors.ConnectionFrameError,
    wire_errors.ConnectionSyntaxError,
    wire_errors.ConnectionCommandInvalid,
    wire_errors.ConnectionChannelError,
    wire_errors.ConnectionUnexpectedFrame,
)
# How many messages at once may each have a channel of their own.
MOST_ALONE = 10
# Seconds between two looks at a line on which something is awaited (longest and shortest); and how long the broker may take to
# open a channel.
LOOK_SECONDS, LEAST_LOOK_SECONDS = 1.0, 0.1
ANSWER_SECONDS, LEAST_ANSWER_SECONDS = 1.0, 0.4
# After this process stood still itself, what has come meanwhile is read before the broker is given up.
LAST_CHANCE_SECONDS = 0.3
# A channel is replaced at most once in so many seconds.
RENEW_SECONDS = 1.0
# For so many seconds a line that was left for another one may still get confirms.
RETIRE_SECONDS = 10.0
# aiormq's exceptions differ between its versions; the broker's words begin with the name of the code.
_CODES = {"NOT_FOUND": NOT_FOUND, "PRECONDITION_FAILED": PRECONDITION_FAILED, "ACCESS_REFUSED": ACCESS_REFUSED}


# Set in all that a connection of ours runs (its reader, its writer, its callbacks), because tasks inherit it.
is_ours: ContextVar[bool] = ContextVar("amqtask_async_line", default=False)
_LOGGERS = ("aiormq.connection", "aiormq.channel", "aio_pika.connection", "aio_pika.channel", "aio_pika.tools")


class _NotOurs(logging.Filter):
    """Drops the library's log records on connections of ours that end: our errors report that once. At level DEBUG all are
    kept."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not is_ours.get() or logging.getLogger(record.name).isEnabledFor(logging.DEBUG)


_not_ours = _NotOurs()


def keep_quiet() -> None:
    """Have the library's loggers drop what our errors report."""
    for logger_name in _LOGGERS:
        logging.getLogger(logger_name).addFilter(_not_ours)


class LineLost(Exception):
    """The connection ended, or the channel because of another message: this message may be sent again."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause) or type(cause).__name__)


class Nacked(Exception):
    """The broker refuses the message without a reason; `error` is the error for the caller."""

    def __init__(self, error: PublishError) -> None:
        super().__init__(str(error))
        self.error = error


class Suspected(Exception):
    """The broker closed the channel because of one of several messages, and its text does not tell which."""


class _Encoded(commands.Basic.Properties):
    """Properties that were encoded before aiormq got the message: a message that fails in aiormq has already been counted as a
    publish there."""

    def __init__(self, encoded: bytes, message_id: str | None) -> None:
        super().__init__(message_id=message_id)
        self._encoded = encoded

    def marshal(self) -> bytes:
        return self._encoded


class _Shared:
    """The channel that all tasks publish on, the messages under way on it, and those for which the broker closed it."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self.unconfirmed: dict[int, Message] = {}
        self._guilty: list[Message] | None = None

    def verdict(self, error: aio_errors.ChannelClosed, message: Message) -> Exception:
        """Whether the broker closed the channel for this message or for another one that was under way."""
        closing = closing_of(error)
        if self._guilty is None:  # the first one to hear of it finds all others still under way
            messages = list(self.unconfirmed.values())
            self._guilty = [messages[at] for at in culprits(closing, messages, list(range(len(messages))))]
        if any(guilty is message for guilty in self._guilty):
            return channel_error(closing, message)
        return LineLost(error) if self._guilty else Suspected(str(error))


class Line:
    """A connection with one channel in confirm mode, shared by the tasks of one event loop."""

    def __init__(self, address: BrokerAddress, connection: Any) -> None:
        self.address = address
        self._connection = connection
        self._shared: _Shared | None = None
        self._renewed_at = float("-inf")
        self._declared = DeclaredEntities()
        self._turn = asyncio.Lock()
        self._trusted = Trusted()
        self._alone = asyncio.Semaphore(MOST_ALONE)
        # aiormq finds a returned message by its id alone, so an id is under way once at a time.
        self._ids: dict[str, asyncio.Future[None]] = {}
        self._number = 0
        # Futures that would wait on when nobody reads the connection any more: aiormq first writes all that it has (for three
        # heartbeats at most, to a peer that has only closed its end), and wakes nobody who waits for room in its queue.
        self._under_way: set[asyncio.Future[object]] = set()
        # Whether anything came since the last look, and for how many looks nothing did.
        self._look_timer: asyncio.TimerHandle | None = None
        self._has_heard = False
        self._silent_looks = 0
        # Whether there is a host to go to, and whether the broker, when it was asked, has answered that and nothing else.
        self.has_other_hosts = False
        self._confirms_nothing = False
        self._is_asking = False
        # Whether the broker has stopped answering, or confirms nothing while another host might.
        self.is_dead = False
        self._reader = connection.transport.connection._reader_task
        self._reader.add_done_callback(self._on_gone)

    @property
    def is_open(self) -> bool:
        """Whether the connection is open, as far as we know."""
        transport = self._connection.transport
        is_read = transport is not None and not transport.connection.is_closed and not self._reader.done()
        return is_read and not self.is_dead

    @property
    def was_nonsense(self) -> bool:
        """Whether the broker closed the connection because of a frame that we sent."""
        reader = self._reader
        return reader.done() and not reader.cancelled() and isinstance(reader.exception(), _NONSENSE)

    async def close(self) -> None:
        """Close the connection, waiting for the broker's answer no longer than a second."""
        try:
            closing = await ended(self._connection.close(), 1.0)
        finally:
            self._on_gone()
        error = None if closing is None or closing.cancelled() else closing.exception()
        if error is not None and not isinstance(error, (OSError, aio_errors.AMQPError, asyncio.TimeoutError)):
            raise error  # else: gone is what was asked for

    def abandon(self) -> None:
        """Close in the background."""
        leave_behind(self.close())

    def retire(self) -> None:
        """Close in the background once no message is under way any more."""
        leave_behind(self._retire())

    async def _retire(self) -> None:
        for _ in range(int(RETIRE_SECONDS / LOOK_SECONDS)):
            if not self._under_way:
                break
            await asyncio.wait(set(self._under_way), timeout=LOOK_SECONDS)
        await self.close()

    def _on_gone(self, _: object = None) -> None:
        for waiting in self._under_way:
            waiting.cancel()

    # -- whether the broker still answers

    def _look_in(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        pause = max(LEAST_LOOK_SECONDS, min(LOOK_SECONDS, seconds / 4))
        self._look_timer = loop.call_later(pause, self._look, pause)

    def _look(self, pause: float) -> None:
        self._look_timer = None
        if self._has_heard or not self._under_way:
            self._silent_looks, self._confirms_nothing = 0, False
        else:
            self._silent_looks += 1
        self._has_heard = False
        if self._confirms_nothing and self.has_other_hosts:
            self._give_up()
        elif self._silent_looks >= 2:
            self._ask(pause)
        if self._under_way and self.is_open:
            self._look_in(4 * pause)

    def _ask(self, seconds: float) -> None:
        if not self._is_asking and self.is_open:
            self._is_asking = True
            leave_behind(self._probe(max(LEAST_ANSWER_SECONDS, min(ANSWER_SECONDS, seconds))))

    async def _probe(self, seconds: float) -> None:
        try:
            if await self._is_blocked():
                return
            probing = asyncio.ensure_future(_channel(self._connection, False))
            await asyncio.wait({probing}, timeout=seconds)
            if not probing.done():
                await asyncio.wait({probing}, timeout=LAST_CHANCE_SECONDS)
            has_answered = probing.done()
            leave_behind(probing, _abandon)
            if has_answered:
                self._confirms_nothing = True
            else:
                probing.cancel()
                self._give_up()
        finally:
            self._is_asking = False
            self._silent_looks = 0

    def _give_up(self) -> None:
        self.is_dead = True
        self._on_gone()

    # -- publishing

    async def publish(self, message: Message, deadline: float) -> None:
        """Publish and wait for the confirm. Raises: LineLost, Suspected, and PublishErrors."""
        message_id = message.properties.message_id
        while message_id and (earlier_publish := self._ids.get(message_id)) is not None:
            await self._wait(asyncio.shield(earlier_publish), deadline, "waiting for another message with the same id")
        self._number += 1
        number = self._number
        if message_id:
            self._ids[message_id] = asyncio.get_running_loop().create_future()
        try:
            if self._trusted.covers(message):
                await self._publish(message, number, deadline)
            else:
                await self.publish_alone(message, deadline)
        finally:
            if message_id:
                self._ids.pop(message_id).set_result(None)

    async def _publish(self, message: Message, number: int, deadline: float) -> None:
        shared = await self._shared_channel(deadline)
        shared.unconfirmed[number] = message
        try:
            await self._send(shared.channel, message, deadline)
        except aio_errors.ChannelClosed as error:
            self._trusted.doubt(message)
            raise shared.verdict(error, message) from error
        except Nacked:
            self._renew(shared)
            raise
        finally:
            del shared.unconfirmed[number]
            if shared is not self._shared and not shared.unconfirmed:
                _abandon(shared.channel)

    def _renew(self, shared: _Shared) -> None:
        """After a nack, publish on a new channel: a channel whose queue has lost its leader refuses for as long as it lives. At
        most one per RENEW_SECONDS, because a full queue refuses many messages."""
        now = asyncio.get_running_loop().time()
        if shared is self._shared and now - self._renewed_at >= RENEW_SECONDS:
            self._shared, self._renewed_at = None, now

    async def publish_alone(self, message: Message, deadline: float) -> None:
        """Like `publish`, on a channel of its own, so that only this message can be why the channel is closed. Raises:
        LineLost, and PublishErrors."""
        await self._wait(self._alone.acquire(), deadline, "waiting for a channel", lambda _: self._alone.release())
        try:
            channel = await self._open_channel(deadline)
            try:
                await self._send(channel, message, deadline)
            except aio_errors.ChannelClosed as error:
                raise channel_error(closing_of(error), message) from error
            finally:
                _abandon(channel)
        finally:
            self._alone.release()
        self._trusted.note(message)

    async def _send(self, channel: Any, message: Message, deadline: float) -> None:
        frame_max = self._connection.transport.connection.connection_tune.frame_max if self.is_open else FRAME_MAX
        encoded = _Encoded(encode_properties(message, frame_max), message.properties.message_id)
        try:
            publishing = channel.basic_publish(
                message.body,
                exchange=message.exchange,
                routing_key=message.routing_key,
                properties=encoded,
                mandatory=message.mandatory,
                wait=False,
            )
            await self._wait(publishing, deadline, "waiting for the broker's confirm")
        except aio_errors.DeliveryError as error:
            returned = isinstance(error.frame, commands.Basic.Return)
            raise (unroutable(message) if returned else Nacked(refused(message))) from error
        except UNWRITABLE as error:
            raise unwritable(message, error) from error

    async def _shared_channel(self, deadline: float) -> _Shared:
        if self._shared is None or self._shared.channel.is_closed:
            await self._have_turn(deadline, "waiting for a channel")
            try:
                if self._shared is None or self._shared.channel.is_closed:
                    self._shared = _Shared(await self._open_channel(deadline))
            finally:
                self._turn.release()
        return self._shared

    async def _open_channel(self, deadline: float, *, confirms: bool = True) -> Any:
        """The aiormq channel under an aio-pika channel: it has the methods of the protocol."""
        return await self._wait(_channel(self._connection, confirms), deadline, "opening a channel", _abandon)

    async def _have_turn(self, deadline: float, doing: str) -> None:
        await self._wait(self._turn.acquire(), deadline, doing, lambda _: self._turn.release())

    # -- declaring

    def forget(self, entities: Sequence[Declaration]) -> None:
        """Declare these entities again when they are needed again: somebody may have deleted them."""
        self._declared.difference_update(entities)

    def trust(self, entities: Sequence[Declaration]) -> None:
        """Take these to exist."""
        self._declared.update(entities)

    async def declare(self, entities: Sequence[Declaration], deadline: float, warn: Warn) -> bool:
        """Make sure that entities exist, each once per connection; what exists with other arguments is used as found. Whether the
        broker was asked."""
        if self._declared.issuperset(entities):
            return False
        await self._have_turn(deadline, "waiting for another task's declarations")
        try:
            for entity in self._declared.missing(entities):
                refusal = await self._declare_on_its_own_channel(entity, deadline, passive=False)
                if self._declared.is_in_doubt(entity, refusal) and refusal is not None:
                    absence = await self._declare_on_its_own_channel(entity, deadline, passive=True)
                    self._declared.use_found(entity, refusal, absence, warn)
        finally:
            self._turn.release()
        return True

    async def _declare_on_its_own_channel(
        self, entity: Declaration, deadline: float, *, passive: bool
    ) -> Refusal | None:
        """Why the broker refused it. A refusal closes the channel, and the shared channel is needed for publishes."""
        check_name(entity)
        channel = await self._open_channel(deadline, confirms=False)
        doing = f"declaring {entity_name(entity)}"
        try:
            await self._wait(declaring(channel, entity, passive=passive)(), deadline, doing)
        except aio_errors.ChannelClosed as error:
            return closing_of(error)
        except BaseException:
            _abandon(channel)
            raise
        await self._wait(channel.close(), deadline, doing)
        return None

    # -- waiting

    async def _wait(
        self, awaitable: Any, deadline: float, doing: str, give_back: Callable[[Any], object] | None = None
    ) -> Any:
        """The result of the awaitable before the deadline. Raises: LineLost, ConnectionBlocked, PublishTimeout."""
        seconds_left = deadline - asyncio.get_running_loop().time()
        waiting = asyncio.ensure_future(awaitable)
        self._under_way.add(waiting)
        if self._look_timer is None:
            self._look_in(seconds_left)
        try:
            done = await ended(waiting, seconds_left, give_back)
        finally:
            self._under_way.discard(waiting)
        if done is None:
            if await self._is_blocked():
                raise blocked(self.address, "the broker said so")
            self._ask(ANSWER_SECONDS)
            raise PublishTimeout(f"the deadline passed while {doing} at {self.address.safe_url}")
        self._has_heard = True
        try:
            return done.result()
        except (PublishError, aio_errors.ChannelClosed, aio_errors.DeliveryError):
            raise
        except (Exception, asyncio.CancelledError) as error:
            # A connection that ends raises in its waiters what it was closed with: a bare Exception, or a cancellation that is
            # not ours.
            is_lost = not self.is_open or isinstance(
                error, (aio_errors.ChannelInvalidStateError, asyncio.CancelledError)
            )
            if not is_lost:
                raise
            raise LineLost(self._cause(error)) from error

    def _cause(self, error: BaseException) -> BaseException:
        """What to tell: that we gave up waiting, or the connection ended, cancels who waits for it."""
        if not isinstance(error, asyncio.CancelledError):
            return error
        what_was = "does not answer" if self.is_dead else "ended the connection"
        return ConnectionError(f"{self.address.safe_url} {what_was}")

    async def _is_blocked(self) -> bool:
        transport = self._connection.transport
        if transport is None:
            return False
        return await ended(transport.connection.ready(), 0.01) is None


def _abandon(channel: Any) -> None:
    """Close the channel in the background: nobody waits for the broker's answer."""
    if not channel.is_closed:
        leave_behind(channel.close())


def closing_of(error: aio_errors.ChannelClosed) -> Refusal:
    """The broker's code (0 for a code that we do not distinguish) and text."""
    text = str(error.args[-1]) if error.args else ""
    return Refusal(_CODES.get(text.partition(" ")[0], 0), text)


async def _channel(connection: Any, confirms: bool) -> Any:
    is_ours.set(True)  # of this task, which is ours
    channel = connection.channel(publisher_confirms=confirms, on_return_raises=confirms)
    await channel.initialize()
    return await channel.get_underlay_channel()

"""LoopPublisher: confirmed publishes from a worker's loop; never blocks, sends unconfirmed messages again after a reconnect.

Messages wait in order, are written at the end of a loop turn, and are outstanding until the broker's ack or nack. When the
channel is lost, outstanding messages go to the front of the line again: they may then be stored twice, but are never lost.

One message, one channel or one host must not hold up all others:

* A message for which the broker may close the channel goes over a channel of its own (see Trusted). One for which it closes the
  channel or the connection all the same fails alone. Where the broker's text does not tell which one it was, the messages under
  way go one at a time. A message fails, too, when the connection is cut again and again while it alone is under way.
* After a nack another channel is tried, then another host (see confirms.py). The old channel stays until all its messages are
  confirmed.
* When no confirm comes for some seconds and there is another host, all messages go to that host.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, TypeAlias

import pika
from pika.exceptions import AMQPError, AMQPHeartbeatTimeout, ChannelClosedByBroker, ConnectionClosedByBroker

from amqtask.exceptions import OperationalError, PublishError, PublishTimeout
from amqtask.ground.loop import OneTimer, Timer
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.entities import Declaration
from amqtask.protocol.message import Message
from amqtask.transport.confirms import (
    CONNECTION_FORCED,
    MOST_LOSSES,
    NONSENSE,
    PATIENCE_SECONDS,
    ConfirmingChannel,
    MessageIds,
    OnDone,
    Pending,
    Refusing,
    Trusted,
)
from amqtask.transport.connection import Backoff, ConnectionListener, LoopConnection
from amqtask.transport.content import UNWRITABLE, basic_properties, unwritable
from amqtask.transport.declare import MOST_DECLARED, Declarer, KnownEntities, NotAnswered
from amqtask.transport.errors import NOT_FOUND, channel_error, connection_closed_for, culprits, refused, unroutable

if TYPE_CHECKING:
    from amqtask.protocol.message import PropertiesLike
    from amqtask.transport.wire import PikaChannel, PikaFrame, PikaMethod, Wire

logger = bounded_logger("amqtask.transport")

# The most unconfirmed messages; further ones wait here, where they cost the broker nothing.
WINDOW = 2000
# Channels beside the present one, at most: old ones, and those of one message each.
MOST_BESIDE = 10
# After so many seconds without a confirm (doubled each time, up to the second value) all messages go to another host.
CONFIRM_SECONDS, MOST_CONFIRM_SECONDS = 4, 64
LOOK_SECONDS = 1.0
# A channel is replaced at most once in so many seconds; before a host is left, its confirms are awaited for as long.
SETTLE_SECONDS = 1.0
# For so many seconds all messages wait for a declaration of one of them, because others may need the same.
IN_LINE_SECONDS = 0.3


_ConfirmingChannel: TypeAlias = "ConfirmingChannel[Pending]"


class PikaLoopPublisher(ConnectionListener):
    """See amqtask.transport.contract.LoopPublisher; connects at `start` or at the first publish.

    Where the owner has deliveries on the connection, which end with it, its publishes must not go again afterwards (`resends`):
    messages that are unconfirmed when it is lost fail with PublishTimeout (they may or may not be stored), and the owner decides.
    `nack_patience`: for so many seconds a message that the broker refuses is tried again.
    """

    def __init__(
        self,
        connection: LoopConnection,
        *,
        on_warning: Callable[[str], None] = lambda text: None,
        resends: bool = True,
        nack_patience: float = PATIENCE_SECONDS,
    ) -> None:
        loop = self._loop = connection.loop
        self._name = connection.name
        self._warn = on_warning
        self._nack_patience = nack_patience
        self._resends = resends
        self._connection, self._use = connection, connection.join(self)
        self._declarer = Declarer(loop, on_warning)
        self._pika: Wire | None = None
        # The present channel, once it confirms; the one that is being opened; and those beside it that have unconfirmed messages:
        # old ones, and those of one message each.
        self._current: _ConfirmingChannel | None = None
        self._opening: PikaChannel | None = None
        self._beside: list[_ConfirmingChannel] = []
        self._waiting: deque[Pending] = deque()
        # Messages that get a channel of their own: those that wait for one, and those for which it is being opened.
        self._trusted = Trusted()
        self._untrusted: deque[Pending] = deque()
        self._lone: dict[PikaChannel, Pending] = {}
        # Refused messages that go again after a pause, in order.
        self._held: dict[Pending, Timer] = {}
        self._refusing = Refusing()
        self._renewed_at = self._left_at = float("-inf")
        self._is_leaving = False
        self._leaving = OneTimer(loop)
        self._known = KnownEntities()
        # Of these, what was declared over this connection.
        self._declared: set[Declaration] = set()
        self._declared_tuples: dict[int, tuple[Declaration, ...]] = {}
        # Messages that wait for their declarations, by these declarations; other messages go on when one is late.
        self._undeclared: dict[tuple[Declaration, ...], list[Pending]] = {}
        # While this timer runs, all messages wait for a declaration. Once one was late, the others pass until all are declared.
        self._in_line = OneTimer(loop)
        self._is_late = False
        self._ids = MessageIds()
        # How many messages to publish one at a time, because one of them makes the broker close the channel.
        self._suspects = 0
        self._is_due = self._is_stopped = self._is_blocked = False
        self._refusals: set[str] = set()
        self._backoff = Backoff()
        self._timer = OneTimer(loop)
        # The look at confirms: how many there were at the last one, and for how many looks there was none.
        self._watch = OneTimer(loop)
        self._confirmed = self._silent_looks = 0
        self._confirm_seconds = CONFIRM_SECONDS

    # -- the contract

    @property
    def outstanding(self) -> int:
        """How many messages are not confirmed yet."""
        undeclared = sum(map(len, self._undeclared.values()))
        return (
            len(self._waiting)
            + len(self._untrusted)
            + len(self._lone)
            + undeclared
            + len(self._held)
            + sum(len(confirming.confirms) for confirming in self._confirming_channels)
        )

    @property
    def host(self) -> str:
        """The URL, without password, of the host that it is connected to; empty while it is not."""
        return self._connection.host

    def go_to(self, host: str, reason: str) -> None:
        """Leave for the host with this URL, if it is one of several and not the present one."""
        self._connection.go_to(host, reason)

    @property
    def oldest(self) -> Message | None:
        """The message that waits longest for its confirm, while the broker could give it."""
        if not self._use.is_open or self._is_blocked:
            return None
        pending = next(chain(self._unconfirmed(), self._held, self._lone.values(), self._untrusted), None)
        if pending is None:
            pending = next(iter(self._waiting), None) or next(
                (pending_messages[0] for pending_messages in self._undeclared.values()), None
            )
        return None if pending is None else pending.message

    def start(self) -> None:
        """Connect now."""
        self._is_stopped = False
        self._use.start()

    def publish(self, message: Message, on_done: OnDone) -> None:
        """Publish at the end of this turn, in order; `on_done` follows the confirm."""
        self._ids.complete(message)
        self._waiting.append(Pending(message, on_done))
        if not self._is_due:
            self._is_due = True
            self._loop.call_last(self._flush)

    def stop(self, on_stopped: Callable[[], None] | None = None) -> None:
        """Write the waiting messages, then close; `on_stopped` follows. Their callbacks are not called any more: an owner that
        needs the confirms waits for `outstanding` to be 0 first."""
        self._flush()
        self._is_stopped = True
        self._forget_timers()
        self._use.stop(on_stopped)

    # -- publishing

    @property
    def _confirming_channels(self) -> list[_ConfirmingChannel]:
        return self._beside if self._current is None else [*self._beside, self._current]

    def _unconfirmed(self) -> Iterator[Pending]:
        return (pending for confirming in self._confirming_channels for pending in confirming.confirms.outstanding())

    def _flush(self) -> None:
        self._is_due = False
        if self._is_stopped:
            return
        if not self._use.is_running:
            self._use.start()
        confirming = self._current
        if confirming is None or not confirming.channel.is_open or self._is_leaving or self._in_line.is_set:
            return
        waiting, confirms, is_trusted = self._waiting, confirming.confirms, self._trusted.covers
        window = 1 if self._suspects else WINDOW
        self._open_lone()
        while waiting and len(confirms) < window:
            pending = waiting.popleft()
            declare = pending.message.declare
            if declare and self._declared_tuples.get(id(declare)) is not declare and not self._is_declared(declare):
                self._declare(declare, pending)
                if self._in_line.is_set:
                    return
            elif is_trusted(pending.message):
                self._send(confirming, pending)
            else:
                self._untrusted.append(pending)
                self._open_lone()
        if confirms and not self._watch.is_set:
            self._look_on()

    def _send(self, confirming: _ConfirmingChannel, pending: Pending) -> None:
        message = pending.message
        try:
            confirming.channel.basic_publish(
                message.exchange,
                message.routing_key,
                message.body,
                basic_properties(message.properties),
                message.mandatory,
            )
        except UNWRITABLE as error:  # pika encodes all frames before it writes any
            self._settled(pending, unwritable(message, error))
        else:
            confirming.confirms.published(pending)

    def _on_confirm(self, confirming: _ConfirmingChannel, frame: PikaFrame) -> None:
        method = frame.method
        acked = isinstance(method, pika.spec.Basic.Ack)
        returns = confirming.returns
        for pending in confirming.confirms.settle(method.delivery_tag, method.multiple):
            message = pending.message
            if len(returns) and returns.claim(message.properties.message_id, message.exchange, message.routing_key):
                if not (pending.declares_queues and self._goes_again(pending)):
                    self._settled(pending, unroutable(message))
            elif acked:
                if message.exchange:
                    self._trusted.note(message)
                self._settled(pending, None)
            else:
                self._nacked(confirming, pending)
        if confirming is not self._current and not confirming.confirms:
            self._close_beside(confirming)
        if self._is_leaving and not any(self._unconfirmed()):
            self._leave()
        if self._waiting and not self._is_due:
            self._flush()

    def _goes_again(self, pending: Pending) -> bool:
        """Publish a returned message once more, with all its declarations, because its queue may have been deleted since.
        False when that has been done already."""
        if not pending.declares_anew():
            return False
        self._declared.difference_update(pending.message.declare)
        self._declared_tuples.clear()
        self._waiting.appendleft(pending)
        return True

    def _settled(self, pending: Pending, error: PublishError | None) -> None:
        if self._suspects:
            self._suspects -= 1
        pending.on_done(error)

    # -- nacks, and confirms that do not come

    def _nacked(self, confirming: _ConfirmingChannel, pending: Pending) -> None:
        now = time.monotonic()
        pause = pending.pause_after_nack(self._refusing, now, now + self._nack_patience)
        if pause is None:
            self._settled(pending, refused(pending.message))
        else:
            self._held[pending] = self._loop.call_later(pause, partial(self._queue_again, pending))
            self._change(confirming, now, is_first=pending.nacks == 1)

    def _queue_again(self, pending: Pending) -> None:
        del self._held[pending]
        self._waiting.append(pending)
        self._flush()

    def _change(self, confirming: _ConfirmingChannel, now: float, *, is_first: bool) -> None:
        """Open another channel; where that did not help, go to another host."""
        if not is_first and self._use.has_other_hosts and now - self._left_at > self._nack_patience:
            self._begin_leaving()
        elif confirming is self._current and now - self._renewed_at >= SETTLE_SECONDS:
            self._renewed_at = now
            self._beside.append(confirming)
            self._current = None
            self._open_channel()

    def _begin_leaving(self) -> None:
        if not self._is_leaving:
            self._is_leaving = True
            self._left_at = time.monotonic()
            self._leaving.set(SETTLE_SECONDS, self._leave)

    def _leave(self) -> None:
        self._connection.leave("another host is to be tried")

    def _close_beside(self, confirming: _ConfirmingChannel) -> None:
        if confirming in self._beside:
            self._beside.remove(confirming)
            if confirming.channel.is_open:
                confirming.channel.close()
            self._open_lone()

    def _look(self) -> None:
        """Look whether confirms come. (That covers declarations: a message that waits for one is not confirmed.)"""
        answers = sum(confirming.confirms.settled for confirming in self._confirming_channels)
        has_moved = answers != self._confirmed
        self._confirmed = answers
        if has_moved:
            self._confirm_seconds = CONFIRM_SECONDS
        if not self._waiting and not any(self._unconfirmed()):
            self._silent_looks = 0
            return
        is_silent = self._use.is_open and not self._is_blocked and not has_moved
        self._silent_looks = self._silent_looks + 1 if is_silent else 0
        if self._silent_looks * LOOK_SECONDS >= self._confirm_seconds:
            self._silent_looks = 0
            self._confirm_seconds = min(self._confirm_seconds * 2, MOST_CONFIRM_SECONDS)
            self._connection.leave("the broker confirms nothing")
        self._watch.set(LOOK_SECONDS, self._look)

    def _look_on(self) -> None:
        if not self._watch.is_set and self._use.has_other_hosts:
            self._watch.set(LOOK_SECONDS, self._look)

    # -- declaring

    def _is_declared(self, declare: tuple[Declaration, ...]) -> bool:
        if not self._declared.issuperset(declare):
            return False
        if len(self._declared_tuples) > MOST_DECLARED:
            self._declared_tuples.clear()
        # Routes give the same tuple again and again: its identity is cheaper to look up than its members.
        self._declared_tuples[id(declare)] = declare
        return True

    def _declare(self, declare: tuple[Declaration, ...], pending: Pending) -> None:
        pending_messages = self._undeclared.get(declare)
        if pending_messages is not None:
            pending_messages.append(pending)
            return
        self._undeclared[declare] = [pending]
        missing = [entity for entity in declare if entity not in self._declared]
        self._look_on()
        if not self._is_late:
            self._in_line.set(IN_LINE_SECONDS, self._go_past)
        self._declarer.declare(missing, lambda error: self._on_declared(declare, error))

    def _go_past(self) -> None:
        self._let_pass(is_late=True)
        self._flush()

    def _let_pass(self, *, is_late: bool) -> None:
        self._is_late = is_late
        self._in_line.cancel()

    def _on_declared(self, declare: tuple[Declaration, ...], error: OperationalError | None) -> None:
        pending_messages = self._undeclared.pop(declare, [])
        self._let_pass(is_late=self._is_late and bool(self._undeclared))
        if error is None or (isinstance(error, NotAnswered) and self._known.issuperset(declare)):
            if len(self._declared) > MOST_DECLARED:
                self._declared.clear()
                self._declared_tuples.clear()
            self._declared.update(declare)
            self._known.note(declare)
            self._waiting.extendleft(reversed(pending_messages))
        else:
            refused = error if isinstance(error, PublishError) else PublishError(str(error))
            for pending in pending_messages:
                self._settled(pending, refused)
        self._flush()

    # -- the connection's events

    def on_open(self, connection: Wire) -> None:
        """There is a connection: open a channel in confirm mode."""
        self._forget_timer()
        self._pika = connection
        self._declarer.connected(connection)
        self._open_channel()

    def on_lost(self, error: Exception) -> None:
        """Unconfirmed messages go again on the next connection."""
        if self._resends:  # else another user of the connection tells
            logger.info("%s: connection lost: %s", self._name or "a publisher", error)
        self._forget_timer()
        self._pika = None
        self._declarer.lost()
        self._is_leaving = self._is_blocked = False
        self._declared.clear()
        self._declared_tuples.clear()
        unconfirmed = list(self._unconfirmed())
        self._current = self._opening = None
        self._beside.clear()
        unsent = [*self._lone.values(), *self._untrusted, *chain.from_iterable(self._undeclared.values())]
        for pending_messages in (self._lone, self._untrusted, self._undeclared):
            pending_messages.clear()
        self._let_pass(is_late=False)
        self._waiting.extendleft(reversed([*unconfirmed, *unsent]))
        self._blame_for_connection(error, unconfirmed)
        if not self._resends:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        lost = [*self._waiting, *self._held]
        self._waiting.clear()
        self._forget_held()
        for pending in lost:
            pending.on_done(PublishTimeout(f"the connection was lost before the broker's confirm: {error}"))

    # A host that cannot be reached: the consumer on the same broker warns already.

    def on_refused(self, error: Exception) -> None:
        """Log it once; the messages stay outstanding, so nothing is acknowledged, until the broker accepts the login."""
        if str(error) not in self._refusals:
            self._refusals.add(str(error))
            self._warn(f"results, retries and dead letters wait: {error}")

    def on_blocked(self, reason: str | None) -> None:
        """An alarm: the broker stops reading; messages wait, nothing is lost."""
        self._is_blocked = reason is not None
        if reason is not None:
            self._warn(f"the broker blocks publishing ({reason}); results and retries wait until it goes on")

    # -- the channel

    def _open_channel(self) -> None:
        if self._pika is not None and self._pika.is_open and self._opening is None and self._current is None:
            self._opening = self._pika.channel(on_open_callback=self._on_channel)
            self._opening.add_on_close_callback(self._on_channel_closed)

    def _on_channel(self, channel: PikaChannel) -> None:
        confirming: _ConfirmingChannel = ConfirmingChannel(channel)
        channel.add_on_return_callback(partial(self._on_return, confirming))
        channel.confirm_delivery(partial(self._on_confirm, confirming), callback=lambda _: self._ready(confirming))

    def _on_return(
        self,
        confirming: _ConfirmingChannel,
        channel: object,
        method: PikaMethod,
        properties: PropertiesLike,
        body: bytes,
    ) -> None:
        confirming.returns.returned(properties.message_id, method.exchange, method.routing_key)

    def _open_lone(self) -> None:
        """Open channels for messages that must not share one; those that may by now go with the others."""
        untrusted = self._untrusted
        while untrusted and self._pika is not None and self._pika.is_open:
            if self._trusted.covers(untrusted[0].message):
                self._waiting.append(untrusted.popleft())
            elif len(self._lone) + len(self._beside) < MOST_BESIDE:
                try:
                    channel = self._pika.channel(on_open_callback=self._on_channel)
                except AMQPError:  # the connection has no more channels
                    if self._current is None:
                        break
                    self._send(self._current, untrusted.popleft())
                    continue
                channel.add_on_close_callback(self._on_channel_closed)
                self._lone[channel] = untrusted.popleft()
            else:
                break

    def _ready(self, confirming: _ConfirmingChannel) -> None:
        pending = self._lone.pop(confirming.channel, None)
        if pending is not None:
            self._beside.append(confirming)
            self._send(confirming, pending)
            self._look_on()
            if not confirming.confirms:  # AMQP cannot encode it
                self._close_beside(confirming)
            return
        if confirming.channel is not self._opening:
            return
        self._opening, self._current = None, confirming
        self._backoff.succeeded()
        self._flush()

    def _on_channel_closed(self, channel: PikaChannel, error: Exception) -> None:
        if self._pika is None or not self._pika.is_open or self._is_stopped:
            return  # the connection's own end follows
        confirming = next(
            (confirming for confirming in self._confirming_channels if confirming.channel is channel), None
        )
        lone = self._lone.pop(channel, None)
        if lone is not None:
            self._untrusted.append(lone)
            self._loop.call_later(self._backoff.next(), self._flush)
        if confirming is None and channel is not self._opening:
            return
        unconfirmed = [] if confirming is None else list(confirming.confirms.outstanding())
        self._waiting.extendleft(reversed(unconfirmed))
        if confirming in self._beside:
            self._beside.remove(confirming)
        else:
            self._current = self._opening = None
        if isinstance(error, ChannelClosedByBroker) and self._blame_for_channel(error, unconfirmed):
            self._open_channel()
            self._flush()
        elif not self._timer.is_set:
            self._timer.set(self._backoff.next(), self._open_channel)

    # -- which message is to blame

    def _blame_for_channel(self, error: ChannelClosedByBroker, unconfirmed: list[Pending]) -> bool:
        """The broker closed the channel because of one message: that one fails, the others go again. When the broker's text does
        not tell which, they go one at a time. False when it was none of them."""
        if not unconfirmed:
            self._warn(str(OperationalError(f"the broker closed the publishing channel: {error}")))
            return False
        messages = [pending.message for pending in unconfirmed]
        guilty = culprits(error, messages, list(range(len(messages))))
        if not guilty:
            self._suspects = len(unconfirmed)
        for index in reversed(guilty):
            pending = unconfirmed[index]
            self._waiting.remove(pending)
            self._trusted.doubt(pending.message)
            if error.reply_code != NOT_FOUND or not self._goes_again(pending):
                self._settled(pending, channel_error(error, pending.message))
        return True

    def _blame_for_connection(self, error: Exception, unconfirmed: list[Pending]) -> None:
        """The connection was closed or cut with these messages under way: one of them may be the reason."""
        code = error.reply_code if isinstance(error, ConnectionClosedByBroker) else None
        if not unconfirmed or code == CONNECTION_FORCED or isinstance(error, AMQPHeartbeatTimeout):
            return
        for pending in unconfirmed:
            pending.losses += 1
        first = unconfirmed[0]
        is_alone = len(unconfirmed) == 1
        if is_alone and (code in NONSENSE or first.losses >= MOST_LOSSES):
            self._waiting.remove(first)
            self._settled(first, connection_closed_for(first.message, error))
        elif code in NONSENSE or first.is_suspicious:
            self._suspects = len(unconfirmed)

    # -- timers

    def _forget_timer(self) -> None:
        self._timer.cancel()
        self._leaving.cancel()

    def _forget_timers(self) -> None:
        self._forget_timer()
        self._forget_held()
        self._let_pass(is_late=False)
        self._watch.cancel()

    def _forget_held(self) -> None:
        for timer in self._held.values():
            timer.cancel()
        self._held.clear()

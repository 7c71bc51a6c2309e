"""Collector: waits until a queue holds so many messages, takes them all, and deletes it once they are dealt with.

Several processes may look at one queue; each does when it has published a message to it. The process that finds it full
consumes it exclusively, so that one process at a time has all of its messages; a process that the broker refuses leaves them to
the other. Messages that cannot be used yet are requeued, and then counted again: a message that came meanwhile was counted by its
own publisher before the others were back in the queue, so one of the two counts sees all of them.

A look costs one passive declare on a channel that all looks share. Requests for a look at a queue while one is under way share
the next look. The count of a classic queue is exact (its process has every message that was confirmed).

A node that has lost the others goes on without them on RabbitMQ 4 with Khepri, and knows nothing of a queue that was made since.
A part is confirmed before its queue is looked at, so looks go over the host that the publisher is connected to.

A queue whose node is down exists again when the node comes back: such a queue is reported as AWAY, not as GONE. So is a queue
whose broker does not answer.

A connection that fell silent keeps the messages that it was given until the broker gives it up, after some heartbeats. Whoever
has lost them so looks until they are back, or the queue is gone: to everybody else it is a queue that is not full.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pika.exceptions import ChannelClosedByBroker

from amqtask.ground.loop import OneTimer
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.message import Delivery
from amqtask.transport.connection import ConnectionListener, LoopConnection
from amqtask.transport.contract import QueuePresence
from amqtask.transport.declare import wrong_name
from amqtask.transport.errors import ACCESS_REFUSED, NOT_FOUND, is_away
from amqtask.transport.link import delivery_of

if TYPE_CHECKING:
    from amqtask.protocol.message import PropertiesLike
    from amqtask.transport.contract import LoopPublisher
    from amqtask.transport.wire import PikaChannel, PikaFrame, PikaMethod, Wire

logger = bounded_logger("amqtask.transport")

OnDone = Callable[[QueuePresence], None]
Deliveries = Sequence[Delivery]
Take = Callable[[Deliveries, Callable[[bool], None]], bool]
# The longest wait for a count, and for the messages that were counted: RabbitMQ 4.3 tries for more than a minute to reach a node
# that is down, and the other chords wait meanwhile.
LOOK_SECONDS, READ_SECONDS = 3.0, 30.0
# It changes its host at most once in so many seconds.
MOVE_SECONDS = 3.0
# Between two looks for messages that a lost connection of ours still has.
HELD_PAUSE = 1.0


@dataclass(slots=True, eq=False)
class _Look:
    """One queue to look at. `callbacks` wait for the look that is under way, `next_callbacks` for the one after it."""

    queue: str
    size: int
    take: Take
    callbacks: list[OnDone] = field(default_factory=list)
    next_callbacks: list[OnDone] = field(default_factory=list)
    # Its messages are dealt with; the queue only has to be deleted.
    is_over: bool = False
    # How many messages a connection of ours was given that is lost: the broker may not have noticed.
    held: int = 0


class PikaCollector(ConnectionListener):
    """Over a connection of its own, opened at the first look; when it is lost, looks begin again on the next one."""

    def __init__(
        self,
        connection: LoopConnection,
        *,
        beside: LoopPublisher | None = None,
        on_warning: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._warn = on_warning
        self.loop = connection.loop
        self._refusals: set[str] = set()
        self._beside = beside
        self._moved_at = float("-inf")
        self._connection, self._use = connection, connection.join(self)
        self._pika: Any = None
        self._channel: PikaChannel | None = None
        self._looks: dict[str, _Look] = {}
        self._line: deque[_Look] = deque()
        self._current: _Look | None = None
        self._timer = OneTimer(self.loop)
        self._is_stopped = False

    def collect(self, queue: str, size: int, *, take: Take, on_done: OnDone) -> None:
        """Look whether `queue` holds `size` messages; if so offer them: `take(messages, finished)` returns False to requeue
        them, else it calls `finished(True)` later, which deletes the queue, or `finished(False)`, which requeues them.

        `on_done(presence)` follows: THERE when the queue needs nothing more from the caller (it is not full, or another process
        has its messages), GONE when it is dealt with and deleted, AWAY when it cannot be reached. Not called while the broker
        itself is away.
        """
        if wrong_name(queue):
            self.loop.call_soon(lambda: on_done(QueuePresence.GONE))  # no queue can have this name
            return
        look = self._looks.get(queue)
        if look is not None:
            look.next_callbacks.append(on_done)
            return
        look = self._looks[queue] = _Look(queue, size, take, [on_done])
        self._line.append(look)
        if not self._use.is_running and not self._is_stopped:
            self._use.start()
        self._next()

    def stop(self) -> None:
        """Close; messages that are held go back to their queues."""
        self._is_stopped = True
        self._use.stop()

    # -- counting

    def _next(self) -> None:
        channel = self._channel
        if self._current is not None or not self._line or channel is None or not channel.is_open:
            return
        if self._moves():
            return
        look = self._current = self._line.popleft()
        self._timer.set(LOOK_SECONDS, self._count_late)
        if look.is_over:
            channel.queue_delete(look.queue, callback=lambda _: self._counted(look, 0))
        else:
            channel.queue_declare(look.queue, passive=True, callback=lambda frame: self._counted(look, _count(frame)))

    def _moves(self) -> bool:
        """Go to the publisher's host, if that is another one; the looks follow when it is reached."""
        host, now = self._beside.host if self._beside is not None else "", time.monotonic()
        if not host or host == self._connection.host or now - self._moved_at < MOVE_SECONDS:
            return False
        self._moved_at = now
        self._connection.go_to(host, "what is published goes over another host")
        return self._channel is None

    def _counted(self, look: _Look, count: int) -> None:
        if look is not self._current:
            return
        self._take_current()
        if not look.is_over and count >= max(1, look.size, look.held):
            _Reader(self, look, count)
        elif look.held and not look.is_over:
            self.loop.call_later(HELD_PAUSE, lambda: self.look_again(look))
        else:
            self.settle(look, QueuePresence.THERE)
        self._next()

    def _take_current(self) -> _Look | None:
        look, self._current = self._current, None
        self._timer.cancel()
        return look

    def _count_late(self) -> None:
        """The broker does not answer for a queue: go on with the others, over a new channel."""
        look, channel = self._take_current(), self._channel
        self._channel = None
        if channel is not None and channel.is_open:
            channel.close()
        self._open_channel()
        if look is not None:
            self.settle(look, QueuePresence.AWAY)

    def settle(self, look: _Look, presence: QueuePresence) -> None:
        """Call the callbacks of this look; look again for those that came meanwhile, if the queue may still hold messages."""
        presence = QueuePresence.GONE if look.is_over else presence
        done, look.callbacks, look.next_callbacks = look.callbacks, look.next_callbacks, []
        if look.callbacks and presence is QueuePresence.THERE:
            self._line.append(look)
        else:
            done += look.callbacks
            self._looks.pop(look.queue, None)
        for on_done in done:
            on_done(presence)
        self._next()

    def look_again(self, look: _Look) -> None:
        """Its reader has lost its channel, or what that had was not back yet."""
        self._line.append(look)
        self._next()

    @property
    def connection(self) -> Any:
        """The open connection, else None."""
        return self._pika if self._pika is not None and self._pika.is_open else None

    # -- the channel that counts

    def _open_channel(self) -> None:
        if self.connection is not None:
            self._channel = self._pika.channel(on_open_callback=lambda _: self._next())
            self._channel.add_on_close_callback(self._on_channel_closed)

    def _on_channel_closed(self, channel: PikaChannel, error: Exception) -> None:
        if channel is not self._channel:
            return
        self._channel = None
        look = self._take_current()
        if self.connection is None:
            if look is not None:
                self._line.appendleft(look)  # again on the next
            return
        self._open_channel()
        if look is not None:
            self.settle(look, _presence_of(error))

    # -- the connection's events

    def on_open(self, connection: Wire) -> None:
        """Look at what waits."""
        self._pika = connection
        self._open_channel()

    def on_lost(self, error: Exception) -> None:
        """Looks begin again on the next connection."""
        logger.info("chords: connection lost: %s", error)
        self._pika = self._channel = None
        look = self._take_current()
        if look is not None:
            self._line.appendleft(look)

    def on_refused(self, error: Exception) -> None:
        """Log it once. No `on_done` is called, so nothing is acknowledged, until the broker accepts the login."""
        if str(error) not in self._refusals:
            self._refusals.add(str(error))
            self._warn(f"chords wait: {error}")


class _Reader:
    """One attempt to consume all messages of a queue, on a channel of its own."""

    def __init__(self, owner: PikaCollector, look: _Look, count: int) -> None:
        self._owner = owner
        self._look = look
        self._expected = count
        self._deliveries: list[Delivery] = []
        self._tag = ""
        self._is_decided = False
        self._is_completing = False
        self._is_over = False
        self._timer = OneTimer(owner.loop)
        self._set_timer()
        self._channel = owner.connection.channel(on_open_callback=lambda _: self._consume())
        self._channel.add_on_close_callback(self._closed)
        # basic.cancel: the queue is gone, or its node is down.
        self._channel.add_on_cancel_callback(self._cancelled)

    def _set_timer(self) -> None:
        self._timer.set(READ_SECONDS, lambda: self._end(QueuePresence.AWAY))

    # -- taking

    def _consume(self) -> None:
        self._is_decided = False
        self._tag = self._channel.basic_consume(self._look.queue, self._message, exclusive=True)

    def _message(self, channel: object, method: PikaMethod, properties: PropertiesLike, body: bytes) -> None:
        self._deliveries.append(delivery_of(method, properties, body, self._look.queue))
        if len(self._deliveries) >= self._expected and not self._is_decided:
            self._is_decided = True
            self._decide()

    def _decide(self) -> None:
        self._is_completing = True
        self._timer.cancel()
        if not self._look.take(self._deliveries, self._finished):
            self._is_completing = False
            self._set_timer()
            self._channel.basic_cancel(self._tag, callback=self._give_back)

    def _give_back(self, _: object) -> None:
        read_count = len(self._deliveries)
        self._deliveries.clear()
        self._channel.basic_nack(0, multiple=True, requeue=True)
        self._channel.queue_declare(
            self._look.queue, passive=True, callback=lambda frame: self._recounted(read_count, _count(frame))
        )

    def _recounted(self, read_count: int, count: int) -> None:
        if count > read_count:
            self._expected = count
            self._consume()
        else:
            self._end(QueuePresence.THERE)

    def _finished(self, is_dealt_with: bool) -> None:
        self._is_completing = False
        self._look.is_over = is_dealt_with
        if not self._channel.is_open:
            self._lost()
        elif is_dealt_with:
            self._channel.queue_delete(self._look.queue, callback=lambda _: self._end(QueuePresence.GONE))
        else:
            self._end(QueuePresence.AWAY)

    def _lost(self) -> None:
        """Its channel is closed: another one takes the messages when they are back, or only deletes the queue."""
        self._is_over = True
        self._timer.cancel()
        self._look.held = self._expected
        self._owner.look_again(self._look)

    def _end(self, presence: QueuePresence) -> None:
        """End this attempt; closing the channel requeues the messages that it still has."""
        if self._is_over:
            return
        self._is_over = True
        self._timer.cancel()
        if self._channel.is_open:
            self._channel.close()
        self._owner.settle(self._look, presence)

    def _cancelled(self, frame: object) -> None:
        if not self._is_completing:
            self._end(QueuePresence.AWAY)

    def _closed(self, channel: object, error: Exception) -> None:
        if self._is_over or self._is_completing:
            return  # in the latter case it goes on when it has finished
        if self._owner.connection is None:
            self._lost()
        else:
            self._end(_presence_of(error))


def _presence_of(error: Exception) -> QueuePresence:
    """What the broker's refusal of a look means: another process has the queue (THERE), or has dealt with it (GONE), or it is
    AWAY."""
    if not isinstance(error, ChannelClosedByBroker) or is_away(error):
        return QueuePresence.AWAY
    if error.reply_code == ACCESS_REFUSED and "exclusive" in error.reply_text:
        return QueuePresence.THERE
    return QueuePresence.GONE if error.reply_code == NOT_FOUND else QueuePresence.AWAY


def _count(frame: PikaFrame) -> int:
    return int(frame.method.message_count)

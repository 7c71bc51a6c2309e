"""QueueReader: one queue of replies, consumed by any thread that waits for a reply.

Leader and followers: the thread that has the one link of `Links` leads, and drives the connection for all threads. The others
wait, each on a lock of its own, and are woken when a reply has come. One of them takes over when the leader has its reply, or has
left with an exception. No background thread runs unless an application asked for callbacks (`start_thread`), and no reply costs
a round trip of its own: a burst is read in one turn, and acknowledged with one frame.

A reply is acknowledged after it was handed over. Replies that the broker had sent into a connection that then broke come again
on the next one, so a reply may come twice, and none is lost.

Nothing drives the connection between waits, so it has no AMQP heartbeat but TCP keepalive; after a pause it is checked with a
cheap round trip before it is used.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pika import spec
from pika.exceptions import ChannelClosedByBroker

from amqtask.exceptions import AccessRefused, BrokerUnreachable, ConnectionBlocked, PublishError, PublishTimeout
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.entities import Queue
from amqtask.protocol.message import Delivery
from amqtask.topology.declarations import consumption
from amqtask.transport.errors import ACCESS_REFUSED, NOT_FOUND, lacks
from amqtask.transport.link import SLICE, Link, LinkLost, Links, delivery_of
from amqtask.transport.url import BrokerAddress, HostTurns, beginning_after

if TYPE_CHECKING:
    from amqtask.protocol.message import PropertiesLike
    from amqtask.transport.wire import PikaMethod

logger = bounded_logger("amqtask.transport")
OnReply = Callable[[Delivery], None]
# Seconds of silence after which the connection is checked, and how long the answer may take.
CHECK_AFTER, CHECK_TIMEOUT = 30.0, 2.0
# Seconds between attempts to get a lost connection back.
RETRY_PAUSE = 0.5
# A wait with less time than this is not shared between hosts (seconds).
SHORTEST_SHARE = 1.0
# A host that has not answered a declaration after so long is left for another one.
LATE_SECONDS = 2.0
# A wait without a deadline is cut into pieces of so many seconds.
LONG = 3600.0
CLOSED = "the application is closed, and so is its queue of replies"


def guarded(on_reply: OnReply) -> OnReply:
    """Wraps a user's callback: its errors are logged, and the next replies are handled."""

    def call(delivery: Delivery) -> None:
        try:
            on_reply(delivery)
        except Exception:
            logger.exception("a reply on %s could not be handled", delivery.queue)

    return call


class _ReplyLink(Link):
    """A link that consumes replies; `last_tag` is the last delivery tag that is not acknowledged yet."""

    def __init__(self, owner: QueueReader, name: str) -> None:
        super().__init__(heartbeat=0, name=name)
        self._owner = owner
        self.last_tag = 0
        # Whether the broker has confirmed the consumer; an exception may have ended the call that opened the link before that.
        self.is_consuming = False
        # Since when the answer to a check of the connection is missing.
        self.asked_at: float | None = None

    def on_delivery(self, method: PikaMethod, properties: PropertiesLike, body: bytes, error: Exception | None) -> None:
        """A reply has come."""
        self.last_tag = method.delivery_tag
        if error is not None:
            logger.error("a message on the queue of replies %s is dropped: %s", self._owner.queue.name, error)
            return
        self._owner.on_reply(delivery_of(method, properties, body, self._owner.queue.name))

    def on_cancelled(self, consumer: str) -> None:
        """The queue is gone, or its node is down."""
        self.fail(ConnectionError(f"the broker cancelled the consumer of {self._owner.queue.name!r}"))


class QueueReader:
    """Declares and consumes `queue` and hands each reply to `on_reply`, in the driving thread.

    An error of `on_reply` is raised in the driving thread; see `guarded`. `on_queue_lost` returns another queue to go on with
    when this one is on a node that is down. `pid` is the process it belongs to: after a fork its owner makes a new one.
    """

    def __init__(
        self,
        addresses: Sequence[BrokerAddress],
        queue: Queue,
        on_reply: OnReply,
        *,
        connect_timeout: float = 4.0,
        name: str = "amqtask replies",
        on_queue_lost: Callable[[PublishError], Queue] | None = None,
    ) -> None:
        self.pid = os.getpid()
        self.queue = queue
        self.on_reply = on_reply
        self._addresses = tuple(addresses)
        self._connect_timeout = connect_timeout
        self._name = name
        self._on_queue_lost = on_queue_lost
        self._links: Links[_ReplyLink] = Links(1, lambda: _ReplyLink(self, name))
        # The link that consumes.
        self._link: _ReplyLink | None = None
        # The locks of followers; each is released once when a reply has come, or the leader leaves.
        self._waiting: dict[Any, bool] = {}
        self._thread: threading.Thread | None = None
        self._retry_at = 0.0
        # The host over which the queue was first consumed, and how often in a row since then that failed in the time given.
        self._first_address: BrokerAddress | None = None
        self._late_declarations = 0
        self._is_closed = False
        # Closed while another thread leads: that thread drops the link.
        self._is_left = False

    @property
    def is_consuming(self) -> bool:
        """Whether the queue is consumed, as far as we know."""
        link = self._link
        return link is not None and link.is_open

    def ensure(self, timeout: float) -> None:
        """Make sure that the queue exists and is consumed. Raises: BrokerUnreachable, AccessRefused."""
        deadline = time.monotonic() + timeout
        while not self.is_consuming:
            seconds_left = deadline - time.monotonic()
            if self._links.is_held_here():
                # This signal handler has interrupted the call that connects: it needs the queue now, the consumer can follow.
                self._declare_beside(deadline)
                return
            link = self._links.try_take(sys._getframe())
            if link is not None:
                try:
                    self._connect(link, deadline)
                except LinkLost as lost:
                    if seconds_left <= RETRY_PAUSE:
                        raise self._unreachable(lost) from lost
                    time.sleep(0.05)
                finally:
                    self._release(link)
            elif seconds_left <= 0:
                raise BrokerUnreachable(f"the deadline passed while connecting for replies to {self.queue.name!r}")
            else:
                self._await_news(seconds_left, lambda: self.is_consuming)

    def drive(self, done: Callable[[], bool], deadline: float | None) -> bool:
        """Wait until `done()` or the deadline (monotonic seconds, None: for ever); whether it is done.

        Raises: BrokerUnreachable when the connection is lost and does not come back before the deadline, AccessRefused.
        """
        while True:
            if done():
                return True
            seconds_left = LONG if deadline is None else deadline - time.monotonic()
            if seconds_left <= 0:
                return False
            if self._is_closed:
                raise BrokerUnreachable(CLOSED)
            if self._links.is_held_here():
                raise RuntimeError(
                    "waiting for a result inside a result's callback, or a signal handler that interrupted such a wait, would "
                    "wait for ever"
                )
            link = self._links.try_take(sys._getframe())
            if link is None:
                self._await_news(seconds_left, done)
                continue
            try:
                self._drive(link, done, time.monotonic() + seconds_left, is_endless=deadline is None)
            finally:
                self._release(link)

    def poll(self) -> None:
        """Read the replies that have come, without waiting; a lost connection is made anew."""
        if self._is_closed or self._links.is_held_here():
            return  # closed, or this is a reply's callback, called by the thread that reads
        link = self._links.try_take(sys._getframe())
        if link is None:
            return  # another thread reads
        try:
            if not link.is_open:
                self._reconnect_now_and_then(link)
            elif self._is_alive(link, time.monotonic()):
                link.turn()
                self._acknowledge(link)
            else:
                link.discard()
        except (LinkLost, PublishError):
            link.discard()
        finally:
            self._release(link)

    def start_thread(self) -> None:
        """Drive from a daemon thread from now on, so that callbacks come without a waiting thread."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._drive_for_ever, name=self._name, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Delete the queue and close the connection."""
        self._is_closed = True
        if self.pid != os.getpid():
            self._links.forget()
            return
        is_held_here = self._links.is_held_here()
        link = None if is_held_here else self._links.take(sys._getframe(), time.monotonic() + 2 * SLICE)
        if link is None:
            self._is_left = True
            return
        try:
            self._delete(link)
        finally:
            self._release(link)

    def _delete(self, link: _ReplyLink) -> None:
        if link.is_usable():
            try:
                link.call(
                    spec.Queue.Delete(queue=self.queue.name), spec.Queue.DeleteOk, time.monotonic() + 1.0, "deleting"
                )
            except (LinkLost, PublishError):
                pass  # x-expires deletes it later
        link.close()

    # -- which thread leads

    def _release(self, link: _ReplyLink) -> None:
        """The leader gives up the link, after success or with an exception."""
        if link.is_open and link.is_whole and link.is_consuming and not self._is_left:
            self._links.give_back(link)
        else:
            self._links.drop(link)
        self._wake_waiters()

    def _wake_waiters(self) -> None:
        """Wake all followers: a reply may have come for them."""
        for lock in list(self._waiting):
            if self._waiting.pop(lock, False):
                lock.release()

    def _await_news(self, seconds: float, done: Callable[[], bool]) -> None:
        lock = threading.Lock()
        lock.acquire()
        self._waiting[lock] = True
        try:
            # Replies that came before we were listed wake us no more. A leader that was killed by an exception wakes nobody.
            if not done() and not self._is_closed:
                lock.acquire(timeout=min(seconds, SLICE))
        finally:
            self._waiting.pop(lock, None)

    # -- the leader

    def _drive(self, link: _ReplyLink, done: Callable[[], bool], deadline: float, *, is_endless: bool) -> None:
        try:
            self._connect(link, deadline)
            link.run(lambda: self._turned(link, done), deadline)
            link.flush()
        except LinkLost as lost:
            link.discard()
            if isinstance(lost.cause, ChannelClosedByBroker) and lost.cause.reply_code == ACCESS_REFUSED:
                raise self._unreachable(lost) from lost
            # The caller's loop takes the lead again, and connects.
            time.sleep(min(0.05, max(0.0, deadline - time.monotonic())))
        except AccessRefused:
            raise
        except BrokerUnreachable:
            link.discard()
            if not is_endless:
                raise

    def _turned(self, link: _ReplyLink, done: Callable[[], bool]) -> bool:
        """After each turn: acknowledge replies, wake the followers; whether the leader may stop."""
        if self._acknowledge(link):
            self._wake_waiters()
        return self._is_closed or done()

    def _acknowledge(self, link: _ReplyLink) -> bool:
        tag, link.last_tag = link.last_tag, 0
        if tag:
            link.put(spec.Basic.Ack(tag, multiple=True))
            link.flush()
        return bool(tag)

    def _connect(self, link: _ReplyLink, deadline: float) -> None:
        """Connect and consume, if that is not done already. Raises: LinkLost, PublishError."""
        if self._is_closed:
            raise BrokerUnreachable(CLOSED)
        if link.is_open and link.is_consuming and self._is_alive(link, deadline):
            self._link = link
            return
        link.discard()
        link.last_tag, link.asked_at, link.is_consuming = 0, None, False  # unacknowledged replies come again
        HostTurns(self._addresses, deadline, self._connect_timeout).connect(link.open)
        now = time.monotonic()
        # A `poll` has one second only, so its timeout says nothing about the queue.
        is_patient = deadline - now > SHORTEST_SHARE
        has_others = is_patient and len(self._addresses) > 1
        try:
            self._consume(link, min((now + deadline) / 2, now + LATE_SECONDS) if has_others else deadline)
        except ConnectionBlocked as error:
            link.discard()
            raise BrokerUnreachable(str(error)) from error
        except PublishTimeout as error:
            link.discard()
            if is_patient:
                self._declared_late(link.address, error)
            if has_others:
                self._addresses = beginning_after(self._addresses, link.address)
                raise LinkLost(error) from error
            raise BrokerUnreachable(str(error)) from error
        except PublishError:
            link.discard()
            raise
        link.is_consuming = True
        self._link = link
        self._late_declarations = 0
        self._first_address = self._first_address or link.address

    def _declared_late(self, address: BrokerAddress, error: PublishError) -> None:
        """The queue was not declared in time: perhaps go on with another one. (RabbitMQ 4.0 does not answer for a minute when a
        queue's node is down.)"""
        self._late_declarations += 1
        if (
            self._on_queue_lost is not None
            and self._first_address is not None
            and (address != self._first_address or self._late_declarations > 1)
        ):
            self.queue = self._on_queue_lost(error)
            self._first_address, self._late_declarations = None, 0

    def _reconnect_now_and_then(self, link: _ReplyLink) -> None:
        """For `poll`: for at most a second, and at most once a second."""
        if time.monotonic() >= self._retry_at:
            self._retry_at = time.monotonic() + 1.0 + RETRY_PAUSE
            self._connect(link, time.monotonic() + 1.0)
            link.turn()
            self._acknowledge(link)

    def _is_alive(self, link: _ReplyLink, deadline: float) -> bool:
        """Whether the broker answers a check within CHECK_TIMEOUT; a call with less time leaves that to the next call."""
        if link.asked_at is None:
            if time.monotonic() - link.used_at < CHECK_AFTER:
                return True
            link.asked_at = time.monotonic()
            link.ask()
        give_up_at = link.asked_at + CHECK_TIMEOUT
        try:
            link.turn()  # reads what has come since the check was sent
            link.run(lambda: not link.is_asked, min(give_up_at, deadline))
        except LinkLost:
            return False
        if not link.is_asked:
            link.asked_at = None
        return link.asked_at is None or time.monotonic() < give_up_at

    def _consume(self, link: _ReplyLink, deadline: float) -> None:
        self._declare(link, deadline)
        link.call(
            spec.Basic.Consume(queue=self.queue.name),
            spec.Basic.ConsumeOk,
            deadline,
            f"subscribing to {self.queue.name!r}",
        )

    def _declare(self, link: Link, deadline: float) -> None:
        try:
            link.declare(consumption(self.queue), deadline, logger.warning)
        except PublishError as error:
            cause = error.__cause__
            is_away = isinstance(cause, ChannelClosedByBroker) and cause.reply_code == NOT_FOUND
            if not is_away or self._on_queue_lost is None:
                raise
            self.queue, self._first_address = self._on_queue_lost(error), None
            link.declare(consumption(self.queue), deadline, logger.warning)

    def _declare_beside(self, deadline: float) -> None:
        link = Link(heartbeat=0, name=self._name)
        try:
            HostTurns(self._addresses, deadline, self._connect_timeout).connect(link.open)
            self._declare(link, deadline)
        except LinkLost as lost:
            raise self._unreachable(lost) from lost
        finally:
            link.close()

    def _unreachable(self, lost: LinkLost) -> BrokerUnreachable:
        if isinstance(lost.cause, ChannelClosedByBroker) and lost.cause.reply_code == ACCESS_REFUSED:
            return AccessRefused(f"may not consume queue {self.queue.name!r}: {lacks('read', lost.cause.reply_text)}")
        return BrokerUnreachable(f"the connection for replies to {self.queue.name!r} was lost: {lost}")

    def _drive_for_ever(self) -> None:
        while not self._is_closed:
            try:
                self.drive(lambda: self._is_closed, time.monotonic() + LONG)
            except PublishError as error:
                if not self._is_closed:
                    logger.warning("replies cannot be read: %s", error)
                    time.sleep(RETRY_PAUSE)

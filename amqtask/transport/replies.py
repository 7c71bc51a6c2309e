"""ReplyConsumer: one queue of replies, consumed by whichever thread waits for one.

Leader and followers: the first thread that waits turns the connection's loop for all; the others sleep on a condition
that is notified when something has come, and one of them takes over when the leader has what it wanted. No background thread
runs unless somebody asked for callbacks (`start_thread`), and no reply costs a round trip of its own: a burst is read in one
turn, and acknowledged with one frame.

A reply is acknowledged after it was handed over. What the broker had sent into a connection that then broke comes again
on the next one, so a reply may come twice, and none is lost.

Nobody turns the loop between waits, so the connection has no AMQP heartbeat but TCP keepalive; after a pause it is checked with a
cheap round trip before it is trusted.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from pika.exceptions import AMQPError, ChannelClosedByBroker

from amqtask.entities import Queue
from amqtask.exceptions import AccessRefused, BrokerUnreachable, ConnectionBlocked, PublishError, PublishTimeout
from amqtask.message import Delivery
from amqtask.printable import bounded_logger
from amqtask.topology.plan import consumption
from amqtask.transport.errors import ACCESS_REFUSED
from amqtask.transport.link import Link, LinkLost, connect
from amqtask.transport.url import BrokerAddress

logger = bounded_logger("amqtask.transport")
# Seconds of silence after which the connection is checked, and how long the answer may take.
CHECK_AFTER, CHECK_TIMEOUT = 30.0, 2.0
# Seconds between attempts to get a lost connection back.
RETRY_PAUSE = 0.5
# A wait without an end is cut into pieces of so many seconds.
LONG = 3600.0
CLOSED = "the application is closed, and so is its queue of replies"


class ReplyConsumer:
    """Declares and consumes `queue` and hands each reply to `on_reply`, in the driving thread.

    `pid` is the process it belongs to: after a fork its owner makes a new one.
    """

    def __init__(
        self,
        addresses: Sequence[BrokerAddress],
        queue: Queue,
        on_reply: Callable[[Delivery], None],
        *,
        connect_timeout: float = 4.0,
        name: str = "amqtask replies",
    ) -> None:
        self.pid = os.getpid()
        self.queue = queue
        self._addresses = tuple(addresses)
        self._on_reply = on_reply
        self._connect_timeout = connect_timeout
        self._name = name
        # Consumed from the moment it is set; only the leader sets or uses it.
        self._link: Link | None = None
        self._state = threading.Condition()
        self._leader: int | None = None
        self._turns = 0
        self._last_tag = 0
        self._thread: threading.Thread | None = None
        self._retry_at = 0.0
        # Since when the connection owes us the answer that shows that it is alive.
        self._asked_at: float | None = None
        self._is_closed = False

    @property
    def is_consuming(self) -> bool:
        """Whether the queue is consumed, as far as we have heard."""
        link = self._link
        return link is not None and link.is_open

    def ensure(self, timeout: float) -> None:
        """Make sure that the queue exists and is consumed. Raises: BrokerUnreachable, AccessRefused."""
        deadline = time.monotonic() + timeout
        while not self.is_consuming:
            left = deadline - time.monotonic()
            if self._lead(wait=max(0.0, left), unless=lambda: self.is_consuming):
                try:
                    self._connected(deadline)
                except LinkLost as lost:
                    self._drop()
                    if left <= RETRY_PAUSE:
                        raise self._unreachable(lost) from lost
                    time.sleep(0.05)
                finally:
                    self._follow()
            elif left <= 0:
                raise BrokerUnreachable(f"the deadline passed while connecting for replies to {self.queue.name!r}")

    def drive(self, done: Callable[[], bool], deadline: float | None) -> bool:
        """Wait until `done()` or the deadline (monotonic seconds, None: for ever); whether it is done.

        Raises: BrokerUnreachable when the connection is lost and does not come back before the deadline, AccessRefused.
        """
        while True:
            turns = self._turns
            if done():
                return True
            left = LONG if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return False
            if self._is_closed:
                raise BrokerUnreachable(CLOSED)
            if self._lead(wait=left, unless=lambda turns=turns: self._turns != turns):  # type: ignore[misc]
                try:
                    self._drive(done, time.monotonic() + left, is_endless=deadline is None)
                finally:
                    self._follow()

    def poll(self) -> None:
        """Read what is there without waiting for it; a lost connection is made anew."""
        if self._is_closed or self._leader == threading.get_ident() or not self._lead(wait=0.0):
            return  # closed, or somebody reads already: maybe we, and this is a reply's callback
        try:
            if self._link is None or not self._link.is_open:
                self._reconnect_now_and_then()
            else:
                self._connected(time.monotonic() + self._connect_timeout).turn()
        except (LinkLost, PublishError):
            self._drop()
        finally:
            self._settle()
            self._follow()

    def start_thread(self) -> None:
        """Drive from a daemon thread from now on, so that callbacks come without anybody waiting."""
        with self._state:
            if self._thread is None:
                self._thread = threading.Thread(target=self._drive_for_ever, name=self._name, daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Delete the queue and close the connection."""
        self._is_closed = True
        link = self._link
        if self.pid != os.getpid():
            if link is not None:
                link.discard()
            return
        if link is not None:
            link.wake()
        if self._leader == threading.get_ident() or not self._lead(wait=1.0):
            return  # whoever leads drops the link when it sees that we are closed
        try:
            self._delete()
        finally:
            self._follow()

    def _delete(self) -> None:
        link, self._link = self._link, None
        if link is None:
            return
        try:
            if link.is_usable():
                answers: list[Any] = []
                link.channel.queue_delete(self.queue.name, callback=answers.append)
                link.run(lambda: bool(answers), time.monotonic() + 1.0)
        except (LinkLost, AMQPError):
            pass  # x-expires deletes it later
        finally:
            link.close()

    # -- who leads

    def _lead(self, *, wait: float, unless: Callable[[], bool] | None = None) -> bool:
        """Become the leader; else wait up to so many seconds until something has happened (`unless`), and False."""
        me = threading.get_ident()
        if self._leader == me:
            raise RuntimeError("waiting for a result inside a result's callback would wait for ever")
        deadline = time.monotonic() + wait
        with self._state:
            while self._leader is not None:
                left = deadline - time.monotonic()
                if left <= 0 or (unless is not None and unless()):
                    return False
                self._state.wait(left)
            self._leader = me
            return True

    def _follow(self) -> None:
        with self._state:
            self._leader = None
            self._turns += 1
            self._state.notify_all()

    # -- the leader

    def _drive(self, done: Callable[[], bool], deadline: float, *, is_endless: bool) -> None:
        try:
            self._connected(deadline).run(lambda: self._turned(done), deadline)
        except LinkLost as lost:
            self._drop()
            if isinstance(lost.cause, ChannelClosedByBroker) and lost.cause.reply_code == ACCESS_REFUSED:
                raise self._unreachable(lost) from lost
            # The caller's loop leads again, and connects.
            time.sleep(min(0.05, max(0.0, deadline - time.monotonic())))
        except AccessRefused:
            raise
        except BrokerUnreachable:
            self._drop()
            if not is_endless:
                raise
        finally:
            self._settle()

    def _turned(self, done: Callable[[], bool]) -> bool:
        """After each turn: answer what came, tell the others; whether the leader may go."""
        if self._last_tag:
            self._acknowledge()
            with self._state:
                self._turns += 1
                self._state.notify_all()
        return self._is_closed or done()

    def _acknowledge(self) -> None:
        tag, self._last_tag = self._last_tag, 0
        if tag and self._link is not None and self._link.is_open:
            self._link.channel.basic_ack(tag, multiple=True)

    def _settle(self) -> None:
        """Before the lead is given up: acknowledge, and if that could not be written at once, take the turn that writes it."""
        self._acknowledge()
        if self._link is not None and self._link.is_open and self._link.is_writing:
            try:
                self._link.turn()
            except LinkLost:
                self._drop()

    def _connected(self, deadline: float) -> Link:
        if self._is_closed:
            raise BrokerUnreachable(CLOSED)
        link = self._link
        if link is not None and (not link.is_open or not self._is_alive(link, deadline)):
            self._drop()
        if self._link is None:
            self._last_tag = 0
            link = connect(
                self._addresses,
                deadline,
                heartbeat=0,
                connect_timeout=self._connect_timeout,
                name=self._name,
                kind=Link,
            )
            try:
                self._consume(link, deadline)
            except (PublishTimeout, ConnectionBlocked) as error:
                link.discard()
                raise BrokerUnreachable(str(error)) from error
            except BaseException:
                link.discard()
                raise
            self._link = link
        return self._link

    def _reconnect_now_and_then(self) -> None:
        """For somebody who only looks: not longer than a second, not more often than that."""
        if time.monotonic() >= self._retry_at:
            self._retry_at = time.monotonic() + 1.0 + RETRY_PAUSE
            self._connected(time.monotonic() + 1.0).turn()

    def _is_alive(self, link: Link, deadline: float) -> bool:
        """False when it does not answer for CHECK_TIMEOUT; who has less time leaves it to the next one to see that."""
        try:
            if self._asked_at is None:
                if time.monotonic() - link.used_at < CHECK_AFTER:
                    return True
                self._asked_at = time.monotonic()
                link.channel.basic_qos(prefetch_count=0, callback=self._on_answer)
            give_up_at = self._asked_at + CHECK_TIMEOUT
            link.turn()  # what has come since it was asked
            link.run(lambda: self._asked_at is None, min(give_up_at, deadline))
        except (LinkLost, AMQPError):
            return False
        return self._asked_at is None or time.monotonic() < give_up_at

    def _on_answer(self, _: Any) -> None:
        self._asked_at = None

    def _consume(self, link: Link, deadline: float) -> None:
        link.declare(consumption(self.queue), deadline, logger.warning)
        link.channel.add_on_cancel_callback(
            lambda _: link.fail(ConnectionError(f"the broker cancelled the consumer of {self.queue.name!r}"))
        )
        answers: list[Any] = []
        link.channel.basic_consume(self.queue.name, self._on_message, callback=answers.append)
        if not link.run(lambda: bool(answers), deadline):
            raise PublishTimeout(f"the deadline passed while subscribing to {self.queue.name!r}")

    def _on_message(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        self._last_tag = method.delivery_tag
        delivery = Delivery(
            body,
            properties,
            method.exchange,
            method.routing_key,
            method.redelivered,
            self.queue.name,
            method.delivery_tag,
            0,
        )
        try:
            self._on_reply(delivery)
        except Exception:
            # pika would take it for a broken connection.
            logger.exception("a reply on %s could not be handled", self.queue.name)

    def _unreachable(self, lost: LinkLost) -> BrokerUnreachable:
        if isinstance(lost.cause, ChannelClosedByBroker) and lost.cause.reply_code == ACCESS_REFUSED:
            return AccessRefused(
                f"the broker's user may not consume {self.queue.name!r}: {lost.cause.reply_text} "
                "(rabbitmqctl set_permissions)"
            )
        return BrokerUnreachable(f"the connection for replies to {self.queue.name!r} was lost: {lost}")

    def _drop(self) -> None:
        link, self._link = self._link, None
        self._last_tag = 0  # what was not acknowledged comes again
        self._asked_at = None
        if link is not None:
            link.discard()

    def _drive_for_ever(self) -> None:
        while not self._is_closed:
            try:
                self.drive(lambda: self._is_closed, time.monotonic() + LONG)
            except PublishError as error:
                if not self._is_closed:
                    logger.warning("replies cannot be read: %s", error)
                    time.sleep(RETRY_PAUSE)

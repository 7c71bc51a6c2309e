"""ReplyConsumer: one queue of replies, consumed by whichever thread waits for one.

Leader and followers: the first thread that waits turns the connection's loop for all; the others sleep on a condition
that each arrival notifies, and one of them takes over when the leader has what it wanted. No background thread runs unless
somebody asked for callbacks (`start_thread`), and no reply costs a round trip of its own: a burst is read in one turn.

Nobody turns the loop between waits, so the connection has no AMQP heartbeat but TCP keepalive; after a pause it is checked with a
cheap round trip before it is trusted.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from amqtask.entities import Queue
from amqtask.exceptions import BrokerUnreachable, PublishTimeout
from amqtask.message import Delivery
from amqtask.transport.link import Link, LinkLost, connect
from amqtask.transport.url import BrokerAddress

# Seconds of silence after which the connection is checked, and how long the answer may take.
CHECK_AFTER, CHECK_TIMEOUT = 30.0, 2.0


class ReplyConsumer:
    """Declares and consumes `queue` (without acks) and hands each reply to `on_reply`, in the driving thread.

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
        self._link: Link | None = None
        self._driving = threading.Lock()
        self._arrived = threading.Condition()
        self._is_done: Callable[[], bool] = lambda: False
        self._thread: threading.Thread | None = None
        self._closed = False

    def ensure(self, timeout: float) -> None:
        """Make sure that the queue exists and is consumed. Raises: BrokerUnreachable, AccessRefused."""
        if self._link is not None and self._link.is_open:
            return
        with self._driving:
            self._connected(time.monotonic() + timeout)

    def drive(self, done: Callable[[], bool], deadline: float | None) -> bool:
        """Wait until `done()` or the deadline (monotonic seconds, None: for ever); whether it is done.

        Raises: BrokerUnreachable when the connection is lost and does not come back before the deadline.
        """
        while not done():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            if self._driving.acquire(blocking=False):
                try:
                    self._lead(done, deadline)
                finally:
                    self._driving.release()
                    self._notify()
            else:
                with self._arrived:
                    # The leader may have gone between our look at the lock and this wait: look again soon.
                    self._arrived.wait(0.05 if left is None else min(left, 0.05))
        return True

    def poll(self) -> None:
        """Read what is there without waiting."""
        if self._link is not None and self._driving.acquire(blocking=False):
            try:
                if self._link.is_open:
                    self._link.turn()
            except LinkLost:
                pass  # the next one who waits connects anew
            finally:
                self._driving.release()
                self._notify()

    def start_thread(self) -> None:
        """Drive from a daemon thread from now on, so that callbacks come without anybody waiting."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._drive_for_ever, name=self._name, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Delete the queue and close the connection."""
        self._closed = True
        link, self._link = self._link, None
        if link is None:
            return
        if self.pid != os.getpid():
            link.discard()
            return
        if self._driving.acquire(timeout=1.0):
            try:
                if link.is_usable():
                    deleted = _Flag()
                    link.channel.queue_delete(self.queue.name, callback=lambda _: deleted.set(link))
                    link.run(deleted.is_set, time.monotonic() + 1.0)
            except LinkLost:
                pass  # x-expires deletes it later
            finally:
                link.close()
                self._driving.release()

    # -- the leader

    def _lead(self, done: Callable[[], bool], deadline: float | None) -> None:
        limit = deadline if deadline is not None else time.monotonic() + 3600.0
        try:
            link = self._connected(limit)
            self._is_done = done
            link.run(done, limit)
        except LinkLost:
            self._drop()  # the caller's loop leads again, and connects
            time.sleep(0)
        finally:
            self._is_done = lambda: False

    def _connected(self, deadline: float) -> Link:
        link = self._link
        if link is not None and (not link.is_open or not self._is_alive(link)):
            self._drop()
        if self._link is None:
            if self._closed:
                raise BrokerUnreachable("the application is closed")
            self._link = connect(
                self._addresses,
                deadline,
                heartbeat=0,
                connect_timeout=self._connect_timeout,
                name=self._name,
                kind=Link,
            )
            self._consume(self._link, deadline)
        return self._link

    def _is_alive(self, link: Link) -> bool:
        if time.monotonic() - link.used_at < CHECK_AFTER:
            return True
        answered = _Flag()
        try:
            link.channel.basic_qos(prefetch_count=0, callback=lambda _: answered.set(link))
            return link.run(answered.is_set, time.monotonic() + CHECK_TIMEOUT)
        except LinkLost:
            return False

    def _consume(self, link: Link, deadline: float) -> None:
        link.declare((self.queue,), deadline, lambda text: None)
        started = _Flag()
        link.channel.basic_consume(
            self.queue.name, self._on_message, auto_ack=True, callback=lambda _: started.set(link)
        )
        if not link.run(started.is_set, deadline):
            raise PublishTimeout(f"the deadline passed while subscribing to {self.queue.name!r}")

    def _on_message(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        self._on_reply(
            Delivery(
                body,
                properties,
                method.exchange,
                method.routing_key,
                method.redelivered,
                self.queue.name,
                method.delivery_tag,
                0,
            )
        )
        if self._link is not None and self._is_done():
            self._link.wake()
        self._notify()

    def _notify(self) -> None:
        with self._arrived:
            self._arrived.notify_all()

    def _drop(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.discard()

    def _drive_for_ever(self) -> None:
        while not self._closed:
            try:
                self.drive(lambda: self._closed, time.monotonic() + 0.5)
            except BrokerUnreachable:
                time.sleep(0.2)  # connect() has waited up to its deadline already


class _Flag:
    """Something that has happened."""

    def __init__(self) -> None:
        self._is_set = False

    def set(self, link: Link) -> None:
        """It has; the link's waiter looks again."""
        self._is_set = True
        link.wake()

    def is_set(self) -> bool:
        """Whether it has."""
        return self._is_set

"""Mingle: a worker that starts asks its neighbours for revoked tasks (celery/worker/consumer/mingle.py).

Model. `hello` goes to all mailboxes through the fanout exchange, also to the worker's own: once that copy is back, every
neighbour has its copy, and answers within milliseconds unless it is busy. The number of neighbours is unknown; so the worker
starts no task until no answer came for QUIET_SECONDS after its own copy or the last answer, but at most for HOLD_SECONDS after
its start (a broker that is away must not hold it longer). Later answers are taken for LISTEN_SECONDS, and count for tasks that
have not begun. After a lost connection it asks again, without holding tasks: revokes of the meantime did not reach it. It then
asks only for those: after a restart of the broker all workers ask each other at once, and their lists may be long.
"""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING

from amqtask.exceptions import AmqTaskError, PublishError
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.control import Command, command_message, read_reply, reply_exchange, reply_queue
from amqtask.services.revoking import learn_revoked, revoked_state

if TYPE_CHECKING:
    from amqtask.pool import Loop, Timer
    from amqtask.protocol.message import Delivery
    from amqtask.services.command_context import Control
    from amqtask.transport.contract import Consumer

logger = bounded_logger("amqtask.worker")

QUIET_SECONDS = 0.03
HOLD_SECONDS = 0.3
LISTEN_SECONDS = 5.0
PREFETCH = 100
# Clocks of two hosts differ, and a lost connection is noticed late (broker_heartbeat).
MARGIN_SECONDS = 600.0


class Mingle:
    """Asks over the panel's consumer and the worker's own publisher; the panel calls it with replies and events."""

    def __init__(
        self,
        control: Control,
        *,
        loop: Loop,
        accept: frozenset[str],
        prefix: str,
        queue_ttl: float,
        queue_expires: float,
    ) -> None:
        self._control = control
        self._loop = loop
        self._accept = accept
        self._prefix = prefix
        self._oid = str(uuid.uuid4())
        self.queue = reply_queue(self._oid, prefix, ttl=queue_ttl, expires=queue_expires)
        self._ticket = ""
        self._neighbours = 0
        # Unix time at which the connection was lost; 0 after we have asked again.
        self._lost_at = 0.0
        self._is_holding = False
        self._has_held = False
        # Timers that release the tasks: the latest one, and the one that each answer puts off.
        self._last_release: Timer | None = None
        self._next_release: Timer | None = None
        self._deaf_timer: Timer | None = None

    def start(self, consumer: Consumer) -> None:
        """Consume answers with this consumer; the first time also hold the worker's tasks back."""
        self.listen(consumer)
        if not self._has_held:
            self._has_held = self._is_holding = True
            self._control.worker.dispatcher.hold()
            self._last_release = self._loop.call_later(HOLD_SECONDS, self._release)

    def listen(self, consumer: Consumer) -> None:
        """Consume the queue for answers again, on a new connection."""
        if self._ticket and not self._lost_at:
            self._lost_at = time.time()
        self._cancel_deaf_timer()
        consumer.add_queue(self.queue, prefetch=PREFETCH)

    def ask(self, consumer: Consumer) -> None:
        """Send `hello`: the mailbox and the queue for answers are consumed now."""
        self._ticket, self._neighbours = str(uuid.uuid4()), 0
        after = self._lost_at - MARGIN_SECONDS if self._lost_at else 0.0
        self._lost_at = 0.0
        arguments = {
            "from_node": self._control.worker.setup.hostname,
            **revoked_state(self._control, after=after),
            "revoked_after": after,
        }
        hello = Command(
            "hello",
            arguments,
            ticket=self._ticket,
            reply_exchange=reply_exchange(self._prefix).name,
            reply_key=self._oid,
        )
        message = command_message(hello, self._prefix, clock=self._control.lamport.forward())
        message.declare = ()  # the exchange exists, because the mailbox is bound to it
        logger.debug("mingle: searching for neighbors")
        self._control.worker.publisher.publish(message, _note)
        self._cancel_deaf_timer()
        self._deaf_timer = self._loop.call_later(LISTEN_SECONDS, lambda: self._be_deaf(consumer))

    def heard(self, hello: Command) -> None:
        """A `hello` came: if it is our own, all neighbours have it."""
        if hello.ticket == self._ticket:
            self._release_soon()

    def on_reply(self, delivery: Delivery) -> None:
        """A neighbour's answer."""
        properties = delivery.properties
        try:
            reply = read_reply(
                delivery.body, properties.content_type, properties.content_encoding, properties.headers, self._accept
            )
            if reply.ticket != self._ticket or not isinstance(reply.payload, dict) or "error" in reply.payload:
                return
            self._control.lamport.adjust(reply.payload.get("clock"))
            learn_revoked(self._control, reply.payload)
        except (AmqTaskError, TypeError, ValueError, OverflowError) as error:
            logger.warning("mingle: an answer that cannot be read: %s", error)
            return
        self._neighbours += 1
        logger.info("mingle: sync with %s", reply.nodename)
        self._release_soon()

    # -- holding

    def _release_soon(self) -> None:
        if self._next_release is not None:
            self._next_release.cancel()
        if self._is_holding:
            self._next_release = self._loop.call_later(QUIET_SECONDS, self._release)

    def _release(self) -> None:
        if self._is_holding:
            self._is_holding = False
            self._control.worker.dispatcher.release()
            self._control.worker.wake()

    def _cancel_deaf_timer(self) -> None:
        if self._deaf_timer is not None:
            self._deaf_timer.cancel()
            self._deaf_timer = None

    def _be_deaf(self, consumer: Consumer) -> None:
        self._deaf_timer = None
        if not self._neighbours:
            logger.debug("mingle: all alone")
        consumer.cancel_queue(self.queue.name)

    def stop(self) -> None:
        """Cancel the timers, and release the held tasks."""
        for timer in (self._last_release, self._next_release, self._deaf_timer):
            if timer is not None:
                timer.cancel()
        self._release()


def _note(error: PublishError | None) -> None:
    if error is not None:
        logger.debug("mingle: nobody was asked: %s", error)

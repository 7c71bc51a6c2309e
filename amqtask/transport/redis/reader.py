"""RedisQueueReader: one queue of replies or events, read by the thread that waits."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import redis

from amqtask.exceptions import AccessRefused, PublishError
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.entities import Binding
from amqtask.protocol.message import Delivery
from amqtask.topology.declarations import consumption
from amqtask.transport.redis.batch import Declared
from amqtask.transport.redis.envelope import incoming
from amqtask.transport.redis.errors import publish_error
from amqtask.transport.redis.keys import list_keys
from amqtask.transport.redis.publisher import FAILURES, borrowed, converse
from amqtask.transport.redis.scripts import DELETE

if TYPE_CHECKING:
    from amqtask.protocol.entities import Queue
    from amqtask.transport.redis.layout import Layout
    from amqtask.transport.redis.servers import Deployment

logger = bounded_logger("amqtask.publisher")
# Seconds of one wait, after which the condition is looked at again; and before another attempt to connect.
SLICE, RETRY_PAUSE = 1.0, 0.2


class RedisQueueReader:
    """See amqtask.transport.contract.QueueReader; for one thread at a time."""

    def __init__(
        self, deployment: Deployment, layout: Layout, queue: Queue, on_delivery: Callable[[Delivery], None]
    ) -> None:
        self._server = deployment.name
        self._client = deployment.client()
        self._layout = layout
        self._queue = queue
        self._plan = consumption(queue)
        self._on_delivery = on_delivery
        self._pattern = layout.pattern(queue)
        self._keys = list_keys(layout.prefix, queue.name)
        self._channels: Any = None
        self._is_ready = False
        self._next = 1

    def ensure(self, timeout: float) -> None:
        """Declare and subscribe. Raises: BrokerUnreachable, AccessRefused, PublishError."""
        deadline = time.monotonic() + timeout
        while not self._is_ready:
            try:
                self._set_up(deadline)
            except FAILURES as error:
                wrong = publish_error(error, self._server)
                if isinstance(wrong, AccessRefused) or time.monotonic() + RETRY_PAUSE >= deadline:
                    raise wrong from error
                time.sleep(RETRY_PAUSE)

    def drive(self, done: Callable[[], bool], deadline: float | None) -> bool:
        """Wait until `done()` or the deadline."""
        while not done():
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                return False
            seconds = SLICE if deadline is None else min(SLICE, deadline - now)
            try:
                self.ensure(seconds)
                text = self._next_message(seconds)
            except FAILURES:
                self._is_ready = False
                continue
            except PublishError:
                if deadline is not None and time.monotonic() >= deadline:
                    raise
                continue
            if text is not None:
                self._hand_over(text)
        return True

    def close(self) -> None:
        """Delete the queue, and disconnect."""
        try:
            if self._channels is not None:
                self._channels.close()
            elif self._is_ready:
                sources = [entity.source.name for entity in self._plan if isinstance(entity, Binding)]
                self._client.eval(DELETE.source, 1, self._layout.prefix, self._queue.name, *sources)
        except FAILURES:
            pass  # an empty list is no key, and the binding harms nobody
        self._is_ready = False
        self._client.close()

    def _set_up(self, deadline: float) -> None:
        if self._pattern is not None:
            self._channels = self._client.pubsub()
            self._channels.psubscribe(self._pattern)
            # The subscription is confirmed: what is published from now on comes here.
            self._channels.get_message(timeout=max(0.0, deadline - time.monotonic()))
        else:
            missing = Declared(self._layout, logger.warning).missing(self._plan)
            with borrowed(self._client) as connection:
                for reply in converse(connection, [command for command, _ in missing], deadline):
                    if isinstance(reply, Exception):
                        raise reply
        self._is_ready = True

    def _next_message(self, seconds: float) -> bytes | None:
        if self._channels is not None:
            message = self._channels.get_message(ignore_subscribe_messages=True, timeout=seconds)
            return message["data"] if message is not None and message["type"] == "pmessage" else None
        with borrowed(self._client) as connection:
            # BRPOP's own time limit is not exact; what comes after ours would be lost, so that we wait a little longer.
            (reply,) = converse(
                connection, [("BRPOP", *self._keys, max(0.01, round(seconds, 2)))], time.monotonic() + seconds + 2.0
            )
        if isinstance(reply, Exception):
            raise redis.ConnectionError(str(reply))
        return None if reply is None else reply[1]

    def _hand_over(self, text: bytes) -> None:
        number, self._next = self._next, self._next + 1
        delivery = incoming(text).delivery(self._queue.name, number)
        try:
            self._on_delivery(delivery)
        except Exception:
            logger.exception("a message on %s could not be handled", self._queue.name)

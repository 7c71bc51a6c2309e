"""Messages that may be lost, from the caller's thread: no confirm is waited for, and no error is raised."""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from amqtask.exceptions import PublishError
from amqtask.ground.lazy import ByProcess
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.message import Message
from amqtask.transport.link import Link, LinkLost, Links, say_goodbye
from amqtask.transport.url import BrokerAddress, HostTurns

logger = bounded_logger("amqtask.transport")
# Seconds that connecting or declaring may take, once in a while; the caller waits.
PATIENCE = 0.5
# Seconds without an attempt after a failure.
PAUSE = 30.0


class PikaEventPublisher:
    """Publishes messages that may be lost (task-sent events), over a connection of its own; connects with the first message.

    It waits for no confirm and raises nothing. Messages that cannot be written at once are dropped: because the broker is away,
    blocks publishing, or reads more slowly than we write. After a failure the next attempt is made PAUSE seconds later.

    Safe wherever a program may publish (see `Links`): a signal handler that interrupts another call makes one more connection.
    """

    def __init__(
        self,
        addresses: Sequence[BrokerAddress],
        *,
        connect_timeout: float = 4.0,
        client_name: str = "",
        on_warning: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._addresses = tuple(addresses)
        self._connect_timeout = connect_timeout
        self._warn = on_warning
        make = partial(Link, heartbeat=0, name=client_name)
        self._links = ByProcess(partial(Links, 1, make), Links[Link].forget)
        weakref.finalize(self, say_goodbye, self._links, 0.5)
        self._retry_at = 0.0

    def publish(self, messages: Sequence[Message]) -> None:
        """Publish these messages, or drop them."""
        if time.monotonic() < self._retry_at:
            return
        try:
            self._publish(messages)
        except (LinkLost, PublishError) as error:
            self._retry_at = time.monotonic() + PAUSE
            logger.info("events are dropped for %g s: %s", PAUSE, error)

    def close(self) -> None:
        """Close the connection; it connects again when it is used again."""
        self._links.get().close(1.0)

    def _publish(self, messages: Sequence[Message]) -> None:
        deadline = time.monotonic() + PATIENCE
        links = self._links.get()
        link = links.take(sys._getframe(), deadline, Link.is_usable)
        if link is None:
            return  # other calls have all links, because the broker does not read
        try:
            if not link.is_open:
                HostTurns(self._addresses, deadline, self._connect_timeout).connect(link.open)
            self._publish_over(link, messages, deadline)
        except (LinkLost, PublishError):
            links.drop(link)
            raise
        links.give_back(link)

    def _publish_over(self, link: Link, messages: Sequence[Message], deadline: float) -> None:
        # The buffer for a broker that does not read must not grow.
        if link.blocked_reason is None and not link.is_writing:
            for message in messages:
                link.declare(message.declare, deadline, self._warn)
                try:
                    link.put_message(replace(message, mandatory=False))
                except PublishError as error:
                    logger.info("%s", error)
            link.flush()

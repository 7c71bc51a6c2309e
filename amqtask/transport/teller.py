"""Teller: publishes what nobody has to be sure of (task-sent events), over a connection of its own.

It waits for no confirm and raises nothing. What cannot be written at once is dropped: because the broker is away, blocks
publishing, or reads more slowly than we write. After a failure it is left alone for PAUSE seconds.

Safe across threads (one tells at a time, and telling is short) and forks.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence

from amqtask.exceptions import PublishError
from amqtask.message import Message
from amqtask.printable import bounded_logger
from amqtask.transport.content import UNWRITABLE, basic_properties, unwritable
from amqtask.transport.link import Link, LinkLost, connect
from amqtask.transport.url import BrokerAddress

logger = bounded_logger("amqtask.transport")

# Seconds that connecting or declaring may take, once in a while; the caller waits.
PATIENCE = 0.5
PAUSE = 30.0
_TROUBLE = (LinkLost, PublishError, *UNWRITABLE)


class PikaTeller:
    """Connects with the first message."""

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
        self._client_name = client_name
        self._warn = on_warning
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._goodbye: weakref.finalize[..., PikaTeller] | None = None
        self._retry_at = 0.0

    def tell(self, messages: Sequence[Message]) -> None:
        """Publish these, or drop them."""
        if self._pid != os.getpid():
            self._forget()
        with self._lock:
            if time.monotonic() < self._retry_at:
                return
            try:
                self._tell(self._usable(), messages)
            except _TROUBLE as error:
                self._retry_at = time.monotonic() + PAUSE
                self._drop()
                logger.info("events are dropped for %g s: %s", PAUSE, error)

    def close(self) -> None:
        """Say goodbye; it connects again when it is used again."""
        if self._pid != os.getpid():
            self._forget()
        with self._lock:
            link = self._link
            if link is not None:
                link.close()
            self._drop()

    def _tell(self, link: Link, messages: Sequence[Message]) -> None:
        deadline = time.monotonic() + PATIENCE
        if link.blocked_reason is not None:
            return
        if link.is_writing:
            link.turn()
            if link.is_writing:
                return  # the broker is not reading; what we keep for it must not grow
        for message in messages:
            link.declare(message.declare, deadline, self._warn)
            try:
                link.channel.basic_publish(
                    message.exchange,
                    message.routing_key,
                    message.body,
                    basic_properties(message.properties),
                    mandatory=False,
                )
            except UNWRITABLE as error:
                if not link.channel.is_open:
                    raise
                logger.info("%s", unwritable(message, error))
        link.used_at = time.monotonic()
        if link.is_writing:
            link.turn()

    def _usable(self) -> Link:
        link = self._link
        if link is None or not link.is_usable():
            self._drop()
            link = self._link = connect(
                self._addresses,
                time.monotonic() + PATIENCE,
                heartbeat=0,
                connect_timeout=self._connect_timeout,
                name=self._client_name,
                kind=Link,
            )
            self._goodbye = weakref.finalize(self, _say_goodbye, link)
        return link

    def _drop(self) -> None:
        link, self._link = self._link, None
        if self._goodbye is not None:
            self._goodbye.detach()
            self._goodbye = None
        if link is not None:
            link.discard()

    def _forget(self) -> None:
        """In a forked child: the parent goes on with its link, and may have held the lock."""
        link = self._link
        if self._goodbye is not None:
            self._goodbye.detach()
        self._reset()
        if link is not None:
            link.discard()


def _say_goodbye(link: Link) -> None:
    """At the end of the program: leave the broker properly, so that it does not log a lost client."""
    if link.pid == os.getpid():
        link.close(0.5)

"""One connection that the calling thread drives: no background thread, so it works after a fork and under green threads.

A Link is a pika SelectConnection with an I/O loop of its own. `run` turns that loop until a condition holds or the
deadline passes; between calls nobody turns it, so heartbeats stop and the broker may close the connection. The
owner therefore asks `is_usable()` first, which notices a closed one without a round trip.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pika.adapters.select_connection import IOLoop, SelectConnection
from pika.exceptions import ChannelClosedByBroker

from amqtask.entities import Binding, Declaration, Exchange, Queue
from amqtask.exceptions import (
    AccessRefused,
    BrokerUnreachable,
    ConnectionBlocked,
    OperationalError,
    PublishError,
    PublishTimeout,
)
from amqtask.topology.plan import describe_difference, is_declarable
from amqtask.transport.errors import connection_error
from amqtask.transport.fields import install
from amqtask.transport.url import BrokerAddress

NOT_FOUND, PRECONDITION_FAILED, ACCESS_REFUSED = 404, 406, 403
Warn = Callable[[str], None]


class LinkLost(Exception):
    """The connection or channel ended while it was needed; `cause` is pika's word on it."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Link:
    """A connection with one channel. Not safe for two threads at once: its owner hands it to one at a time."""

    def __init__(self, address: BrokerAddress, *, heartbeat: int | None, connect_timeout: float, name: str) -> None:
        install()
        self.address = address
        self.pid = os.getpid()
        self.channel: Any = None
        self.blocked_reason: str | None = None
        self.used_at = time.monotonic()
        self._heartbeat = heartbeat
        self._connect_timeout = connect_timeout
        self._name = name
        self._loop: Any = None
        self._connection: Any = None
        self._error: BaseException | None = None
        self._declared: set[Declaration] = set()

    # -- opening and closing

    def open(self, deadline: float) -> None:
        """Connect and open a channel before the deadline (monotonic seconds).

        Raises: AccessRefused at once, BrokerUnreachable.
        """
        self._loop = IOLoop()
        parameters = self.address.parameters(
            heartbeat=self._heartbeat,
            connect_timeout=max(0.1, min(self._connect_timeout, deadline - time.monotonic())),
            name=self._name,
        )
        self._connection = SelectConnection(
            parameters,
            on_open_callback=self._on_open,
            on_open_error_callback=self._on_failure,
            on_close_callback=self._on_failure,
            custom_ioloop=self._loop,
        )
        self._connection.add_on_connection_blocked_callback(self._on_blocked)
        self._connection.add_on_connection_unblocked_callback(self._on_unblocked)
        try:
            done = self.run(lambda: self.channel is not None and self.channel.is_open, deadline)
        except LinkLost as lost:
            raise connection_error(lost.cause, [self.address]) from lost.cause
        if not done:
            self.discard()
            raise BrokerUnreachable(f"{self.address.safe_url} did not answer in time")

    def _on_open(self, connection: Any) -> None:
        connection.channel(on_open_callback=self._on_channel)

    def _on_channel(self, channel: Any) -> None:
        self.channel = channel
        channel.add_on_close_callback(self._on_channel_closed)
        self._stop()

    def _on_channel_closed(self, channel: Any, reason: BaseException) -> None:
        if channel is self.channel:
            self._error = self._error or reason
            self._stop()

    def _on_failure(self, connection: Any, reason: BaseException) -> None:
        self._error = reason
        self._stop()

    def _on_blocked(self, connection: Any, frame: Any) -> None:
        self.blocked_reason = frame.method.reason or "no reason given"

    def _on_unblocked(self, connection: Any, frame: Any) -> None:
        self.blocked_reason = None

    def reopen_channel(self, deadline: float) -> None:
        """A new channel after the broker closed the old one. Raises: LinkLost, PublishTimeout."""
        self._error = None
        self.channel = None
        self._connection.channel(on_open_callback=self._on_channel)
        self.demand(lambda: self.channel is not None and self.channel.is_open, deadline, "opening a channel")

    def close(self) -> None:
        """Say goodbye, but wait for nobody longer than a second."""
        if self._connection is not None and self._connection.is_open and self.pid == os.getpid():
            self._connection.close()
            try:
                self.run(lambda: self._connection.is_closed, time.monotonic() + 1.0)
            except LinkLost:
                pass  # closed is what was asked for
        self.discard()

    def discard(self) -> None:
        """Drop the socket without a word (a forked child must not speak on its parent's connection)."""
        if self._connection is None:
            return
        transport = getattr(self._connection, "_transport", None)
        sock = getattr(transport, "_sock", None)
        if sock is not None:
            sock.close()
        self._connection = None
        self.channel = None

    # -- driving

    @property
    def is_open(self) -> bool:
        """Whether both connection and channel are open, as far as we have heard."""
        return (
            self._error is None
            and self._connection is not None
            and self._connection.is_open
            and self.channel is not None
            and self.channel.is_open
        )

    def is_usable(self) -> bool:
        """Whether it is still open after reading what the broker may have said in the meantime."""
        if not self.is_open:
            return False
        try:
            self.turn()
        except LinkLost:
            return False
        return self.is_open

    def turn(self) -> None:
        """One loop turn that waits for nothing. Raises: LinkLost."""
        self._loop.call_later(0, self._stop)
        self._start()

    def run(self, condition: Callable[[], bool], deadline: float | None) -> bool:
        """Turn the loop until `condition()` or the deadline; whether it holds. Raises: LinkLost."""
        if self._error is not None:
            raise LinkLost(self._error)
        timer = None
        if deadline is not None:
            timer = self._loop.call_later(max(0.0, deadline - time.monotonic()), self._stop)
        try:
            while not condition():
                if deadline is not None and time.monotonic() >= deadline:
                    return False
                self._start()
        finally:
            if timer is not None:
                self._loop.remove_timeout(timer)
            self.used_at = time.monotonic()
        return True

    def wake(self) -> None:
        """Make `run` look at its condition again; only from a callback of this link's loop."""
        self._stop()

    def demand(self, condition: Callable[[], bool], deadline: float, doing: str) -> None:
        """`run`, or the named error when the deadline passes. Raises: LinkLost, ConnectionBlocked, PublishTimeout."""
        if not self.run(condition, deadline):
            raise self.late(doing)

    def late(self, doing: str) -> PublishError:
        """The error for a deadline that passed while `doing`."""
        if self.blocked_reason is not None:
            return ConnectionBlocked(
                f"the broker at {self.address.host}:{self.address.port} blocks publishing: {self.blocked_reason} "
                "(a memory or disk alarm: rabbitmqctl status). The deadline passed while waiting."
            )
        return PublishTimeout(f"the deadline passed while {doing} at {self.address.safe_url}")

    def _start(self) -> None:
        self._loop.start()
        if self._error is not None:
            raise LinkLost(self._error)

    def _stop(self) -> None:
        self._loop.stop()

    # -- declaring

    def declare(self, entities: Sequence[Declaration], deadline: float, warn: Warn) -> None:
        """Make sure that entities exist, each once per connection. A queue or exchange that exists with other arguments
        is used as it is found, with a warning. Raises: LinkLost, PublishTimeout, AccessRefused, OperationalError."""
        missing = [entity for entity in entities if entity not in self._declared]
        for entity in missing:
            if isinstance(entity, Exchange) and not is_declarable(entity):
                continue
            error = self._declare_one(entity, deadline, passive=False)
            if error is not None and error.reply_code == PRECONDITION_FAILED and not isinstance(entity, Binding):
                warn(describe_difference(entity, error.reply_text))
                error = self._declare_one(entity, deadline, passive=True)
            if error is not None:
                raise _declare_error(entity, error)
            self._declared.add(entity)

    def _declare_one(self, entity: Declaration, deadline: float, *, passive: bool) -> ChannelClosedByBroker | None:
        answered = False

        def done(_: Any) -> None:
            nonlocal answered
            answered = True
            self._stop()

        send_declaration(self.channel, entity, done, passive=passive)
        try:
            self.demand(lambda: answered, deadline, f"declaring {entity_name(entity)}")
        except LinkLost as lost:
            if not isinstance(lost.cause, ChannelClosedByBroker):
                raise
            self.reopen_channel(deadline)
            return lost.cause
        return None


def send_declaration(channel: Any, entity: Declaration, callback: Callable[[Any], None], *, passive: bool) -> None:
    """The declare or bind method of an entity on a pika channel."""
    if isinstance(entity, Queue):
        channel.queue_declare(
            entity.name,
            passive=passive or entity.passive,
            durable=entity.durable,
            exclusive=entity.exclusive,
            auto_delete=entity.auto_delete,
            arguments=entity.argument_map,
            callback=callback,
        )
    elif isinstance(entity, Exchange):
        channel.exchange_declare(
            entity.name,
            exchange_type=entity.type,
            passive=passive or entity.passive,
            durable=entity.durable,
            auto_delete=entity.auto_delete,
            arguments=dict(entity.arguments),
            callback=callback,
        )
    elif entity.to_exchange:
        channel.exchange_bind(
            entity.destination, entity.source.name, entity.routing_key, dict(entity.arguments), callback=callback
        )
    else:
        channel.queue_bind(
            entity.destination, entity.source.name, entity.routing_key, dict(entity.arguments), callback=callback
        )


def entity_name(entity: Declaration) -> str:
    """An entity in words."""
    if isinstance(entity, Queue):
        return f"queue {entity.name!r}"
    if isinstance(entity, Exchange):
        return f"exchange {entity.name!r}"
    return f"the binding of {entity.destination!r} to {entity.source.name!r}"


def _declare_error(entity: Declaration, error: ChannelClosedByBroker) -> OperationalError:
    name = entity_name(entity)
    if error.reply_code == ACCESS_REFUSED:
        return AccessRefused(
            f"the broker's user may not declare {name}: {error.reply_text} (rabbitmqctl set_permissions)"
        )
    return OperationalError(f"declaring {name} failed: {error.reply_code} {error.reply_text}")


L = TypeVar("L", bound=Link)


def connect(
    addresses: Sequence[BrokerAddress],
    deadline: float,
    *,
    heartbeat: int | None,
    connect_timeout: float,
    name: str,
    kind: type[L],
) -> L:
    """The first of the addresses that answers before the deadline, in turn and again.

    Raises: AccessRefused at once, BrokerUnreachable.
    """
    pause = 0.05
    while True:
        for address in addresses:
            link = kind(address, heartbeat=heartbeat, connect_timeout=connect_timeout, name=name)
            try:
                link.open(deadline)
            except BrokerUnreachable as error:
                if isinstance(error, AccessRefused):
                    raise
                last = error
            else:
                return link
        left = deadline - time.monotonic()
        if left <= pause:
            raise BrokerUnreachable(f"{last} (tried until the deadline)") from last
        time.sleep(pause)
        pause = min(pause * 2, 0.5)

"""One connection that the calling thread drives: no background thread, so it works after a fork and under green threads.

A Link is a pika SelectConnection with an I/O loop of its own. `run` turns that loop until a condition holds or the
deadline passes; between calls nobody turns it, so heartbeats stop and the broker may close the connection. The
owner therefore asks `is_usable()` first, which notices a closed one without a round trip.

After a fork the child holds copies of the parent's descriptors: it may close them, and must neither speak on them nor
touch the poller, which the two share (see `discard`).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pika.adapters.select_connection import IOLoop
from pika.exceptions import ChannelClosedByBroker

from amqtask.entities import Binding, Declaration, Exchange, Queue
from amqtask.exceptions import AccessRefused, BrokerUnreachable, PublishError, PublishTimeout
from amqtask.topology.plan import describe_difference, is_declarable
from amqtask.transport.content import UNWRITABLE
from amqtask.transport.errors import ACCESS_REFUSED as ACCESS_REFUSED
from amqtask.transport.errors import PRECONDITION_FAILED as PRECONDITION_FAILED
from amqtask.transport.errors import blocked, connection_error, declare_error
from amqtask.transport.fields import install
from amqtask.transport.names import entity_name as entity_name
from amqtask.transport.url import BrokerAddress
from amqtask.transport.wire import Wire

Warn = Callable[[str], None]
# A link used so recently (seconds) is looked at with one system call; its heartbeat timers can wait.
FRESH = 1.0
# What a connection remembers as declared, at most.
MOST_DECLARED = 10_000


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
        # When the loop's one alarm for deadlines goes off; it is left standing between calls.
        self._alarm_at: float | None = None

    # -- opening and closing

    def open(self, deadline: float) -> None:
        """Connect and open a channel before the deadline (monotonic seconds).

        Raises: AccessRefused at once, BrokerUnreachable; ConfigurationError for a certificate that cannot be read.
        """
        parameters = self.address.parameters(
            heartbeat=self._heartbeat,
            connect_timeout=max(0.1, min(self._connect_timeout, deadline - time.monotonic())),
            name=self._name,
        )
        self._loop = IOLoop()
        self._loop.activate_poller()
        self._connection = Wire(
            parameters,
            on_open_callback=self._on_open,
            on_open_error_callback=self._on_failure,
            on_close_callback=self._on_failure,
            custom_ioloop=self._loop,
        )
        self._connection.add_on_connection_blocked_callback(self._on_blocked)
        self._connection.add_on_connection_unblocked_callback(self._on_unblocked)
        try:
            done = self.run(self._is_ready, deadline)
        except LinkLost as lost:
            self.discard()
            raise connection_error(lost.cause, [self.address]) from lost.cause
        if not done:
            self.discard()
            raise BrokerUnreachable(f"{self.address.safe_url} did not answer in time")

    def _is_ready(self) -> bool:
        return self.channel is not None and bool(self.channel.is_open)

    def _on_open(self, connection: Any) -> None:
        connection.channel(on_open_callback=self._on_channel)

    def _on_channel(self, channel: Any) -> None:
        self.channel = channel
        channel.add_on_close_callback(self._on_channel_closed)

    def _on_channel_closed(self, channel: Any, reason: BaseException) -> None:
        if channel is self.channel:
            self._error = self._error or reason

    def _on_failure(self, connection: Any, reason: BaseException) -> None:
        self._error = reason

    def _on_blocked(self, connection: Any, frame: Any) -> None:
        self.blocked_reason = frame.method.reason or "no reason given"

    def _on_unblocked(self, connection: Any, frame: Any) -> None:
        self.blocked_reason = None

    def reopen_channel(self, deadline: float) -> None:
        """A new channel after the broker closed the old one. Raises: LinkLost, ConnectionBlocked, PublishTimeout."""
        if self._connection is None or not self._connection.is_open:
            raise LinkLost(self._error or ConnectionError("the connection is closed"))
        self._error = None
        self.channel = None
        self._connection.channel(on_open_callback=self._on_channel)
        self.demand(self._is_ready, deadline, "opening a channel")

    def close(self, timeout: float = 1.0) -> None:
        """Say goodbye; wait for the broker's goodbye no longer than `timeout` seconds."""
        if self._connection is not None and self._connection.is_open and self.pid == os.getpid():
            self._error = None
            self._connection.close()
            try:
                self.run(lambda: self._connection.is_closed, time.monotonic() + timeout)
            except LinkLost:
                pass  # closed is what was asked for
        self.discard()

    def discard(self) -> None:
        """Drop the connection without a word."""
        connection, self._connection = self._connection, None
        loop, self._loop = self._loop, None
        self.channel = None
        self._error = self._error or ConnectionError("the link was discarded")
        if connection is None or loop is None:
            return
        if self.pid == os.getpid():
            # pika's own way to abort needs turns of the loop, and fails while it connects. Nothing is left to turn it.
            loop.close()
        # A forked child leaves the poller alone: the parent, who goes on, shares it.
        for sock in _sockets_of(connection):
            sock.close()

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

    @property
    def is_writing(self) -> bool:
        """Whether something waits to be written with the next turn."""
        return bool(self._connection._get_write_buffer_size())

    def is_usable(self) -> bool:
        """Whether it is still open after reading what the broker may have said in the meantime."""
        if not self.is_open:
            return False
        if time.monotonic() - self.used_at < FRESH and self._is_silent():
            return True
        try:
            self.turn()
        except LinkLost:
            return False
        return self.is_open

    def _is_silent(self) -> bool:
        """Whether the socket has neither bytes nor an end for us; only a plain one tells without a loop turn."""
        if self.address.tls is not None:
            return False
        sock = _socket_of(self._connection)
        if sock is None:
            return False
        try:
            sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def turn(self) -> None:
        """One loop turn that waits for nothing. Raises: LinkLost."""
        self._loop.call_later(0, _nothing)
        self._poll()

    def run(self, condition: Callable[[], bool], deadline: float | None) -> bool:
        """Turn the loop until `condition()` or the deadline; whether it holds. Raises: LinkLost."""
        if self._error is not None:
            raise LinkLost(self._error)
        try:
            while not condition():
                if deadline is not None:
                    now = time.monotonic()
                    if now >= deadline:
                        return False
                    if self._alarm_at is None or self._alarm_at > deadline:
                        self._alarm_at = deadline
                        self._loop.call_later(deadline - now, self._on_alarm)
                self._poll()
        finally:
            self.used_at = time.monotonic()
        return True

    def _on_alarm(self) -> None:
        self._alarm_at = None

    def _poll(self) -> None:
        self._loop.poll()
        self._loop.process_timeouts()
        if self._error is not None:
            raise LinkLost(self._error)

    def wake(self) -> None:
        """Make `run` look at its condition again; from any thread."""
        loop = self._loop
        if loop is not None:
            loop.add_callback_threadsafe(_nothing)

    def fail(self, error: BaseException) -> None:
        """Take it for lost: whoever waits gets LinkLost; only from a callback of this link's loop."""
        self._error = self._error or error

    def demand(self, condition: Callable[[], bool], deadline: float, doing: str) -> None:
        """`run`, or the named error when the deadline passes. Raises: LinkLost, ConnectionBlocked, PublishTimeout."""
        if not self.run(condition, deadline):
            raise self.late(doing)

    def late(self, doing: str) -> PublishError:
        """The error for a deadline that passed while `doing`."""
        if self.blocked_reason is not None:
            return blocked(self.address, self.blocked_reason)
        return PublishTimeout(f"the deadline passed while {doing} at {self.address.safe_url}")

    def gather(self) -> None:
        """Keep what is published until `flush`, to write it in large pieces."""
        self._connection.gather()

    def flush(self) -> None:
        """Write what was kept."""
        if self._connection is not None:
            self._connection.flush()

    # -- declaring

    def declare(self, entities: Sequence[Declaration], deadline: float, warn: Warn) -> None:
        """Make sure that entities exist, each once per connection. A queue or exchange that exists with other arguments,
        or that the user may not declare but that exists, is used as it is found, with a warning.

        Raises: LinkLost, PublishTimeout, ConnectionBlocked, AccessRefused, PublishError.
        """
        for entity in entities:
            if entity in self._declared or (isinstance(entity, Exchange) and not is_declarable(entity)):
                continue
            error = self._declare_one(entity, deadline, passive=False)
            if error is not None and not isinstance(entity, Binding):
                error = self._use_as_found(entity, error, deadline, warn)
            if error is not None:
                raise declare_error(entity_name(entity), error)
            if len(self._declared) > MOST_DECLARED:
                self._declared.clear()  # chords' queues come and go; the others are declared once more
            self._declared.add(entity)

    def _use_as_found(
        self, entity: Exchange | Queue, error: ChannelClosedByBroker, deadline: float, warn: Warn
    ) -> ChannelClosedByBroker | None:
        if error.reply_code not in (PRECONDITION_FAILED, ACCESS_REFUSED):
            return error
        if self._declare_one(entity, deadline, passive=True) is not None:
            return error
        if error.reply_code == ACCESS_REFUSED:
            warn(f"the broker's user may not declare {entity_name(entity)}; it exists and is used as found")
        else:
            warn(describe_difference(entity, error.reply_text))
        return None

    def _declare_one(self, entity: Declaration, deadline: float, *, passive: bool) -> ChannelClosedByBroker | None:
        answers: list[Any] = []
        try:
            send_declaration(self.channel, entity, answers.append, passive=passive)
        except UNWRITABLE as error:
            raise PublishError(f"{entity_name(entity)} cannot be declared: {type(error).__name__}: {error}") from error
        try:
            self.demand(lambda: bool(answers), deadline, f"declaring {entity_name(entity)}")
        except LinkLost as lost:
            if not isinstance(lost.cause, ChannelClosedByBroker):
                raise
            self.reopen_channel(deadline)
            return lost.cause
        return None


def _nothing() -> None:
    """For a timer that only ends a wait."""


def _socket_of(connection: Any) -> Any:
    return getattr(getattr(connection, "_transport", None), "_sock", None)


def _sockets_of(connection: Any) -> list[Any]:
    """The socket, wherever pika keeps it at this stage of connecting."""
    connector = getattr(getattr(connection, "_connection_workflow", None), "_connector", None)
    found = (_socket_of(connection), getattr(connector, "_sock", None))
    return [sock for sock in found if sock is not None]


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

    No host may use up the time of those after it. Raises: AccessRefused at once, BrokerUnreachable.
    """
    pause = 0.05
    last: BrokerUnreachable | None = None
    while True:
        for index, address in enumerate(addresses):
            now = time.monotonic()
            share = min(connect_timeout, (deadline - now) / (len(addresses) - index))
            link = kind(address, heartbeat=heartbeat, connect_timeout=share, name=name)
            try:
                link.open(now + share)
            except AccessRefused:
                raise
            except BrokerUnreachable as error:
                # One that the deadline cut short knows less than the one before it.
                if last is None or share == connect_timeout or time.monotonic() < now + share:
                    last = error
            else:
                return link
        if deadline - time.monotonic() <= pause:
            raise BrokerUnreachable(f"{last} (tried until the deadline)") from last
        time.sleep(pause)
        pause = min(pause * 2, 0.5)

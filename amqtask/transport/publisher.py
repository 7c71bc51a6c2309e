"""Publisher: confirmed and mandatory publishes from the caller's thread, within one total deadline.

Safe across threads (each publish has a link of its own from a small pool), forks (a child forgets its parent's links),
eventlet and gevent (nothing here blocks but pika's loop, on a socket and a select that they patch).

An idle link that the broker or a firewall dropped is replaced without an error to the caller: closed ones are noticed
before use; one that was idle and gives no confirm for half of the deadline is given up for a fresh one, and the
message is published again there (at least once: the same task id).
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pika
from pika.exceptions import ChannelClosedByBroker

from amqtask.entities import Declaration
from amqtask.exceptions import (
    AccessRefused,
    BrokerUnreachable,
    ConnectionBlocked,
    MessageTooLarge,
    PublishError,
    PublishRefused,
    PublishTimeout,
    Unroutable,
)
from amqtask.message import Message, Properties
from amqtask.transport.confirms import Confirms
from amqtask.transport.link import ACCESS_REFUSED, NOT_FOUND, PRECONDITION_FAILED, Link, LinkLost, connect
from amqtask.transport.url import BrokerAddress

# How many publishes of one batch may wait for their confirm at once.
WINDOW = 2000
# A link that was idle for so long is not trusted to be alive (seconds).
STALE_AFTER = 10.0
NO_DEADLINE = 365 * 86400.0
_UNSETTLED = object()


def basic_properties(properties: Properties) -> pika.BasicProperties:
    """pika's form of our properties."""
    return pika.BasicProperties(
        content_type=properties.content_type,
        content_encoding=properties.content_encoding,
        headers=properties.headers,
        delivery_mode=properties.delivery_mode,
        priority=properties.priority,
        correlation_id=properties.correlation_id,
        reply_to=properties.reply_to,
        expiration=properties.expiration,
        message_id=properties.message_id,
        timestamp=properties.timestamp,
        type=properties.type,
        user_id=properties.user_id,
        app_id=properties.app_id,
    )


class _Batch:
    """Messages on their way over one link: what is published, what is settled, how."""

    def __init__(self, link: PublishingLink, messages: Sequence[Message], errors: list[Any], todo: list[int]) -> None:
        self.link = link
        self.messages = messages
        self.errors = errors
        self.todo = deque(todo)
        self.left = len(todo)

    def fill(self) -> None:
        """Publish as many as the window allows."""
        while self.todo and len(self.link.confirms) < WINDOW:
            index = self.todo.popleft()
            self.link.send(self, index)

    def settled(self, index: int, error: PublishError | None) -> None:
        """One message has its answer."""
        if self.errors[index] is _UNSETTLED:
            self.errors[index] = error
        self.left -= 1
        if self.todo:
            self.fill()
        elif not self.left:
            self.link.wake()


class PublishingLink(Link):
    """A link whose channel is in confirm mode."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.confirms: Confirms[tuple[_Batch, int]] = Confirms()
        # What was returned, by message id, until its ack follows.
        self._returned: dict[str, str] = {}

    def _on_channel(self, channel: Any) -> None:
        self.confirms = Confirms()
        self._returned = {}
        channel.add_on_return_callback(self._on_return)
        channel.confirm_delivery(self._on_confirm, callback=lambda _: super(PublishingLink, self)._on_channel(channel))

    def send(self, batch: _Batch, index: int) -> None:
        """Publish one message of a batch."""
        message = batch.messages[index]
        self.confirms.published((batch, index))
        self.channel.basic_publish(
            message.exchange,
            message.routing_key,
            message.body,
            basic_properties(message.properties),
            mandatory=message.mandatory,
        )

    def _on_return(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        if properties.message_id:
            self._returned[properties.message_id] = method.reply_text

    def _on_confirm(self, frame: Any) -> None:
        method = frame.method
        acked = isinstance(method, pika.spec.Basic.Ack)
        for batch, index in self.confirms.settle(method.delivery_tag, method.multiple):
            message = batch.messages[index]
            batch.settled(index, self._verdict(message, acked))

    def _verdict(self, message: Message, acked: bool) -> PublishError | None:
        if self._returned and self._returned.pop(message.properties.message_id or "", None) is not None:
            return unroutable(message)
        return None if acked else refused(message)


def unroutable(message: Message) -> Unroutable:
    """The error for a returned message."""
    exchange = f"exchange {message.exchange!r}" if message.exchange else "the default exchange"
    return Unroutable(
        f"{exchange} has no queue for routing key {message.routing_key!r}; the broker returned the message, nothing was "
        "stored. Is the queue declared and bound (does a worker consume it)?"
    )


def refused(message: Message) -> PublishRefused:
    """The error for a nack."""
    return PublishRefused(
        f"the broker refused the message for routing key {message.routing_key!r}: the queue is full (x-max-length with "
        "reject-publish) or has no majority of its nodes; nothing was stored"
    )


class PikaPublisher:
    """Publishes with confirms; see amqtask.transport.contract.Publisher.

    `timeout` is seconds for a whole publish (None: no deadline), `pool_limit` how many connections at most.
    """

    def __init__(
        self,
        addresses: Sequence[BrokerAddress],
        *,
        timeout: float | None = 5.0,
        pool_limit: int | None = 10,
        heartbeat: int | None = 60,
        connect_timeout: float = 4.0,
        client_name: str = "",
        on_warning: Callable[[str], None] | None = None,
    ) -> None:
        self._addresses = tuple(addresses)
        self._timeout = timeout
        self._pool_limit = pool_limit or 1_000_000
        self._heartbeat = heartbeat
        self._connect_timeout = connect_timeout
        self._client_name = client_name
        self._warn = on_warning or _warn
        self._message_number = 0
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._idle: list[PublishingLink] = []
        self._in_use = 0
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)

    # -- the contract

    def publish(self, message: Message, *, timeout: float | None = None) -> None:
        """Publish and wait for the confirm; raises the named error of what went wrong."""
        error = self.publish_many((message,), timeout=timeout)[0]
        if error is not None:
            raise error

    def publish_many(self, messages: Sequence[Message], *, timeout: float | None = None) -> list[PublishError | None]:
        """All before the first confirm is awaited; one entry per message, None for a stored one."""
        deadline = self._deadline(timeout)
        for message in messages:
            if message.mandatory and not message.properties.message_id:
                self._message_number += 1
                message.properties.message_id = f"{os.getpid()}-{id(self):x}-{self._message_number}"
        errors: list[Any] = [_UNSETTLED] * len(messages)
        while True:
            todo = [index for index, error in enumerate(errors) if error is _UNSETTLED]
            if not todo:
                return errors
            try:
                self._attempt(messages, errors, todo, deadline)
            except PublishError as error:
                for index in todo:
                    if errors[index] is _UNSETTLED:
                        errors[index] = error
            except LinkLost as lost:
                if time.monotonic() >= deadline:
                    failure = PublishTimeout(f"the connection was lost ({lost.cause}) and the deadline passed")
                    errors = [failure if error is _UNSETTLED else error for error in errors]

    def declare(self, entities: Sequence[Declaration], *, timeout: float | None = None) -> None:
        """Declare entities now, for whoever wants to see the error at once."""
        deadline = self._deadline(timeout)
        while True:
            link = self._take(deadline)
            try:
                link.declare(entities, deadline, self._warn)
            except LinkLost:
                if time.monotonic() >= deadline:
                    raise PublishTimeout("the connection was lost while declaring, and the deadline passed") from None
            else:
                return
            finally:
                self._give_back(link)

    def close(self) -> None:
        """Close idle connections; the publisher opens new ones when it is used again."""
        if self._pid != os.getpid():
            self._forget()
        with self._lock:
            idle, self._idle = self._idle, []
        for link in idle:
            link.close()

    # -- one attempt over one link

    def _attempt(self, messages: Sequence[Message], errors: list[Any], todo: list[int], deadline: float) -> None:
        link = self._take(deadline)
        was_idle = time.monotonic() - link.used_at > STALE_AFTER
        try:
            self._declare_all(link, messages, todo, deadline)
            batch = _Batch(link, messages, errors, todo)
            batch.fill()
            # A link that nobody has used for a while may lead nowhere; leave time for another try.
            patience = time.monotonic() + (deadline - time.monotonic()) / 2 if was_idle else deadline
            if not link.run(lambda: not batch.left, patience):
                if link.blocked_reason is None and was_idle and time.monotonic() < deadline:
                    link.discard()
                    return
                link.demand(lambda: not batch.left, deadline, "waiting for the broker's confirm")
        except LinkLost as lost:
            self._explain(lost, link, messages, errors, todo)
        except (PublishTimeout, ConnectionBlocked):
            link.discard()  # its late confirms must not be taken for those of the next publish
            raise
        finally:
            self._give_back(link)

    def _declare_all(self, link: Link, messages: Sequence[Message], todo: list[int], deadline: float) -> None:
        seen: set[int] = set()
        for index in todo:
            declare = messages[index].declare
            if declare and id(declare) not in seen:
                seen.add(id(declare))
                link.declare(declare, deadline, self._warn)

    def _explain(
        self, lost: LinkLost, link: PublishingLink, messages: Sequence[Message], errors: list[Any], todo: list[int]
    ) -> None:
        """A channel that the broker closed because of one of our messages: that one gets the error, the rest go again."""
        cause = lost.cause
        if not isinstance(cause, ChannelClosedByBroker):
            raise lost
        culprits = [index for index in todo if errors[index] is _UNSETTLED]
        index = culprit(cause, messages, culprits)
        if index is None:
            raise lost
        errors[index] = channel_error(cause, messages[index])
        link.discard()

    # -- the pool of links

    def _deadline(self, timeout: float | None) -> float:
        seconds = self._timeout if timeout is None else timeout
        return time.monotonic() + (NO_DEADLINE if seconds is None else seconds)

    def _take(self, deadline: float) -> PublishingLink:
        if self._pid != os.getpid():
            self._forget()
        with self._freed:
            while not self._idle and self._in_use >= self._pool_limit:
                if not self._freed.wait(max(0.0, deadline - time.monotonic())):
                    raise PublishTimeout(
                        f"all {self._pool_limit} connections of the publisher are in use, and the deadline passed "
                        "(broker_pool_limit)"
                    )
            self._in_use += 1
            link = self._idle.pop() if self._idle else None
        try:
            if link is not None and link.is_usable():
                return link
            if link is not None:
                link.discard()
            return self._connect(deadline)
        except BaseException:
            with self._freed:
                self._in_use -= 1
                self._freed.notify()
            raise

    def _connect(self, deadline: float) -> PublishingLink:
        try:
            return connect(
                self._addresses,
                deadline,
                heartbeat=self._heartbeat,
                connect_timeout=self._connect_timeout,
                name=self._client_name,
                kind=PublishingLink,
            )
        except AccessRefused:
            raise
        except BrokerUnreachable as error:
            raise BrokerUnreachable(str(error)) from error.__cause__

    def _give_back(self, link: PublishingLink) -> None:
        with self._freed:
            self._in_use -= 1
            if link.is_open:
                self._idle.append(link)
            self._freed.notify()
        if not link.is_open:
            link.discard()

    def _forget(self) -> None:
        """In a forked child: the parent goes on with its links; we only close our copies of their sockets."""
        links = self._idle
        self._reset()
        for link in links:
            link.discard()


def culprit(cause: ChannelClosedByBroker, messages: Sequence[Message], candidates: list[int]) -> int | None:
    if not candidates:
        return None
    if cause.reply_code == PRECONDITION_FAILED and "larger than" in cause.reply_text:
        return max(candidates, key=lambda index: len(messages[index].body))
    if cause.reply_code in (NOT_FOUND, ACCESS_REFUSED):
        named = [index for index in candidates if f"'{messages[index].exchange}'" in cause.reply_text]
        return named[0] if named else None
    return None


def channel_error(cause: ChannelClosedByBroker, message: Message) -> PublishError:
    if cause.reply_code == PRECONDITION_FAILED:
        return MessageTooLarge(
            f"the message of {len(message.body)} bytes is over the broker's limit: {cause.reply_text} "
            "(max_message_size). Store large data elsewhere and pass where it is."
        )
    if cause.reply_code == ACCESS_REFUSED:
        return AccessRefused(f"the broker's user may not publish to exchange {message.exchange!r}: {cause.reply_text}")
    return Unroutable(
        f"exchange {message.exchange!r} does not exist: {cause.reply_text}. "
        "Declare it (task_queues), or publish to a queue."
    )


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)

"""Publisher: confirmed and mandatory publishes from the caller's thread, within one total deadline.

Safe across threads (each publish has a link of its own from a small pool), forks (a child forgets its parent's links),
eventlet and gevent (nothing here blocks but pika's loop, on a socket and a select that they patch).

An idle link that the broker or a firewall dropped is replaced without an error to the caller: closed ones are noticed
before use; one that was idle and gives no confirm for half of the deadline is given up for a fresh one, and the
message is published again there (at least once: the same task id).
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pika
from pika.exceptions import ChannelClosedByBroker

from amqtask.entities import Declaration
from amqtask.exceptions import ConnectionBlocked, PublishError, PublishTimeout
from amqtask.message import Message
from amqtask.transport.confirms import Confirms, Returns
from amqtask.transport.content import UNWRITABLE, basic_properties, unwritable
from amqtask.transport.errors import channel_error as channel_error
from amqtask.transport.errors import culprit as culprit
from amqtask.transport.errors import culprits
from amqtask.transport.errors import refused as refused
from amqtask.transport.errors import unroutable as unroutable
from amqtask.transport.link import Link, LinkLost, connect
from amqtask.transport.url import BrokerAddress

# How many publishes of one batch may wait for their confirm at once.
WINDOW = 2000
# A link that was idle for so long is not trusted to be alive (seconds).
STALE_AFTER = 10.0
NO_DEADLINE = 365 * 86400.0
# Pause before going on over a new connection when one has just been lost twice in a row (seconds).
LOST_PAUSE = 0.1
_UNSETTLED = object()


class _Batch:
    """Messages on their way over one link: what is published, what is settled, how."""

    def __init__(self, link: PublishingLink, messages: Sequence[Message], errors: list[Any], todo: list[int]) -> None:
        self.link = link
        self.messages = messages
        self.errors = errors
        self.todo = deque(todo)
        self.left = len(todo)

    def is_done(self) -> bool:
        """Publish as many as the window allows; whether all have their answer."""
        if self.todo and len(self.link.confirms) < WINDOW:
            self.link.gather()
            try:
                while self.todo and len(self.link.confirms) < WINDOW:
                    self.link.send(self, self.todo.popleft())
            finally:
                self.link.flush()
        return not self.left

    def settled(self, index: int, error: PublishError | None) -> None:
        """One message has its answer."""
        if self.errors[index] is _UNSETTLED:
            self.errors[index] = error
        self.left -= 1


class PublishingLink(Link):
    """A link whose channel is in confirm mode."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.confirms: Confirms[tuple[_Batch, int]] = Confirms()
        self._returns = Returns()

    def _on_channel(self, channel: Any) -> None:
        self.confirms = Confirms()
        self._returns = Returns()
        channel.add_on_return_callback(self._on_return)
        channel.confirm_delivery(self._on_confirm, callback=lambda _: super(PublishingLink, self)._on_channel(channel))

    def send(self, batch: _Batch, index: int) -> None:
        """Publish one message of a batch."""
        message = batch.messages[index]
        try:
            self.channel.basic_publish(
                message.exchange,
                message.routing_key,
                message.body,
                basic_properties(message.properties),
                mandatory=message.mandatory,
            )
        except UNWRITABLE as error:
            if not self.channel.is_open:
                raise LinkLost(error) from error
            batch.settled(index, unwritable(message, error))  # pika encodes all before it writes anything
        else:
            self.confirms.published((batch, index))

    def _on_return(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        self._returns.returned(properties.message_id, method.exchange, method.routing_key)

    def _on_confirm(self, frame: Any) -> None:
        method = frame.method
        acked = isinstance(method, pika.spec.Basic.Ack)
        for batch, index in self.confirms.settle(method.delivery_tag, method.multiple):
            batch.settled(index, self._verdict(batch.messages[index], acked))

    def _verdict(self, message: Message, acked: bool) -> PublishError | None:
        if len(self._returns) and self._returns.claim(
            message.properties.message_id, message.exchange, message.routing_key
        ):
            return unroutable(message)
        return None if acked else refused(message)


class _Links:
    """The links of one process, and who may have one."""

    def __init__(self, owner: PikaPublisher, pid: int) -> None:
        # Idle links, the last used at the end; and all that exist, for a forked child to close its copies of.
        self.idle: list[PublishingLink] = []
        self.all: set[PublishingLink] = set()
        self.in_use = 0
        self.freed = threading.Condition(threading.Lock())
        self.goodbye = weakref.finalize(owner, _close_all, self.idle, pid)

    def discard(self) -> None:
        """In a forked child: the parent goes on with its links; we only close our copies of their sockets."""
        self.goodbye.detach()
        for link in self.all:
            link.discard()


class PikaPublisher:
    """Publishes with confirms; see amqtask.transport.contract.Publisher.

    `timeout` is seconds for a whole publish (None: no deadline), `pool_limit` how many connections at most; a link that was idle
    for longer than `stale_after` seconds is not trusted to be alive.
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
        stale_after: float = STALE_AFTER,
        on_warning: Callable[[str], None] | None = None,
    ) -> None:
        self._addresses = tuple(addresses)
        self._timeout = timeout
        self._pool_limit = pool_limit or 1_000_000
        self._heartbeat = heartbeat
        self._connect_timeout = connect_timeout
        self._client_name = client_name
        self._stale_after = stale_after
        self._warn = on_warning or _warn
        self._numbers = itertools.count(1)
        # By process: of the threads that come first in a forked child, each finds the same one.
        self._own: dict[int, _Links] = {}

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
                message.properties.message_id = f"{os.getpid()}-{id(self):x}-{next(self._numbers)}"
        errors: list[Any] = [_UNSETTLED] * len(messages)
        one_by_one = False
        losses = 0
        while todo := [index for index, error in enumerate(errors) if error is _UNSETTLED]:
            try:
                self._attempt(messages, errors, todo[:1] if one_by_one else todo, deadline)
            except PublishError as error:
                _fail(errors, error)
            except LinkLost as lost:
                # The broker does not like one of these, and not even its words tell which: find it.
                one_by_one = one_by_one or isinstance(lost.cause, ChannelClosedByBroker)
                losses += 1
                self._lost(lost, errors, deadline, losses)
        return errors

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
        own = self._links
        with own.freed:
            idle = own.idle[:]
            own.idle.clear()
            own.all.difference_update(idle)
        for link in idle:
            link.close()

    # -- one attempt over one link

    def _attempt(self, messages: Sequence[Message], errors: list[Any], todo: list[int], deadline: float) -> None:
        link = self._take(deadline)
        started = time.monotonic()
        was_idle = started - link.used_at > self._stale_after
        try:
            todo = self._declare_all(link, messages, errors, todo, deadline)
            if link.blocked_reason is not None:
                # Nothing is sent into a blocked connection, so nothing of it can be stored later.
                link.demand(lambda: link.blocked_reason is None, deadline, "waiting to publish")
            batch = _Batch(link, messages, errors, todo)
            # A link that nobody has used for a while may lead nowhere; leave time for another try.
            patience = (started + deadline) / 2 if was_idle else deadline
            if link.run(batch.is_done, patience):
                return
            if was_idle and link.blocked_reason is None and time.monotonic() < deadline:
                self._distrust(link)
                return
            link.demand(batch.is_done, deadline, "waiting for the broker's confirm")
        except LinkLost as lost:
            self._explain(lost, link, messages, errors, todo, deadline)
        except PublishTimeout:
            link.discard()
            raise
        finally:
            self._give_back(link)

    def _declare_all(
        self, link: PublishingLink, messages: Sequence[Message], errors: list[Any], todo: list[int], deadline: float
    ) -> list[int]:
        """Declare what the messages need; those whose declarations succeeded."""
        failed: dict[int, PublishError | None] = {}
        for index in todo:
            declare = messages[index].declare
            if not declare or id(declare) in failed:
                continue
            failed[id(declare)] = None
            try:
                link.declare(declare, deadline, self._warn)
            except (PublishTimeout, ConnectionBlocked):
                raise
            except PublishError as error:
                failed[id(declare)] = error
        if not any(failed.values()):
            return todo
        for index in todo:
            errors[index] = failed.get(id(messages[index].declare)) or errors[index]
        return [index for index in todo if errors[index] is _UNSETTLED]

    def _explain(
        self,
        lost: LinkLost,
        link: PublishingLink,
        messages: Sequence[Message],
        errors: list[Any],
        todo: list[int],
        deadline: float,
    ) -> None:
        """A channel that the broker closed because of some of our messages: those get the error, the rest go again."""
        cause = lost.cause
        if not isinstance(cause, ChannelClosedByBroker):
            raise lost
        guilty = culprits(cause, messages, [index for index in todo if errors[index] is _UNSETTLED])
        for index in guilty:
            errors[index] = channel_error(cause, messages[index])
        link.reopen_channel(deadline)
        if not guilty:
            raise lost

    def _lost(self, lost: LinkLost, errors: list[Any], deadline: float, losses: int) -> None:
        """Before the next attempt: is there time for one, and is the broker worth a pause?"""
        left = deadline - time.monotonic()
        if left <= 0:
            _fail(errors, PublishTimeout(f"the connection was lost ({lost.cause}) and the deadline passed"))
        elif losses > 1 and not isinstance(lost.cause, ChannelClosedByBroker):
            time.sleep(min(LOST_PAUSE, left))

    # -- the pool of links

    def _deadline(self, timeout: float | None) -> float:
        seconds = self._timeout if timeout is None else timeout
        return time.monotonic() + (NO_DEADLINE if seconds is None else seconds)

    def _take(self, deadline: float) -> PublishingLink:
        own = self._links
        with own.freed:
            while not own.idle and own.in_use >= self._pool_limit:
                if not own.freed.wait(max(0.0, deadline - time.monotonic())):
                    own.freed.notify()  # one may come back in the very moment in which we give up, and only we were told
                    raise PublishTimeout(
                        f"all {self._pool_limit} connections of the publisher are in use, and the deadline passed "
                        "(broker_pool_limit)"
                    )
            own.in_use += 1
            link = own.idle.pop() if own.idle else None
        try:
            if link is not None and link.is_usable():
                return link
            if link is not None:
                self._drop(link)
            return self._connect(deadline)
        except BaseException:
            if link is not None:
                self._drop(link)
            with own.freed:
                own.in_use -= 1
                own.freed.notify()
            raise

    def _connect(self, deadline: float) -> PublishingLink:
        addresses = self._addresses
        link = connect(
            addresses,
            deadline,
            heartbeat=self._heartbeat,
            connect_timeout=self._connect_timeout,
            name=self._client_name,
            kind=PublishingLink,
        )
        # The next connection begins with the host that answers.
        at = addresses.index(link.address)
        self._addresses = addresses[at:] + addresses[:at]
        own = self._links
        with own.freed:
            own.all.add(link)
        return link

    def _give_back(self, link: PublishingLink) -> None:
        own, is_open = self._links, link.is_open
        with own.freed:
            own.in_use -= 1
            if is_open:
                own.idle.append(link)
            own.freed.notify()
        if not is_open:
            self._drop(link)

    def _distrust(self, link: PublishingLink) -> None:
        """This idle link leads nowhere, so those that have been idle for longer do not either."""
        own = self._links
        with own.freed:
            doubtful = [idle for idle in own.idle if time.monotonic() - idle.used_at > self._stale_after]
            for idle in doubtful:
                own.idle.remove(idle)
        for each in (link, *doubtful):
            self._drop(each)

    def _drop(self, link: PublishingLink) -> None:
        own = self._links
        with own.freed:
            own.all.discard(link)
        link.discard()

    @property
    def _links(self) -> _Links:
        pid = os.getpid()
        own = self._own.get(pid)
        if own is None:
            made = _Links(self, pid)
            own = self._own.setdefault(pid, made)
            if own is not made:
                made.goodbye.detach()
            for other in list(self._own):
                inherited = self._own.pop(other, None) if other != pid else None
                if inherited is not None:
                    inherited.discard()
        return own


def _fail(errors: list[Any], error: PublishError) -> None:
    errors[:] = [error if known is _UNSETTLED else known for known in errors]


def _close_all(links: list[PublishingLink], pid: int) -> None:
    """At the end of the program: leave the broker properly, so that it does not log a lost client."""
    if pid == os.getpid():
        deadline = time.monotonic() + 1.0
        for link in links:
            link.close(deadline - time.monotonic())


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)

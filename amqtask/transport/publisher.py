"""Publisher: confirmed and mandatory publishes from the caller's thread, within one total deadline.

Safe wherever a program may publish: in threads, signal handlers, finalizers and forked children (each publish has a link of
its own from a small pool without a lock, see `Links`), under eventlet and gevent (only a socket's poll and sleeping block, which
they patch), and with an exception raised into it at any line (the link in use is dropped).

A message goes to another host, within the deadline, when a host refuses it (basic.nack), does not answer (a connection may be
dead without a close) or is lost. So it may be stored twice, under the same task id, but is not lost.
"""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import FrameType

from pika import spec
from pika.exceptions import ChannelClosedByBroker, ConnectionClosedByBroker

from amqtask.exceptions import BrokerUnreachable, ConnectionBlocked, PublishError, PublishRefused, PublishTimeout
from amqtask.ground.lazy import ByProcess
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.entities import Declaration
from amqtask.protocol.message import Message
from amqtask.transport.confirms import (
    AWAY_PAUSE,
    CONNECTION_FORCED,
    NO_DEADLINE,
    PATIENCE_SECONDS,
    Confirms,
    MessageIds,
    Refusing,
    Returns,
    Trusted,
    pause_after,
)
from amqtask.transport.declare import KnownEntities
from amqtask.transport.errors import NOT_FOUND, channel_error, connection_closed_for, culprits, refused, unroutable
from amqtask.transport.link import Link, LinkLost, Links, say_goodbye
from amqtask.transport.url import BrokerAddress, HostTurns, beginning_after, beginning_with

logger = bounded_logger("amqtask.transport")
# How many publishes of one batch may wait for their confirm at once.
WINDOW = 2000
# Bytes that are gathered before they are written.
BURST = 65536
# Pause before going on over a new connection when one has just been lost twice in a row (seconds).
LOST_PAUSE = 0.1
# When a link gives no confirm for this part of the remaining time, its broker is asked for an answer, and has as long for that;
# SHORTEST and LONGEST are the limits in seconds.
PATIENCE, SHORTEST, LONGEST = 0.25, 0.25, 10.0
# After a nack that all hosts have confirmed, further nacks for that destination are final at once for so many seconds.
BELIEVED = 1.0


class _Work:
    """The messages of one call, and the state of each."""

    def __init__(self, messages: Sequence[Message], deadline: float) -> None:
        self.messages = messages
        self.deadline = deadline
        self.errors: list[PublishError | None] = [None] * len(messages)
        self._open = dict.fromkeys(range(len(messages)))
        # Indices of returned messages whose declarations are made anew.
        self.renewed: set[int] = set()
        # Hosts that refused over a connection that was made for this call; below, hosts that did not answer.
        self.refusing: list[BrokerAddress] = []
        self.silent: list[BrokerAddress] = []
        # A host has not answered a declaration: what is known from before is not declared again.
        self.trusts_known = False
        # Whether any host has refused a message, also over an old connection; until when, and after which pause, to try others.
        self.is_refused = False
        self.refused_until = 0.0
        self.pause = 0.0
        self._refusals = 0
        self.is_one_by_one = False
        # How many messages to publish before all of them are answered: fewer after each connection that was lost on the way, so
        # that a burst gets through connections that do not live long enough for all of it.
        self.window = max(1, len(messages))
        self.is_written = False
        self.losses = 0
        # How often in a row the broker has closed the connection because of a frame.
        self.closings = 0

    @property
    def unanswered(self) -> list[int]:
        """The indices of messages that have no answer yet."""
        return list(self._open)

    def next_ones(self, trusted: Trusted) -> list[int]:
        """The indices of the messages to publish now: those that may share a channel, then the others one by one."""
        unanswered = self.unanswered
        if self.is_one_by_one or len(unanswered) == 1:
            return unanswered[:1]
        together = [index for index in unanswered if trusted.covers(self.messages[index])]
        return together[: self.window] or unanswered[:1]

    @property
    def is_over(self) -> bool:
        """Whether all messages have their answer."""
        return not self._open

    def settle(self, index: int, error: PublishError | None) -> None:
        """A message has its answer; only the first answer counts."""
        if index in self._open:
            self.errors[index] = error
            self._open.pop(index, None)

    def fail(self, error: PublishError) -> None:
        """Fail all messages that have no answer yet."""
        if self.is_written and type(error) is BrokerUnreachable:
            error = PublishTimeout(f"the message was published, but no confirm came before the deadline: {error}")
        for index in self.unanswered:
            self.settle(index, error)

    def is_worth_another(
        self, address: BrokerAddress, is_new: bool, now: float, addresses: Sequence[BrokerAddress]
    ) -> bool:
        """Whether a message that this host has just refused is tried again; after a round of all hosts there is a pause."""
        if not self.is_refused:
            self.is_refused, self.refused_until = True, min(self.deadline, now + PATIENCE_SECONDS)
        if is_new:
            if address in self.refusing or {*addresses} <= {*self.refusing, address}:
                self._refusals += 1
                self.pause = pause_after(self._refusals)
            if address not in self.refusing:
                self.refusing.append(address)
        return now + self.pause < self.refused_until

    def renew(self, index: int) -> bool:
        """Whether to declare the message's entities anew: once, if it has any."""
        if index in self.renewed or not self.messages[index].declare:
            return False
        self.renewed.add(index)
        return True


class _Batch:
    """Messages of a call under way over one link."""

    def __init__(self, link: PublishingLink, work: _Work, todo: list[int]) -> None:
        self._link = link
        self.work = work
        self._todo = deque(todo)
        self._waiting = 0
        self.nacked: list[int] = []

    def is_done(self) -> bool:
        """Publish as many as the window allows; whether all have the broker's answer."""
        if self._todo and self._waiting < WINDOW:
            self._say_more()
        return not self._waiting and not self._todo

    def _say_more(self) -> None:
        size = 0
        while self._todo and self._waiting < WINDOW:
            index = self._todo.popleft()
            try:
                size += self._link.publish(self, index)
            except PublishError as error:
                self.work.settle(index, error)
                continue
            self._waiting += 1
            if size >= BURST:
                size = 0
                self._link.flush()
                if self._link.is_writing:
                    break  # the broker reads more slowly than we write
        self.work.is_written = True

    def confirmed(self, index: int, *, is_ack: bool, is_returned: bool) -> None:
        """The broker's answer."""
        self._waiting -= 1
        message = self.work.messages[index]
        if is_returned:
            if not self.work.renew(index):
                self.work.settle(index, unroutable(message))
        elif is_ack:
            self.work.settle(index, None)
        else:
            self.nacked.append(index)


class PublishingLink(Link):
    """A link whose channel is in confirm mode."""

    def __init__(self, *, heartbeat: int | None, name: str) -> None:
        super().__init__(heartbeat=heartbeat, name=name)
        self.trusted = Trusted()

    def _open_channel(self, deadline: float) -> None:
        self._confirms: Confirms[tuple[_Batch, int]] = Confirms()
        self._returns = Returns()
        super()._open_channel(deadline)
        self.call(spec.Confirm.Select(), spec.Confirm.SelectOk, deadline, "opening a channel")

    @property
    def is_at_rest(self) -> bool:
        """Whether no answer is missing."""
        return self.is_open and self.is_whole and not self._confirms and not self.is_writing

    def publish(self, batch: _Batch, index: int) -> int:
        """Publish a message of a batch; how many bytes that are. Raises: PublishError when it cannot be written."""
        size = self.put_message(batch.work.messages[index])
        self._confirms.published((batch, index))
        return size

    def on_return(self, method: spec.Basic.Return, properties: spec.BasicProperties) -> None:
        """The broker returned a message that no queue takes; its ack follows."""
        self._returns.returned(properties.message_id, method.exchange, method.routing_key)

    def on_confirm(self, number: int, multiple: bool, *, is_ack: bool) -> None:
        """The answer to one message, or to all up to it."""
        for batch, index in self._confirms.settle(number, multiple):
            message = batch.work.messages[index]
            is_returned = len(self._returns) > 0 and self._returns.claim(
                message.properties.message_id, message.exchange, message.routing_key
            )
            if is_ack and message.exchange:
                self.trusted.note(message)
            batch.confirmed(index, is_ack=is_ack, is_returned=is_returned)


def _put_back(links: Links[PublishingLink], link: PublishingLink) -> None:
    """After a call: drop a link that still waits for an answer, because the next call would get it."""
    if link.is_at_rest:
        links.give_back(link)
    else:
        links.drop(link)


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
        on_warning: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._addresses = tuple(addresses)
        self._timeout = timeout
        self._pool_limit = pool_limit or 1_000_000
        self._connect_timeout = connect_timeout
        self._warn = on_warning
        self._ids = MessageIds()
        make = partial(PublishingLink, heartbeat=heartbeat, name=client_name)
        self._links = ByProcess(partial(Links, self._pool_limit, make), Links[PublishingLink].forget)
        weakref.finalize(self, say_goodbye, self._links, 1.0)
        self._refusing = Refusing(BELIEVED)
        self._known = KnownEntities()

    # -- the contract

    def publish(self, message: Message, *, timeout: float | None = None) -> None:
        """Publish and wait for the confirm; raises the named error of what went wrong."""
        error = self.publish_many((message,), timeout=timeout)[0]
        if error is not None:
            raise error

    def publish_many(self, messages: Sequence[Message], *, timeout: float | None = None) -> list[PublishError | None]:
        """Publish all before the first confirm is awaited; one entry per message, None for a stored one."""
        for message in messages:
            self._ids.complete(message)
        work = _Work(messages, self._deadline(timeout))
        while not work.is_over:
            if work.pause:
                time.sleep(work.pause)
                work.pause = 0.0
            try:
                self._attempt(work)
            except PublishError as error:
                work.fail(error)
            except LinkLost as lost:
                self._lost(lost, work)
        return work.errors

    def declare(self, entities: Sequence[Declaration], *, timeout: float | None = None) -> None:
        """Declare entities now, to get the error at once."""
        work = _Work((), self._deadline(timeout))
        while True:
            try:
                self._declare(entities, work)
            except LinkLost:
                if time.monotonic() >= work.deadline:
                    raise PublishTimeout("the connection was lost while declaring, and the deadline passed") from None
            else:
                return

    def close(self) -> None:
        """Close idle connections; the publisher opens new ones when it is used again."""
        self._links.get().close(1.0)

    # -- one attempt over one link

    def _attempt(self, work: _Work) -> None:
        """Publish the remaining messages over one link. Raises: LinkLost, PublishError for all remaining messages."""
        links = self._links.made.get(os.getpid()) or self._links.get()
        link, is_new = self._take(links, sys._getframe(), work)
        try:
            self._publish_over(link, work, is_new)
        except PublishError:
            _put_back(links, link)
            raise
        except BaseException:
            links.drop(link)
            raise
        _put_back(links, link)

    def _publish_over(self, link: PublishingLink, work: _Work, is_new: bool) -> None:
        """Raises: LinkLost, PublishError."""
        todo = work.next_ones(link.trusted)
        try:
            self._publish_these(link, work, todo, is_new)
            work.window *= 2
        except LinkLost as lost:
            if not isinstance(lost.cause, ChannelClosedByBroker):
                raise
            self._explain(lost.cause, work, todo, link.trusted)
            link.reopen_channel(work.deadline)

    def _publish_these(self, link: PublishingLink, work: _Work, todo: list[int], is_new: bool) -> None:
        todo = self._declare_all(link, work, todo)
        if link.blocked_reason is not None:
            # Nothing is sent into a blocked connection, so nothing can be stored after the deadline.
            link.demand(lambda: link.blocked_reason is None, work.deadline, "waiting to publish")
        batch = _Batch(link, work, todo)
        if not self._is_answered(link, batch):
            work.silent.append(link.address)
            self._leave(link)
        elif batch.nacked and not self._is_believed(link, batch, is_new):
            self._leave(link)

    def _is_answered(self, link: PublishingLink, batch: _Batch) -> bool:
        """False when the host does not answer, or when it confirms nothing and another one might. Raises: LinkLost, and
        PublishTimeout when there is no other one."""
        work = batch.work
        deadline = work.deadline
        began = time.monotonic()
        patience = min(max((deadline - began) * PATIENCE, SHORTEST), LONGEST)
        if link.run(batch.is_done, min(began + patience, deadline)):
            return True
        if link.blocked_reason is None and time.monotonic() < deadline:
            link.ask()
            answered_by = min(time.monotonic() + patience, deadline)
            link.run(lambda: not link.is_asked or batch.is_done(), answered_by)
            if link.is_asked and link.blocked_reason is None and time.monotonic() < deadline and not batch.is_done():
                return False
        if self._has_another_host(link, work) and link.blocked_reason is None:
            # A node on the wrong side of a partition answers its clients, and has no majority to store anything.
            count = len(work.unanswered)
            if link.run(batch.is_done, (time.monotonic() + deadline) / 2):
                return True
            if len(work.unanswered) == count and link.blocked_reason is None:
                return False
        link.demand(batch.is_done, deadline, "waiting for the broker's confirm")
        return True

    def _is_believed(self, link: PublishingLink, batch: _Batch, is_new: bool) -> bool:
        """Whether a nack is final: all hosts nacked it for the whole patience, or one for this destination was final recently.

        A channel that was open before a queue's leader was lost may nack until that leader is back; a new channel stops doing so
        once there is another leader, which takes some seconds."""
        work, now = batch.work, time.monotonic()
        messages = [work.messages[index] for index in batch.nacked]
        if not all(self._refusing.believes(message, now) for message in messages):
            if work.is_worth_another(link.address, is_new, now, self._addresses):
                return False
            for message in messages:
                self._refusing.note(message, now)
        hosts = [f"{address.host}:{address.port}" for address in work.refusing or [link.address]]
        for index in batch.nacked:
            work.settle(index, refused(work.messages[index], hosts))
        return True

    def _declare_all(self, link: PublishingLink, work: _Work, todo: list[int]) -> list[int]:
        """Declare the messages' entities; the indices of messages whose declarations succeeded."""
        failed: dict[int, PublishError | None] = {}
        for index in todo:
            declare = work.messages[index].declare
            if not declare or id(declare) in failed:
                continue
            failed[id(declare)] = None
            if index in work.renewed:
                link.forget(declare)
            try:
                self._declare_on(link, declare, work)
            except (PublishTimeout, ConnectionBlocked):
                raise
            except PublishError as error:
                if isinstance(error, PublishRefused) and time.monotonic() + AWAY_PAUSE < work.deadline:
                    work.pause = AWAY_PAUSE
                    return []
                failed[id(declare)] = error
        if not any(failed.values()):
            return todo
        for index in todo:
            error_of_it = failed.get(id(work.messages[index].declare))
            if error_of_it is not None:
                work.settle(index, error_of_it)
        return [index for index in todo if not failed.get(id(work.messages[index].declare))]

    def _declare_on(self, link: PublishingLink, entities: Sequence[Declaration], work: _Work) -> None:
        """Declare on this host, in half of the remaining time if there is another host. Raises: LinkLost, PublishError."""
        deadline = work.deadline
        if self._has_another_host(link, work):
            deadline = (time.monotonic() + deadline) / 2
        if work.trusts_known and self._known.issuperset(entities):
            link.trust(entities)
        try:
            if link.declare(entities, deadline, self._warn):
                self._known.note(entities)
        except PublishTimeout as late:
            if deadline == work.deadline:
                raise
            work.silent.append(link.address)
            work.trusts_known = True
            link.fail(late)
            raise LinkLost(late) from late

    def _explain(self, cause: ChannelClosedByBroker, work: _Work, todo: list[int], trusted: Trusted) -> None:
        """The broker closed the channel because of some of our messages: those get the error, the others go again."""
        unanswered = work.unanswered
        # What else goes to an exchange that is not there fails with it.
        candidates = unanswered if cause.reply_code == NOT_FOUND else sorted({*todo} & {*unanswered})
        guilty = culprits(cause, work.messages, candidates)
        for index in guilty:
            trusted.doubt(work.messages[index])
            if cause.reply_code != NOT_FOUND or not work.renew(index):
                work.settle(index, channel_error(cause, work.messages[index]))
        if not guilty:
            # One of these messages is the reason, and the broker's text does not tell which: find it.
            work.is_one_by_one = True

    def _lost(self, lost: LinkLost, work: _Work) -> None:
        """A connection was lost: fail when there is no time for another attempt, or pause before it."""
        work.losses += 1
        work.window = max(1, min(work.window, len(work.unanswered)) // 2)
        seconds_left = work.deadline - time.monotonic()
        if isinstance(lost.cause, ConnectionClosedByBroker) and lost.cause.reply_code != CONNECTION_FORCED:
            # The broker may have closed the connection because of one of these messages: find it.
            work.closings += 1
            todo = work.unanswered
            if work.closings > 1 and (len(todo) == 1 or work.is_one_by_one):
                work.settle(todo[0], connection_closed_for(work.messages[todo[0]], lost))
                work.closings = 0
            work.is_one_by_one |= work.closings > 1
        if seconds_left <= 0:
            work.fail(PublishTimeout(f"the connection was lost ({lost.cause}) and the deadline passed"))
        elif work.losses > 1:
            time.sleep(min(LOST_PAUSE, seconds_left))

    def _declare(self, entities: Sequence[Declaration], work: _Work) -> None:
        links = self._links.get()
        link, _ = self._take(links, sys._getframe(), work)
        try:
            self._declare_on(link, entities, work)
        except LinkLost:
            links.drop(link)
            raise
        except PublishError:
            _put_back(links, link)
            raise
        links.give_back(link)

    # -- the links

    def _deadline(self, timeout: float | None) -> float:
        seconds = self._timeout if timeout is None else timeout
        return time.monotonic() + (NO_DEADLINE if seconds is None else seconds)

    def _take(self, links: Links[PublishingLink], frame: FrameType, work: _Work) -> tuple[PublishingLink, bool]:
        """A link for the call of this frame, and whether it is new."""
        link = links.take(frame, work.deadline, lambda link: self._suits(link, work))
        if link is None:
            raise PublishTimeout(
                f"all {self._pool_limit} connections of the publisher are in use, and the deadline passed "
                "(broker_pool_limit)"
            )
        if link.is_open:
            return link, False
        try:
            self._connect(link, work)
        except BaseException:
            links.drop(link)
            raise
        return link, True

    def _suits(self, link: PublishingLink, work: _Work) -> bool:
        """Whether this free link may be used: no old link for a refused message, and no link to a host that does not answer."""
        return not work.is_refused and link.address not in work.silent and link.is_usable()

    def _connect(self, link: PublishingLink, work: _Work) -> None:
        addresses = self._addresses
        if len(addresses) > 1:
            last = (*work.silent, *work.refusing)
            addresses = tuple(sorted(addresses, key=lambda address: address in last))
        HostTurns(addresses, work.deadline, self._connect_timeout).connect(link.open)
        # The next connection begins with the host that answers.
        self._addresses = beginning_with(self._addresses, link.address)

    def _has_another_host(self, link: PublishingLink, work: _Work) -> bool:
        """Whether a host besides this link's has not been silent during this call, and there is time to ask it."""
        return time.monotonic() < work.deadline and {*self._addresses} > {*work.silent, link.address}

    def _leave(self, link: PublishingLink) -> None:
        """The next connection begins with another host than this link's, which is dropped."""
        link.discard()
        self._addresses = beginning_after(self._addresses, link.address)


# -- Messages that may be lost, from the caller's thread: no confirm is waited for, and no error is raised.


# Seconds that connecting or declaring may take, once in a while; the caller waits.
EVENT_PATIENCE = 0.5
# Seconds without an attempt after a failure.
EVENT_PAUSE = 30.0


class PikaEventPublisher:
    """Publishes messages that may be lost (task-sent events), over a connection of its own; connects with the first message.

    It waits for no confirm and raises nothing. Messages that cannot be written at once are dropped: because the broker is away,
    blocks publishing, or reads more slowly than we write. After a failure the next attempt is made EVENT_PAUSE seconds later.

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
            self._retry_at = time.monotonic() + EVENT_PAUSE
            logger.info("events are dropped for %g s: %s", EVENT_PAUSE, error)

    def close(self) -> None:
        """Close the connection; it connects again when it is used again."""
        self._links.get().close(1.0)

    def _publish(self, messages: Sequence[Message]) -> None:
        deadline = time.monotonic() + EVENT_PATIENCE
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

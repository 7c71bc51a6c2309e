"""Blocking odd jobs on queues for the command line: count, purge, look at, move."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pika import spec
from pika.exceptions import ChannelClosedByBroker

from amqtask.exceptions import (
    AccessRefused,
    BrokerUnreachable,
    ConnectionBlocked,
    MessageTooLarge,
    OperationalError,
    PublishError,
    PublishTimeout,
    QueueNotFound,
    Unroutable,
)
from amqtask.protocol.message import Delivery, Message
from amqtask.transport.contract import Moved, QueueState
from amqtask.transport.declare import entity_name
from amqtask.transport.errors import ACCESS_REFUSED, NOT_FOUND, is_away, lacks, unreachable
from amqtask.transport.link import AnswerClasses, Link, LinkLost, delivery_of
from amqtask.transport.url import BrokerAddress

if TYPE_CHECKING:
    from amqtask.protocol.entities import Declaration
    from amqtask.protocol.message import PropertiesLike
    from amqtask.transport.contract import Publisher
    from amqtask.transport.wire import PikaMethod


# How many messages are under way at once when messages move: so many may be stored twice after a kill.
# RabbitMQ's client of a quorum queue keeps acknowledgements to itself while 32 are not yet applied (rabbit_fifo_client's
# soft limit), and forgets those of basic.get when the channel closes (3.10: 67 of 100 came back). Each basic.get waits for
# all that came before it, so fewer than that at once are safe.
BATCH = 25
# Errors that fail every message; other errors concern one message only (a nack may be either).
_NO_BROKER = (BrokerUnreachable, ConnectionBlocked, PublishTimeout)
_ITS_OWN = (Unroutable, MessageTooLarge)
# What one consumer may hold (basic.qos has 16 bits), and seconds without a delivery after which no more are waited for.
MOST_PREFETCHED = 65535
DELIVERY_SECONDS = 10.0
# What is ready no more, and does not come within so many seconds, went to others.
QUIET_SECONDS = 1.0
# Seconds for one host to take the connection. Its answers may take long: it may have a million messages to delete.
CONNECT_SECONDS, ANSWER_SECONDS = 4.0, 3600.0
# Queues that are asked about before the first answer has come.
ASKED_AT_ONCE = 200


def publish_pairs(publisher: Publisher, pairs: Sequence[tuple[Delivery, Message]], done: Moved) -> list[Delivery]:
    """Publish the messages, and note in `done` what became of them; the deliveries whose messages are stored."""
    if not pairs:
        return []
    try:
        errors: Sequence[PublishError | None] = publisher.publish_many([message for _, message in pairs])
    except PublishError as error:
        errors = [error] * len(pairs)
    stored = [delivery for (delivery, _), error in zip(pairs, errors, strict=True) if error is None]
    failures = [error for error in errors if error is not None]
    done.failed += len(failures)
    done.failure = done.failure or next(iter(failures), None)
    done.is_over = any(isinstance(error, _NO_BROKER) for error in failures) or (
        not stored and not all(isinstance(error, _ITS_OWN) or type(error) is PublishError for error in failures)
    )
    done.moved += len(stored)
    done.repeated += sum(delivery.redelivered for delivery in stored)
    return stored


class AdminLink(Link):
    """A link that keeps what it gets from queues, in order; `queue` is the one that it is used for."""

    def __init__(self) -> None:
        super().__init__(heartbeat=None, name="amqtask command line")
        self.queue = ""
        self.deliveries: deque[Delivery] = deque()

    def ask_for(self, method: object, answer: AnswerClasses) -> Any:
        """Ask the broker, however long the answer takes. Raises: LinkLost."""
        return self.call(method, answer, time.monotonic() + ANSWER_SECONDS, f"asking about {self.queue!r}")

    def await_answers(self, count: int) -> None:
        """Wait for so many answers. Raises: LinkLost; those that came before are there nevertheless."""
        self.demand(lambda: len(self._answers) >= count, time.monotonic() + ANSWER_SECONDS, "asking about many queues")

    def take_answers(self) -> list[Any]:
        """What has come."""
        answers = list(self._answers)
        self._answers.clear()
        return answers

    def get(self, *, no_ack: bool = False) -> Delivery | None:
        """The first message of the queue. Raises: LinkLost."""
        answer = self.ask_for(spec.Basic.Get(queue=self.queue, no_ack=no_ack), (spec.Basic.GetOk, spec.Basic.GetEmpty))
        return self.deliveries.popleft() if isinstance(answer, spec.Basic.GetOk) else None

    def on_delivery(self, method: PikaMethod, properties: PropertiesLike, body: bytes, error: Exception | None) -> None:
        """Keep it."""
        if error is not None:
            self.fail(error)  # moved without its properties it would be another message
            return
        self.deliveries.append(delivery_of(method, properties, body, self.queue))


class QueueAdmin:
    """One short-lived connection; use it as a context manager.

    Raises: BrokerUnreachable when no address answers, AccessRefused for a refused login, QueueNotFound for a queue
    that is not there, OperationalError when the connection breaks.
    """

    def __init__(self, addresses: Sequence[BrokerAddress]) -> None:
        self._addresses = addresses
        self._link = AdminLink()

    def __enter__(self) -> QueueAdmin:
        for index, address in enumerate(self._addresses):
            try:
                self._link.open(address, time.monotonic() + CONNECT_SECONDS)
            except AccessRefused:
                raise
            except BrokerUnreachable as error:
                if index == len(self._addresses) - 1:
                    raise unreachable(error.__cause__ or error, self._addresses) from error
            else:
                break
        return self

    def __exit__(self, *_: object) -> None:
        self._link.close()

    delay_queues = None

    @property
    def server(self) -> str:
        """The broker's product and version, from its server properties."""
        properties = self._link.server_properties
        return f"{properties.get('product', '?')} {properties.get('version', '?')}"

    def about(self) -> dict[str, str]:
        """What the broker says of itself when it is connected to: product, version, cluster_name, platform."""
        names = ("product", "version", "cluster_name", "platform")
        return {name: str(self._link.server_properties.get(name, "")) for name in names}

    def state(self, queue: str) -> QueueState:
        """How many messages are ready in the queue, and how many consumers it has."""
        with self.channel(queue) as link:
            return _state(link)

    def states(self, queues: Sequence[str]) -> dict[str, QueueState]:
        """Of those of these queues that are there. One that is not closes the channel: those behind it are asked about again."""
        found: dict[str, QueueState] = {}
        waiting = list(queues)
        while waiting:
            asked = waiting[:ASKED_AT_ONCE]
            try:
                answers = self._states(asked)
            except QueueNotFound:
                answers = [_state_of(answer) for answer in self._link.take_answers()]
                del asked[len(answers) + 1 :]
            found.update(zip(asked, answers, strict=False))
            del waiting[: len(asked)]
        return found

    def _states(self, asked: Sequence[str]) -> list[QueueState]:
        with self.channel(asked[0]) as link:
            for name in asked:
                link.put(spec.Queue.Declare(queue=name, passive=True))
            link.await_answers(len(asked))
            return [_state_of(answer) for answer in link.take_answers()]

    def has_exchange(self, name: str) -> bool:
        """Whether there is such an exchange."""
        try:
            with self.channel(name) as link:
                link.ask_for(spec.Exchange.Declare(exchange=name, passive=True), spec.Exchange.DeclareOk)
        except QueueNotFound:
            return False
        return True

    def count(self, queue: str) -> int:
        """How many messages are ready in the queue."""
        return self.state(queue).ready

    def purge(self, queue: str) -> int:
        """Delete the ready messages; how many there were."""
        with self.channel(queue) as link:
            return int(link.ask_for(spec.Queue.Purge(queue=queue), spec.Queue.PurgeOk).message_count)

    def delete(self, queue: str) -> None:
        """Delete the queue with its messages; no error when it does not exist."""
        with self.channel(queue) as link:
            link.ask_for(spec.Queue.Delete(queue=queue), spec.Queue.DeleteOk)

    def take(self, queue: str) -> Delivery | None:
        """The first message, which is gone then; None: there is none."""
        with self.channel(queue) as link:
            return link.get(no_ack=True)

    def declare(self, entity: Declaration, *, passive: bool) -> ChannelClosedByBroker | None:
        """Declare an entity, or ask whether it exists; why the broker refuses that. Raises: OperationalError."""
        with self.channel(entity_name(entity)) as link:
            return link.declare_one(entity, time.monotonic() + ANSWER_SECONDS, passive=passive)

    def browse(self, queue: str, limit: int) -> Iterator[Delivery]:
        """The first messages, which stay in the queue (and are marked as redelivered from now on)."""
        with self.channel(queue) as link:
            for _ in range(limit):
                delivery = link.get()
                if delivery is None:
                    return
                yield delivery

    def move(
        self,
        queue: str,
        publisher: Publisher,
        convert: Callable[[Delivery], Message | None],
        *,
        limit: int | None = None,
        acknowledge: bool = True,
        is_stopped: Callable[[], bool] = lambda: False,
        on_progress: Callable[[Moved], None] = lambda _: None,
    ) -> Moved:
        """See amqtask.transport.contract.Admin: a message is acknowledged after its confirm, never before."""
        done = Moved()
        with self.channel(queue) as link:
            remaining = _state(link).ready
            while remaining > 0 and not is_stopped() and not done.is_over and (limit is None or done.moved < limit):
                batch_size = min(BATCH, remaining, BATCH if limit is None else limit - done.moved)
                taken = [delivery for _ in range(batch_size) if (delivery := link.get()) is not None]
                remaining -= batch_size if taken else remaining
                pairs = [(delivery, message) for delivery in taken if (message := convert(delivery)) is not None]
                done.kept += len(taken) - len(pairs)
                stored = publish_pairs(publisher, pairs, done)
                if acknowledge and stored:
                    _acknowledge(link, stored, multiple=not done.failed and not done.kept)
                on_progress(done)
        return done

    def sift(self, queue: str, is_meant: Callable[[Delivery], bool], *, delete: bool) -> int:
        """How many of the messages that are ready now are meant; with `delete` they are deleted.

        All are read before the first one is deleted, and the others are requeued when the channel closes: in their order,
        because they were delivered to one consumer. They then count as redelivered.
        """
        with self.channel(queue) as link:
            tags = self._look_at_all(link, is_meant)
            if delete:
                for first in range(0, len(tags), BATCH):
                    for tag in tags[first : first + BATCH]:
                        link.put(spec.Basic.Ack(tag))
                    link.get()  # see BATCH; what has come meanwhile goes back, too
            return len(tags)

    def _look_at_all(self, link: AdminLink, is_meant: Callable[[Delivery], bool]) -> list[int]:
        """The delivery tags of the messages that are meant."""
        expected = _state(link).ready
        read_count, tags = 0, list[int]()
        link.put(spec.Basic.Qos(prefetch_count=MOST_PREFETCHED))
        last_delivery, room = time.monotonic(), 0
        while read_count < expected and time.monotonic() < last_delivery + DELIVERY_SECONDS:
            if read_count == room:
                # Broker and tags keep the consumers' order.
                tag = f"amqtask-sift-{room:09}"
                link.ask_for(spec.Basic.Consume(queue=link.queue, consumer_tag=tag), spec.Basic.ConsumeOk)
                room += MOST_PREFETCHED
            link.run(lambda: bool(link.deliveries), time.monotonic() + 0.1)
            if link.deliveries:
                last_delivery = time.monotonic()
            elif time.monotonic() > last_delivery + QUIET_SECONDS and not _state(link).ready:
                break  # other consumers have taken the others
            while link.deliveries:
                read_count += 1
                delivery = link.deliveries.popleft()
                if is_meant(delivery):
                    tags.append(delivery.tag)
        link.deliveries.clear()
        return tags

    def wait(self, seconds: float) -> None:
        """Do nothing for so long, but keep the connection alive. Raises: OperationalError when it breaks."""
        try:
            self._opened().run(lambda: False, time.monotonic() + seconds)
        except LinkLost as lost:
            raise _error(lost.cause, "") from lost

    def _opened(self) -> AdminLink:
        """The link with an open channel, also after the broker has closed one. Raises: LinkLost."""
        if not self._link.is_open:
            self._link.reopen_channel(time.monotonic() + ANSWER_SECONDS)
        return self._link

    @contextmanager
    def channel(self, queue: str) -> Iterator[AdminLink]:
        """The connection, for a job on the queue; afterwards what is not answered goes back. Refusals become our errors."""
        deadline = time.monotonic() + ANSWER_SECONDS
        try:
            link = self._opened()
            link.queue = queue
            try:
                yield link
            finally:
                if link.is_open and link.is_whole:
                    link.renew_channel(deadline)
                    link.deliveries.clear()
        except LinkLost as lost:
            raise _error(lost.cause, queue) from lost.cause


def _error(cause: BaseException, queue: str) -> OperationalError | QueueNotFound:
    if not isinstance(cause, ChannelClosedByBroker):
        return OperationalError(f"the connection to the broker broke: {cause!r}")
    return refusal_error(cause, queue)


def refusal_error(cause: ChannelClosedByBroker, queue: str) -> OperationalError | QueueNotFound:
    """The named error for a channel that the broker closed in a job on a queue."""
    if cause.reply_code == NOT_FOUND and is_away(cause):
        return QueueNotFound(f"queue {queue!r} cannot be reached: {cause.reply_text}")
    if cause.reply_code == NOT_FOUND:
        return QueueNotFound(f"there is no queue {queue!r} on this broker.")
    if cause.reply_code == ACCESS_REFUSED:
        return AccessRefused(f"may not do this: {lacks('read', cause.reply_text)}")
    return OperationalError(f"queue {queue!r}: {cause.reply_text}")


def _state(link: AdminLink) -> QueueState:
    return _state_of(link.ask_for(spec.Queue.Declare(queue=link.queue, passive=True), spec.Queue.DeclareOk))


def _state_of(answer: Any) -> QueueState:
    return QueueState(int(answer.message_count), int(answer.consumer_count))


def _acknowledge(link: AdminLink, stored: Sequence[Delivery], *, multiple: bool) -> None:
    for delivery in stored[-1:] if multiple else stored:
        link.put(spec.Basic.Ack(delivery.tag, multiple=multiple))
    link.flush()

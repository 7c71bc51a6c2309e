"""Blocking odd jobs on queues: count, purge, look at, move, read in batches; and what is kept in streams: notes, journals."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pika import spec
from pika.exceptions import ChannelClosedByBroker

from amqtask.exceptions import (
    AccessRefused,
    BrokerUnreachable,
    OperationalError,
    PublishError,
    QueueNotFound,
)
from amqtask.ground.printable import bounded_logger, printable
from amqtask.protocol.entities import Queue
from amqtask.protocol.message import Delivery, Message, Properties
from amqtask.transport.contract import BATCH, OFFSET, PREFETCH, Moved, QueueState
from amqtask.transport.declare import entity_name, wrong_name
from amqtask.transport.errors import ACCESS_REFUSED, NOT_FOUND, is_away, lacks, unreachable
from amqtask.transport.link import AnswerClasses, Link, LinkLost, delivery_of
from amqtask.transport.url import BrokerAddress, HostTurns

if TYPE_CHECKING:
    from amqtask.ground.shapes import FieldTable
    from amqtask.protocol.entities import Declaration
    from amqtask.protocol.message import PropertiesLike
    from amqtask.transport.contract import Publisher
    from amqtask.transport.wire import PikaMethod


# What one consumer may hold (basic.qos has 16 bits), and seconds without a delivery after which no more are waited for.
MOST_PREFETCHED = 65535
DELIVERY_SECONDS = 10.0
# What is ready no more, and does not come within so many seconds, went to others.
QUIET_SECONDS = 1.0
# Seconds for one host to take the connection. Its answers may take long: it may have a million messages to delete.
CONNECT_SECONDS, ANSWER_SECONDS = 4.0, 3600.0
# Queues that are asked about before the first answer has come.
ASKED_AT_ONCE = 200


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
        waiting = [queue for queue in queues if not wrong_name(queue)]
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
            for most in done.batches(limit, is_stopped):
                size = min(most, remaining)
                taken = [delivery for _ in range(size) if (delivery := link.get()) is not None]
                if not taken:
                    break
                remaining -= size
                stored = done.publish(publisher, taken, convert)
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
        if reason := wrong_name(queue):  # with a line end RabbitMQ would take another queue
            raise QueueNotFound(f"there is no queue {printable(queue, 60)!r}: its name {reason}.")
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


# -- Reading a stream, or an ordinary queue, in batches; a text that is kept as the last message of a stream; a stream that each
# reader reads for itself.
#
# A stream is consumed over AMQP 0-9-1 from an offset (https://www.rabbitmq.com/docs/streams#consuming): with a prefetch, and with
# acknowledgements, which only make room for more. Its messages stay, and each has its offset in the header x-stream-offset.

logger = bounded_logger("amqtask.history")

# Seconds to connect, declare and consume.
OPEN_SECONDS = 10.0


class _TailLink(Link):
    """A link that keeps what it is delivered."""

    def __init__(self, queue: str, name: str) -> None:
        super().__init__(heartbeat=None, name=name)
        self._queue = queue
        self.deliveries: deque[Delivery] = deque()

    def on_delivery(self, method: PikaMethod, properties: PropertiesLike, body: bytes, error: Exception | None) -> None:
        """Keep it."""
        if error is not None:
            logger.error("a message of %s cannot be read: %s", self._queue, error)
        else:
            self.deliveries.append(delivery_of(method, properties, body, self._queue))

    def on_cancelled(self, consumer: str) -> None:
        """The queue is gone, or its node is down."""
        self.fail(ConnectionError(f"the broker cancelled the consumer of {self._queue!r}"))


class QueueTail:
    """See amqtask.transport.contract.Tail. It connects with the first `read`. `position` may be an age, as RabbitMQ writes it."""

    def __init__(
        self,
        addresses: Sequence[BrokerAddress],
        queue: Queue,
        declare: Sequence[Declaration],
        *,
        position: object,
        connect_timeout: float,
        name: str,
    ) -> None:
        self._addresses = tuple(addresses)
        self._queue = queue
        self._declare = tuple(declare)
        self._position = position
        self._connect_timeout = connect_timeout
        self._link = _TailLink(queue.name, name)
        self._last_tag = 0

    def read(self, limit: int, seconds: float) -> list[Delivery]:
        """See the contract."""
        link = self._link
        self._connected(lambda: link.run(lambda: bool(link.deliveries), time.monotonic() + seconds))
        batch = [link.deliveries.popleft() for _ in range(min(limit, len(link.deliveries)))]
        if batch:
            self._last_tag = batch[-1].tag
        return batch

    def write(self, message: Message) -> None:
        """See JournalTail, for the tail of a StreamJournal."""
        self._connected(lambda: self._link.put_message(_kept(message, self._queue)))

    def _connected(self, do: Callable[[], object]) -> None:
        try:
            if not self._link.is_open:
                self._open(time.monotonic() + OPEN_SECONDS)
            do()
        except LinkLost as lost:
            raise self._error(lost) from lost
        except PublishError:
            self._link.discard()
            raise

    def acknowledge(self) -> None:
        """See the contract."""
        tag, self._last_tag = self._last_tag, 0
        if not tag:
            return
        try:
            self._link.put(spec.Basic.Ack(tag, multiple=True))
            self._link.flush()
        except LinkLost as lost:
            raise self._error(lost) from lost

    def close(self) -> None:
        """See the contract."""
        self._link.close()

    def _open(self, deadline: float) -> None:
        link, name = self._link, self._queue.name
        link.deliveries.clear()
        self._last_tag = 0
        HostTurns(self._addresses, deadline, self._connect_timeout).connect(link.open)
        link.declare(self._declare, deadline, logger.warning)
        link.ask_prefetch(PREFETCH)
        arguments: FieldTable = {}
        if self._queue.argument_map.get("x-queue-type") == "stream":
            position = self._position
            arguments[OFFSET] = position + 1 if isinstance(position, int) else position or "first"
        consume = spec.Basic.Consume(queue=name, arguments=arguments)
        link.call(consume, spec.Basic.ConsumeOk, deadline, f"subscribing to {name!r}")

    def _error(self, lost: LinkLost) -> OperationalError | QueueNotFound:
        self._link.discard()
        if isinstance(lost.cause, ChannelClosedByBroker):
            return refusal_error(lost.cause, self._queue.name)
        return BrokerUnreachable(f"the connection for {self._queue.name!r} was lost: {lost}")


# A note's stream: the last message is always there, and older ones soon are not.
_NOTE_LIMITS = {
    "x-queue-type": "stream",
    "x-max-length-bytes": 2_000_000,
    "x-stream-max-segment-size-bytes": 1_000_000,
}
# Seconds for each answer about a note's stream, and for its last message. A stream without one was declared by a writer that got
# no further. It is longer than the 5 s after which a broker knows how many messages a stream has that has just come back.
NOTE_SECONDS = 15.0


class StreamNote:
    """See amqtask.transport.contract.Note. Any number of readers may read at once, and nothing is taken from the queue."""

    def __init__(self, addresses: Sequence[BrokerAddress], make_publisher: Callable[[], Publisher], name: str) -> None:
        self._addresses = tuple(addresses)
        self._make_publisher = make_publisher
        self._queue = Queue(name, queue_arguments=_NOTE_LIMITS)

    def read(self) -> str | None:
        """See the contract."""
        name = self._queue.name
        look = spec.Queue.Declare(queue=name, passive=True)
        consume = spec.Basic.Consume(queue=name, arguments={OFFSET: "last"})
        try:
            with QueueAdmin(self._addresses) as admin, admin.channel(name) as link:

                def ask(method: object, answer: AnswerClasses) -> Any:
                    try:
                        return link.call(method, answer, time.monotonic() + NOTE_SECONDS, f"reading the note {name!r}")
                    except PublishError:
                        link.discard()  # who does not answer this does not close the channel either
                        raise

                ask(look, spec.Queue.DeclareOk)
                link.ask_prefetch(PREFETCH)
                ask(consume, spec.Basic.ConsumeOk)
                link.run(lambda: bool(link.deliveries), time.monotonic() + NOTE_SECONDS)
                # "last" is the last chunk, which may have several messages: after one more answer all of them are here.
                count = ask(look, spec.Queue.DeclareOk).message_count
                if link.deliveries:
                    return link.deliveries[-1].body.decode(errors="replace")
        except QueueNotFound as missing:
            if isinstance(missing.__cause__, ChannelClosedByBroker) and is_away(missing.__cause__):
                raise OperationalError(f"the note {name!r} is away: {missing.__cause__.reply_text}") from missing
            return None
        if count:
            # A broker that has just started, or is busy. Taken for none it would have workers consume what is paused.
            raise OperationalError(f"the broker has the note {name!r}, and did not deliver it in {NOTE_SECONDS:g} s")
        return None

    def write(self, text: str) -> None:
        """See the contract."""
        publisher = self._make_publisher()
        try:
            properties = Properties(content_type="application/json", content_encoding="utf-8")
            publisher.publish(Message(text.encode(), properties, "", self._queue.name, (self._queue,)))
        finally:
            publisher.close()


# It is read to its end before a worker's first task, and a worker remembers 50,000 revokes: those of one id have 300 bytes.
# Its stream is deleted by segments, so they are small.
_JOURNAL_BYTES, _JOURNAL_SEGMENT = 20_000_000, 2_000_000


class StreamJournal:
    """See amqtask.transport.contract.Journal."""

    def __init__(
        self,
        addresses: Sequence[BrokerAddress],
        publisher: Publisher,
        name: str,
        *,
        max_age: float,
        connect_timeout: float,
    ) -> None:
        self._addresses = addresses
        self._publisher = publisher
        self._connect_timeout = connect_timeout
        self._age = f"{max(1, int(max_age))}s"
        limits = {
            "x-queue-type": "stream",
            "x-max-age": self._age,
            "x-max-length-bytes": _JOURNAL_BYTES,
            "x-stream-max-segment-size-bytes": _JOURNAL_SEGMENT,
        }
        self._queue = Queue(name, queue_arguments=limits)

    def write(self, message: Message) -> None:
        """See the contract."""
        self._publisher.publish(_kept(message, self._queue))

    def tail(self, position: object) -> QueueTail:
        """See the contract."""
        return QueueTail(
            self._addresses,
            self._queue,
            (self._queue,),
            position=self._age if position is None else position,
            connect_timeout=self._connect_timeout,
            name=f"amqtask {self._queue.name}",
        )


def _kept(message: Message, queue: Queue) -> Message:
    return Message(message.body, replace(message.properties, delivery_mode=2), "", queue.name, (queue,))

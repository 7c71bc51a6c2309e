"""QueueTail: reads a stream, or an ordinary queue, in batches, and acknowledges them when they are kept elsewhere. StreamNote: a
text that is kept as the last message of a stream. StreamJournal: a stream that each reader reads for itself.

A stream is consumed over AMQP 0-9-1 from an offset (https://www.rabbitmq.com/docs/streams#consuming): with a prefetch, and with
acknowledgements, which only make room for more. Its messages stay, and each has its offset in the header x-stream-offset.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pika import spec
from pika.exceptions import ChannelClosedByBroker

from amqtask.exceptions import BrokerUnreachable, OperationalError, PublishError, QueueNotFound
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.entities import Queue
from amqtask.protocol.message import Delivery, Message, Properties
from amqtask.transport.admin import QueueAdmin, refusal_error
from amqtask.transport.contract import OFFSET, PREFETCH
from amqtask.transport.errors import is_away
from amqtask.transport.link import AnswerClasses, Link, LinkLost, delivery_of
from amqtask.transport.url import HostTurns

if TYPE_CHECKING:
    from amqtask.ground.shapes import FieldTable
    from amqtask.protocol.entities import Declaration
    from amqtask.protocol.message import PropertiesLike
    from amqtask.transport.contract import Publisher
    from amqtask.transport.url import BrokerAddress
    from amqtask.transport.wire import PikaMethod

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

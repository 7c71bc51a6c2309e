"""What a consumer knows of its queues and of the messages that it holds, and its answers on the way to Redis.

All answers of one loop turn go together, and acknowledgements of all turns until Redis has answered to those before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from amqtask.exceptions import PublishError
from amqtask.protocol.message import Properties, dead_headers
from amqtask.transport.redis.layout import envelope, step_of
from amqtask.transport.redis.link import Link, Timers
from amqtask.transport.redis.publishing import Declared, passes, publish_error
from amqtask.transport.redis.scripts import ACK, BURY, GIVE_BACK, PUBLISH, REPLACE
from amqtask.transport.redis.wire import ReplyError

if TYPE_CHECKING:
    from amqtask.protocol.entities import Declaration, Queue
    from amqtask.transport.redis.layout import Incoming, Outgoing


# A queue without a limit of its own (prefetch 0) gets at most so many at once.
UNLIMITED = 10_000


@dataclass(slots=True)
class Consumed:
    """A queue that is consumed. `pattern`: its channels, where it is bound to a fanout exchange."""

    queue: Queue
    declare: tuple[Declaration, ...]
    prefetch: int
    pattern: str | None
    held: int = 0
    is_set_up: bool = False
    # Whether one consumer has the queue, and others wait for their turn.
    is_alone: bool = field(init=False)
    # How many failed deliveries a message may have.
    delivery_limit: int | None = field(init=False)

    def __post_init__(self) -> None:
        arguments = self.queue.argument_map
        limit = arguments.get("x-delivery-limit")
        self.is_alone = bool(arguments.get("x-single-active-consumer"))
        self.delivery_limit = limit if isinstance(limit, int) else None

    @property
    def room(self) -> int:
        """How many more messages it may have."""
        return max(0, (self.prefetch or UNLIMITED) - self.held)

    @property
    def is_exclusive(self) -> bool:
        """Whether another consumer of the queue fails; every consumer has channels of its own."""
        return self.queue.exclusive and self.pattern is None


# The number of a message that others have now: its lease was over.
LOST = -1


class Held(NamedTuple):
    """A delivery that is not answered. `failures`: of its deliveries before. `tag`: its number in Redis; LOST; 0 for one off a
    channel, which Redis does not keep."""

    consumed: Consumed
    message: Incoming
    failures: int
    tag: int

    @property
    def is_stored(self) -> bool:
        """Whether Redis keeps it for this consumer."""
        return self.tag > 0

    @property
    def is_lost(self) -> bool:
        """Whether Redis has kept it for this consumer, and does no longer."""
        return self.tag == LOST


class Letter(NamedTuple):
    """A dead letter as the script BURY takes it: exchange, routing key, step, message, and the queue for it else."""

    exchange: str
    routing_key: str
    step: int
    envelope: bytes
    otherwise: str


def dead_letter(held: Held, reason: str) -> Letter | None:
    """The dead letter of a message; None where its queue has no dead-letter exchange."""
    queue, message = held.consumed.queue, held.message
    arguments = queue.argument_map
    exchange = arguments.get("x-dead-letter-exchange")
    if exchange is None:
        return None
    headers = dead_headers(
        message.properties.headers,
        queue.name,
        reason,
        exchange=message.exchange,
        routing_key=message.routing_key,
        expiration=message.properties.expiration,
    )
    properties: Properties = replace(message.properties, headers=headers, expiration=None)
    key = arguments.get("x-dead-letter-routing-key", message.routing_key)
    return Letter(
        exchange,
        key,
        step_of(properties.priority),
        envelope(message.body, properties, exchange, key),
        f"{queue.name}.dead",
    )


# Tags of one script.
MOST_ANSWERS = 1000
# Failures of a message that was not delivered, of one that is given back without blame, and of one with it.
NEVER_CAME, NO_FAILURE, FAILURE = -1, 0, 1
# Seconds before an answer that Redis refused is sent again.
RETRY_SECONDS = 0.5


class Replacement(NamedTuple):
    """What takes the place of a message that is held; `on_done` gets whether nothing is left to do."""

    tag: int
    messages: Sequence[Outgoing]
    on_done: Callable[[bool], None]


class Answers:
    """Keeps each answer until Redis has confirmed it: a script does nothing for a tag that is no longer held, so that an answer
    may come twice. `on_sent` is called after those of a turn have left."""

    def __init__(
        self,
        link: Link,
        timers: Timers,
        consumer: str,
        declared: Declared,
        *,
        on_sent: Callable[[], None],
        complain: Callable[[str], None],
    ) -> None:
        self._link = link
        self._timers = timers
        self._consumer = consumer
        self._declared = declared
        self._on_sent = on_sent
        self._complain = complain
        self._acks: list[int] = []
        # Whether some are on their way. Those that come meanwhile leave together: a script for each task of a worker that runs
        # one in a turn costs more than the task.
        self._is_acking = False
        self._replacements: list[Replacement] = []
        # Tags of replacements that are not confirmed: whether Redis still holds these is not known.
        self.replacing: set[int] = set()
        self._returns: list[tuple[int, int]] = []
        self._is_due = False

    def ack(self, tags: Sequence[int]) -> None:
        """They are done."""
        self._acks += tags
        self._send_soon()

    def replace(self, replacement: Replacement) -> None:
        """Publish these and acknowledge it, in one step."""
        self._replacements.append(replacement)
        self.replacing.add(replacement.tag)
        self._send_soon()

    def give_back(self, tag: int, failures: int) -> None:
        """It goes back to where it was."""
        self._returns.append((tag, failures))
        self._send_soon()

    def give_back_all(self, pairs: Iterable[tuple[int, int]]) -> None:
        """These too, now: tags and failures, the newest first, so that the oldest is the first again."""
        self._returns = sorted([*self._returns, *pairs], reverse=True)
        self._is_acking = False
        self.send()

    def bury(self, held: Held, reason: str) -> None:
        """Dead-letter it, or drop it where its queue says so."""
        letter = dead_letter(held, reason)
        if letter is None:
            if held.is_stored:
                self.ack([held.tag])
        elif self._link.is_open:
            answered = partial(self._buried, held, reason)
            if held.is_stored:
                self._link.run(answered, BURY, f"{self._consumer}:{held.tag}", *letter)
            else:
                self._link.run(answered, PUBLISH, self._link.layout.channels, *letter[:4])
            self._send_soon()
        else:
            self._bury_later(held, reason)

    def _buried(self, held: Held, reason: str, reply: Any) -> None:
        if isinstance(reply, ReplyError):
            self._complain(f"a message of queue {held.consumed.queue.name!r} cannot be dead-lettered. {reply}")
        if isinstance(reply, Exception):
            self._bury_later(held, reason)

    def _bury_later(self, held: Held, reason: str) -> None:
        self._timers.later(f"bury {id(held)}", RETRY_SECONDS, lambda: self.bury(held, reason))

    def _send_soon(self) -> None:
        if not self._is_due:
            self._is_due = True
            self._link.loop.call_last(self.send)

    def send(self) -> None:
        """Send what is not sent, or not confirmed."""
        self._is_due = False
        if not self._link.is_open:
            return
        if not self._is_acking:
            acks, self._acks = self._acks, []
            for start in range(0, len(acks), MOST_ANSWERS):
                batch = acks[start : start + MOST_ANSWERS]
                self._is_acking = True
                self._link.run(partial(self._acked, batch), ACK, self._consumer, *batch)
        replacements, self._replacements = self._replacements, []
        for replacement in replacements:
            self._replace(replacement)
        returns, self._returns = self._returns, []
        for start in range(0, len(returns), MOST_ANSWERS):
            pairs = returns[start : start + MOST_ANSWERS]
            arguments = [argument for pair in pairs for argument in pair]
            self._link.run(partial(self._returned, pairs), GIVE_BACK, self._consumer, *arguments)
        self._on_sent()

    def _replace(self, replacement: Replacement) -> None:
        messages = replacement.messages
        try:
            missing = [pair for outgoing in messages for pair in self._declared.missing(outgoing.message.declare)]
        except PublishError:
            self.replacing.discard(replacement.tag)
            replacement.on_done(False)
            return
        for command, on_reply in missing:
            self._link.send(partial(_declared, on_reply), *command)
        arguments: list[Any] = []
        for outgoing in messages:
            due = "" if outgoing.due is None else outgoing.due
            must_have_queue = "1" if outgoing.message.mandatory else ""
            arguments += (
                due,
                outgoing.exchange,
                outgoing.routing_key,
                outgoing.step,
                must_have_queue,
                outgoing.envelope,
            )
        tag = f"{self._consumer}:{replacement.tag}"
        self._link.run(partial(self._replaced, replacement), REPLACE, tag, self._link.layout.channels, *arguments)

    def _replaced(self, replacement: Replacement, reply: Any) -> None:
        if isinstance(reply, Exception) and passes(reply):
            self._replacements.append(replacement)
            self._send_later(reply)
            return
        self.replacing.discard(replacement.tag)
        is_done = not isinstance(reply, Exception) and reply >= 0
        if not is_done:
            for outgoing in replacement.messages:
                self._declared.forget(outgoing.message.declare)
        replacement.on_done(is_done)

    def _acked(self, tags: list[int], reply: Any) -> None:
        self._is_acking = False
        if isinstance(reply, Exception):
            self._acks += tags
            self._send_later(reply)
        elif self._acks:
            self._send_soon()

    def _returned(self, pairs: list[tuple[int, int]], reply: Any) -> None:
        if isinstance(reply, Exception):
            self._returns += pairs
            self._send_later(reply)

    def _send_later(self, error: Exception) -> None:
        """Over the next connection, or when Redis takes it."""
        if isinstance(error, ReplyError):
            self._complain(str(publish_error(error, self._link.server)))
            self._timers.later("answer", RETRY_SECONDS, self.send)


def _declared(on_reply: Callable[[Any], None], reply: Any) -> None:
    """What kept a declaration away shows when its message is published."""
    if not isinstance(reply, Exception):
        on_reply(reply)

"""Publishes under way: their numbers and confirms, which may share a channel, what went wrong with each, whether it goes again.

All without I/O.

RabbitMQ numbers the publishes of a channel in confirm mode from 1, acknowledges them singly or up to a number
(`multiple`), in any order, and sends `basic.return` for an unroutable mandatory message before its ack
(https://www.rabbitmq.com/docs/confirms). A return carries the message, not its number, so it is matched by what the
two have in common: message id, exchange and routing key. Messages that share all three are routed alike.

A nack says that a message was not stored, but not why. A full queue nacks every message; but so does a channel whose queue has
lost its leader, for as long as that channel lives, while another channel publishes at once. So a message that was nacked goes
again, over another channel and then another host, for PATIENCE_SECONDS. When it is nacked even so, the caller gets the error, and
for a while further nacks for the same destination are final at once: a full queue must not cost all other messages their
connections again and again.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

from amqtask.protocol.entities import Exchange
from amqtask.protocol.message import Message

if TYPE_CHECKING:
    from amqtask.exceptions import PublishError
    from amqtask.transport.wire import PikaChannel

T = TypeVar("T")
# A message that was under way so often when a connection ended goes alone; so often alone, and it is to blame.
SUSPICIOUS_LOSSES, MOST_LOSSES = 3, 6
# The broker's code for a connection that an operator, or a node that stops, has closed
# (https://www.rabbitmq.com/amqp-0-9-1-reference#constants).
CONNECTION_FORCED = 320
# Codes with which a broker closes the connection of a client that sent invalid frames (see there).
NONSENSE = range(501, 506)
# Seconds of a publish without a deadline.
NO_DEADLINE = 365 * 86400.0
# Seconds for one message; a publish with a deadline has the time until its deadline.
PATIENCE_SECONDS = 5.0
BELIEVED_SECONDS = 10.0
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
# A queue that cannot be declared because its node is down is declared again after so many seconds.
AWAY_PAUSE = 0.5

# Bytes. How large a message may be is the operator's choice (max_message_size; 16 MiB by default on RabbitMQ 4).
LARGE_BODY = 1 << 20
# Digits; RabbitMQ takes at most 4,294,967,295 ms as an expiration.
_SAFE_DIGITS = 9
_DELIVERY_MODES = (2, 1, None)
# How many exchanges are remembered, at most.
_MOST_EXCHANGES = 1000

OnDone = Callable[["PublishError | None"], None]
Destination = tuple[str, str]


class Confirms(Generic[T]):
    """Items by publish number, in order."""

    def __init__(self) -> None:
        self._items: dict[int, T] = {}
        self._last = 0
        # Below this number nothing is outstanding; saves a search from the front at each multiple ack.
        self._first = 1

    def __len__(self) -> int:
        return len(self._items)

    @property
    def settled(self) -> int:
        """How many publishes have been acked or nacked."""
        return self._last - len(self._items)

    def published(self, item: T) -> int:
        """Note one publish; its number."""
        self._last += 1
        self._items[self._last] = item
        return self._last

    def settle(self, number: int, multiple: bool) -> list[T]:
        """The publishes that an ack or nack settles, oldest first; numbers that are not outstanding are ignored."""
        items = self._items
        if not multiple:
            item = items.pop(number, None)
            return [] if item is None else [item]
        # Number 0 with multiple means all (https://www.rabbitmq.com/amqp-0-9-1-reference#basic.ack.delivery-tag).
        end = min(number, self._last) if number else self._last
        settled = [items.pop(key) for key in range(self._first, end + 1) if key in items]
        self._first = max(self._first, end + 1)
        return settled

    def outstanding(self) -> Iterator[T]:
        """The publishes that are not settled yet, oldest first."""
        return iter(self._items.values())


class MessageIds:
    """Gives ids to messages that may come back and have none."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def complete(self, message: Message) -> None:
        """Give the message an id, if it needs one."""
        if message.mandatory and not message.properties.message_id:
            message.properties.message_id = f"{os.getpid()}-{id(self):x}-{next(self._numbers)}"


class Returns:
    """Messages that the broker returned and whose ack has not followed yet."""

    def __init__(self) -> None:
        self._waiting: Counter[tuple[str | None, str, str]] = Counter()

    def __len__(self) -> int:
        return len(self._waiting)

    def returned(self, message_id: str | None, exchange: str, routing_key: str) -> None:
        """Note a `basic.return`."""
        self._waiting[message_id, exchange, routing_key] += 1

    def claim(self, message_id: str | None, exchange: str, routing_key: str) -> bool:
        """Whether such a message came back; each return is claimed once."""
        key = (message_id, exchange, routing_key)
        count = self._waiting.get(key, 0)
        if count > 1:
            self._waiting[key] = count - 1
        elif count:
            del self._waiting[key]
        return count > 0


class Attempt:
    """A message that is not confirmed yet."""

    __slots__ = ("_give_up_at", "is_declared_anew", "losses", "message", "nacks")

    def __init__(self, message: Message) -> None:
        self.message = message
        # How often a connection ended while it was under way; and how often it was nacked.
        self.losses = 0
        self.nacks = 0
        self.is_declared_anew = False
        self._give_up_at = 0.0

    @property
    def is_suspicious(self) -> bool:
        """Whether it was under way so often when a connection ended that it should go alone."""
        return self.losses >= SUSPICIOUS_LOSSES

    @property
    def declares_queues(self) -> bool:
        """Whether a queue or binding that it declares may be gone when it is returned: exchanges alone take it to no queue."""
        return not all(isinstance(entity, Exchange) for entity in self.message.declare)

    def declares_anew(self) -> bool:
        """Whether it goes once more with all its declarations, after it was returned: its queue may have been deleted since."""
        if self.is_declared_anew or not self.message.declare:
            return False
        self.is_declared_anew = True
        return True

    def pause_after_nack(self, refusing: Refusing, now: float, give_up_at: float) -> float | None:
        """Seconds before the message, which was nacked just now, goes again; None: the nack is final.

        `give_up_at` counts when it is the first one."""
        if not self.nacks:
            self._give_up_at = give_up_at
        self.nacks += 1
        if refusing.believes(self.message, now):
            return None
        pause = pause_after(self.nacks)
        if now + pause < self._give_up_at:
            return pause
        refusing.note(self.message, now)
        return None


class Pending(Attempt):
    """A message of a worker's loop that is not confirmed yet, and who waits for that."""

    __slots__ = ("on_done",)

    def __init__(self, message: Message, on_done: OnDone) -> None:
        super().__init__(message)
        self.on_done = on_done


def destination(message: Message) -> Destination:
    """The exchange and routing key of a message."""
    return message.exchange, message.routing_key


class Refusing:
    """The destinations whose nack was final; for `seconds` a further nack is final at once."""

    def __init__(self, seconds: float = BELIEVED_SECONDS) -> None:
        self._seconds = seconds
        self._until: dict[Destination, float] = {}

    def believes(self, message: Message, now: float) -> bool:
        """Whether a nack of this message is final at once."""
        until = self._until.get(destination(message))
        if until is None:
            return False
        if until > now:
            return True
        self._until.pop(destination(message), None)
        return False

    def note(self, message: Message, now: float) -> None:
        """The message was nacked on every attempt."""
        if len(self._until) > MOST_DESTINATIONS:
            self._until.clear()
        self._until[destination(message)] = now + self._seconds


MOST_DESTINATIONS = 1000


def pause_after(nacks: int) -> float:
    """Seconds before the next attempt of a message that was nacked so often."""
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (nacks - 1))


class ConfirmingChannel(Generic[T]):
    """A channel in confirm mode, with what was published over it and is not confirmed."""

    __slots__ = ("channel", "confirms", "returns")

    def __init__(self, channel: PikaChannel) -> None:
        self.channel = channel
        self.confirms: Confirms[T] = Confirms()
        self.returns = Returns()


class Trusted:
    """Which messages share a channel with others: those for which RabbitMQ has no reason to close it.

    When it closes a channel, it drops what was sent after the offending message, and also the confirms of what was sent before,
    which it has routed already (`handle_exception` and `send_confirms` in rabbit_channel.erl, from 3.10 to 4.3). All of these
    messages go again, and some are then stored twice. So a message goes alone when it may offend by what the server checks in
    `basic.publish`: an exchange that may not exist or be forbidden, as no message to it was confirmed yet; an `expiration`,
    `user_id` or `delivery_mode`; `CC` or `BCC`; a large body.
    """

    def __init__(self) -> None:
        self._exchanges = {""}

    def covers(self, message: Message) -> bool:
        """Whether the message may go beside others. What a message of others brings may be of any type: such a one cannot be
        written, which is said when it is."""
        properties = message.properties
        return (
            isinstance(message.exchange, str)
            and message.exchange in self._exchanges
            and len(message.body) < LARGE_BODY
            and properties.user_id is None
            and properties.delivery_mode in _DELIVERY_MODES
            and _is_safe(properties.expiration)
            and "CC" not in properties.headers
            and "BCC" not in properties.headers
        )

    def note(self, message: Message) -> None:
        """The broker has confirmed the message."""
        if len(self._exchanges) > _MOST_EXCHANGES:
            self._exchanges = {""}
        self._exchanges.add(message.exchange)

    def doubt(self, message: Message) -> None:
        """The broker closed the channel for the message: its exchange may have been deleted."""
        if message.exchange:
            self._exchanges.discard(message.exchange)


def _is_safe(expiration: object) -> bool:
    if not isinstance(expiration, str):
        return expiration is None
    return expiration.isascii() and expiration.isdecimal() and len(expiration) <= _SAFE_DIGITS

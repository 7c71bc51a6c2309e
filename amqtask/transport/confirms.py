"""Outstanding publishes of one channel: numbers, acks, nacks, returns; pure bookkeeping.

RabbitMQ numbers the publishes of a channel in confirm mode from 1, acknowledges them singly or up to a number
(`multiple`), in any order, and sends `basic.return` for an unroutable mandatory message before its ack
(https://www.rabbitmq.com/docs/confirms). A return carries the message, not its number, so it is matched by what the
two have in common: message id, exchange and routing key. Messages that share all three are routed alike.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from typing import Generic, TypeVar

from amqtask.protocol.message import Message

T = TypeVar("T")


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

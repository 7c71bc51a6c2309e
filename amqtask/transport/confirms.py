"""Outstanding publishes of one channel: numbers, acks, nacks, returns; pure bookkeeping.

RabbitMQ numbers the publishes of a channel in confirm mode from 1, acknowledges them singly or up to a number
(`multiple`), in any order, and sends `basic.return` for an unroutable mandatory message before its ack
(https://www.rabbitmq.com/docs/confirms).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Confirms(Generic[T]):
    """Items by publish number, in order."""

    def __init__(self) -> None:
        self._items: dict[int, T] = {}
        self._last = 0

    def __len__(self) -> int:
        return len(self._items)

    def published(self, item: T) -> int:
        """Note one publish; its number."""
        self._last += 1
        self._items[self._last] = item
        return self._last

    def settle(self, number: int, multiple: bool) -> list[T]:
        """What an ack or nack settles, oldest first; numbers that are not outstanding are ignored."""
        if not multiple:
            item = self._items.pop(number, None)
            return [] if item is None else [item]
        settled = []
        for key in list(self._items):
            if key > number:
                break
            settled.append(self._items.pop(key))
        return settled

    def outstanding(self) -> Iterator[T]:
        """What is not settled yet, oldest first."""
        return iter(self._items.values())

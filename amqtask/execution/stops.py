"""Stops: which running requests are asked to end, in memory that the worker shares with slots that are processes."""

from __future__ import annotations

import mmap

# So many of the newest are known.
MOST = 4096
_SIZE = 8


class Stops:
    """Numbers of requests. To look costs a microsecond, and less while nobody was ever asked; a number is never used twice."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, MOST * _SIZE)
        self._next = 0

    def add(self, number: int) -> None:
        """Ask this one. In the process that made it."""
        start = self._next * _SIZE
        self._page[start : start + _SIZE] = _packed(number)
        self._next = (self._next + 1) % MOST

    def __contains__(self, number: object) -> bool:
        """Whether it was asked. In any process that was forked since."""
        if not isinstance(number, int):
            return False
        packed = _packed(number)
        found = self._page.find(packed, 0)
        while found % _SIZE and found >= 0:
            found = self._page.find(packed, found + 1)
        return found >= 0


def _packed(number: int) -> bytes:
    """Not all zeros, as what is free; numbers begin with 1."""
    return (number % 2**64).to_bytes(_SIZE, "big")

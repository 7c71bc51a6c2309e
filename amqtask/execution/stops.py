"""What a worker tells slots that are processes, in memory that it shares with them: which running requests are asked to end
(Stops), and which ids may be revoked (Perhaps).
"""

from __future__ import annotations

import mmap
import zlib

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


# Bits of a Perhaps: with 50,000 texts one in a hundred others is taken for one of them.
_BITS = 2**20


class Perhaps:
    """Texts that were added: of one that was it says so, and sometimes of another, too (a Bloom filter). Nothing is taken out."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, _BITS // 8)
        # Whether there is any.
        self._any = mmap.mmap(-1, 1)

    def add(self, text: str) -> None:
        """In the process that made it."""
        for bit in _bits_of(text):
            self._page[bit >> 3] |= 1 << (bit & 7)
        self._any[0] = 1

    def __bool__(self) -> bool:
        """Whether anything was added."""
        return bool(self._any[0])

    def __contains__(self, text: object) -> bool:
        """Whether it may have been added. In any process that was forked since."""
        if not isinstance(text, str):
            return False
        return all(self._page[bit >> 3] >> (bit & 7) & 1 for bit in _bits_of(text))


def _bits_of(text: str) -> tuple[int, int]:
    checksum = zlib.crc32(text.encode("utf-8", "surrogatepass"))
    return checksum % _BITS, (checksum * 0x9E3779B1 >> 12) % _BITS

"""A flag that forked children see, too: set in the worker's main process, read before each use in any of them."""

from __future__ import annotations

import mmap
from typing import Protocol


class Flag(Protocol):
    """On when its one byte is not 0; to read it costs an index."""

    def __getitem__(self, index: int, /) -> int: ...


OFF: Flag = b"\0"


class SharedFlag:
    """`state` is the Flag, in memory that this process shares with children that it forks from now on."""

    def __init__(self, *, is_on: bool) -> None:
        self._page = mmap.mmap(-1, 1)
        self.state: Flag = self._page
        if is_on:
            self.turn_on()

    def turn_on(self) -> None:
        self._page[0] = 1

    def turn_off(self) -> None:
        self._page[0] = 0

"""LamportClock: orders what several processes tell about each other (kombu/clocks.py), whatever their watches say."""

from __future__ import annotations

from typing import Any

# No clock comes so far by itself, and one day more would not fit into an AMQP header.
NEVER = 1 << 62


class LamportClock:
    """Counts what happens here, and never falls behind what was heard from others."""

    __slots__ = ("value",)

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def forward(self) -> int:
        """Something happened here; its time."""
        self.value += 1
        return self.value

    def adjust(self, other: Any) -> int:
        """Something was heard that carried the time `other`; what is no time is taken for none."""
        heard = other if isinstance(other, int) and other < NEVER else 0
        self.value = max(self.value, heard) + 1
        return self.value

"""LamportClock: orders what several processes tell about each other (kombu/clocks.py), whatever their watches say."""

from __future__ import annotations

# No clock comes so far by itself, and one day more would not fit into an AMQP header.
NEVER = 1 << 62


class LamportClock:
    """Counts events of this process; never less than the time that another process has sent."""

    __slots__ = ("value",)

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def forward(self) -> int:
        """Count one event of this process; returns its time."""
        self.value += 1
        return self.value

    def adjust(self, other: object) -> int:
        """Count a message of another process with the time `other` (0 if that is no time); returns its time here."""
        heard = other if isinstance(other, int) and other < NEVER else 0
        self.value = max(self.value, heard) + 1
        return self.value

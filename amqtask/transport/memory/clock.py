"""A clock that a test turns: for TTLs, expirations and delays without waiting."""

from __future__ import annotations


class ManualClock:
    """Seconds that pass when `advance` says so; give it to a MemoryBroker and to its clients' loop."""

    def __init__(self, now: float = 1_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

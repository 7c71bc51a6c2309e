"""How long a connection waits before its next attempt."""

from __future__ import annotations

from amqtask.transport.connection import Backoff


class Attempts:
    """A Backoff and its clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.backoff = Backoff(lambda: self.now)

    def connected_for(self, seconds: float) -> float:
        """The pause after a connection that lasted so long."""
        self.backoff.succeeded()
        self.now += seconds
        return self.backoff.next()


def test_while_nobody_takes_connections_pauses_grow_to_two_seconds() -> None:
    attempts = Attempts()
    pauses = [attempts.backoff.next() for _ in range(30)]

    assert pauses[0] <= 0.1
    assert 1.0 <= max(pauses) <= 2.0


def test_while_connecting_works_no_pause_is_longer_than_a_second() -> None:
    attempts = Attempts()
    for _ in range(10):
        attempts.backoff.next()

    pauses = [attempts.connected_for(0.0) for _ in range(50)]

    assert max(pauses) <= 1.0
    assert min(pauses[10:]) >= 0.4  # and who is cut at once does not come back at once


def test_a_connection_that_lasted_a_while_is_replaced_at_once() -> None:
    attempts = Attempts()

    assert max(attempts.connected_for(2.0) for _ in range(50)) <= 0.1

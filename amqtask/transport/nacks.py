"""Nacks: when a nack is final.

A nack says that a message was not stored, but not why. A full queue nacks every message; but so does a channel whose queue has
lost its leader, for as long as that channel lives, while another channel publishes at once. So a message that was nacked goes
again, over another channel and then another host, for PATIENCE seconds. When it is nacked even so, the caller gets the error, and
for a while further nacks for the same destination are final at once: a full queue must not cost all other messages their
connections again and again.
"""

from __future__ import annotations

from amqtask.protocol.message import Message

# Seconds for one message; a publish with a deadline has the time until its deadline.
PATIENCE_SECONDS = 5.0
BELIEVED_SECONDS = 10.0
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
# A queue that cannot be declared because its node is down is declared again after so many seconds.
AWAY_PAUSE = 0.5

Destination = tuple[str, str]


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

"""Nacks: when a broker's "no" is believed.

A nack says that a message was not stored, not why. A queue that is full says no to everybody; but so does a channel whose
queue has lost its leader, for as long as that channel lives, while another one publishes at once. So a message that was
refused goes again, over another channel and then another host, for PATIENCE seconds. What is refused even so is told, and
for as long the broker is believed at once where that message was to go: a full queue must not cost all others their
connections again and again.
"""

from __future__ import annotations

from amqtask.message import Message

# Seconds for one message; a publish with a deadline of its own has that.
PATIENCE_SECONDS = 5.0
BELIEVED_SECONDS = 10.0
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
# A queue that cannot be declared because its node is away is declared again so much later.
AWAY_PAUSE = 0.5

Destination = tuple[str, str]


def destination(message: Message) -> Destination:
    """Where it is to go."""
    return message.exchange, message.routing_key


class Refusing:
    """The destinations (exchange and routing key) that refused a message in earnest, and until when that is believed."""

    def __init__(self) -> None:
        self._until: dict[Destination, float] = {}

    def believes(self, message: Message, now: float) -> bool:
        """Whether another attempt is not worth it."""
        until = self._until.get(destination(message))
        if until is None:
            return False
        if until > now:
            return True
        del self._until[destination(message)]
        return False

    def note(self, message: Message, now: float) -> None:
        """It was refused whatever we tried."""
        if len(self._until) > MOST_DESTINATIONS:
            self._until.clear()
        self._until[destination(message)] = now + BELIEVED_SECONDS


MOST_DESTINATIONS = 1000


def pause_after(nacks: int) -> float:
    """Seconds before the next attempt of a message that was refused so often."""
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (nacks - 1))

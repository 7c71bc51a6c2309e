"""Attempt: one message on its way, what went wrong with it so far, and whether it goes again; for worker loop and asyncio."""

from __future__ import annotations

from amqtask.protocol.message import Message
from amqtask.transport.nacks import Refusing, pause_after

# A message that was under way so often when a connection ended goes alone; so often alone, and it is to blame.
SUSPICIOUS_LOSSES, MOST_LOSSES = 3, 6
# The broker's code for a connection that an operator, or a node that stops, has closed
# (https://www.rabbitmq.com/amqp-0-9-1-reference#constants).
CONNECTION_FORCED = 320
# Seconds of a publish without a deadline.
NO_DEADLINE = 365 * 86400.0


class Attempt:
    """A message that is not confirmed yet."""

    __slots__ = ("_give_up_at", "is_declared_anew", "losses", "message", "nacks")

    def __init__(self, message: Message) -> None:
        self.message = message
        # How often a connection ended while it was under way; and how often it was nacked.
        self.losses = 0
        self.nacks = 0
        self.is_declared_anew = False
        self._give_up_at = 0.0

    def declares_anew(self) -> bool:
        """Whether it goes once more with all its declarations, after it was returned: its queue may have been deleted since."""
        if self.is_declared_anew or not self.message.declare:
            return False
        self.is_declared_anew = True
        return True

    def pause_after_nack(self, refusing: Refusing, now: float, give_up_at: float) -> float | None:
        """Seconds before the message, which was nacked just now, goes again; None: the nack is final.

        `give_up_at` counts when it is the first one."""
        if not self.nacks:
            self._give_up_at = give_up_at
        self.nacks += 1
        if refusing.believes(self.message, now):
            return None
        pause = pause_after(self.nacks)
        if now + pause < self._give_up_at:
            return pause
        refusing.note(self.message, now)
        return None

"""Answers: what a consumer has done with its messages, on the way to Redis. All of one loop turn go together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from amqtask.transport.redis.consumed import Held, dead_letter
from amqtask.transport.redis.errors import publish_error
from amqtask.transport.redis.layout import Layout
from amqtask.transport.redis.link import Link
from amqtask.transport.redis.resp import ReplyError
from amqtask.transport.redis.scripts import ACK, BURY, GIVE_BACK, PUBLISH
from amqtask.transport.redis.timers import Timers

if TYPE_CHECKING:
    from amqtask.ground.loop import TurnLoop

# Tags of one script.
MOST_ANSWERS = 1000
# Failures of a message that was not delivered, of one that is given back without blame, and of one with it.
NEVER_CAME, NO_FAILURE, FAILURE = -1, 0, 1
# Seconds before an answer that Redis refused is sent again.
RETRY_SECONDS = 0.5


class Answers:
    """Keeps each answer until Redis has confirmed it: a script does nothing for a tag that is no longer held, so that an answer
    may come twice. `on_sent` is called after those of a turn have left."""

    def __init__(
        self,
        link: Link,
        layout: Layout,
        loop: TurnLoop,
        timers: Timers,
        consumer: str,
        *,
        on_sent: Callable[[], None],
        complain: Callable[[str], None],
    ) -> None:
        self._link = link
        self._layout = layout
        self._loop = loop
        self._timers = timers
        self._consumer = consumer
        self._on_sent = on_sent
        self._complain = complain
        self._acks: list[int] = []
        self._returns: list[tuple[int, int]] = []
        self._is_due = False

    def ack(self, tag: int) -> None:
        """It is done."""
        self._acks.append(tag)
        self._send_soon()

    def give_back(self, tag: int, failures: int) -> None:
        """It goes back to where it was."""
        self._returns.append((tag, failures))
        self._send_soon()

    def give_back_all(self, pairs: Iterable[tuple[int, int]]) -> None:
        """These too, now: tags and failures, the newest first, so that the oldest is the first again."""
        self._returns = sorted([*self._returns, *pairs], reverse=True)
        self.send()

    def bury(self, held: Held, reason: str) -> None:
        """Dead-letter it, or drop it where its queue says so."""
        letter = dead_letter(held, reason)
        if letter is None:
            if held.is_stored:
                self.ack(held.tag)
        elif self._link.is_open:
            answered = partial(self._buried, held, reason)
            if held.is_stored:
                self._link.run(answered, BURY, f"{self._consumer}:{held.tag}", *letter)
            else:
                self._link.run(answered, PUBLISH, self._layout.channels, *letter[:4])
            self._send_soon()
        else:
            self._bury_later(held, reason)

    def _buried(self, held: Held, reason: str, reply: Any) -> None:
        if isinstance(reply, Exception):
            self._bury_later(held, reason)

    def _bury_later(self, held: Held, reason: str) -> None:
        self._timers.later(f"bury {id(held)}", RETRY_SECONDS, lambda: self.bury(held, reason))

    def _send_soon(self) -> None:
        if not self._is_due:
            self._is_due = True
            self._loop.call_last(self.send)

    def send(self) -> None:
        """Send what is not sent, or not confirmed."""
        self._is_due = False
        if not self._link.is_open:
            return
        acks, self._acks = self._acks, []
        for start in range(0, len(acks), MOST_ANSWERS):
            some = acks[start : start + MOST_ANSWERS]
            self._link.run(partial(self._acked, some), ACK, self._consumer, *some)
        returns, self._returns = self._returns, []
        for start in range(0, len(returns), MOST_ANSWERS):
            pairs = returns[start : start + MOST_ANSWERS]
            words = [word for pair in pairs for word in pair]
            self._link.run(partial(self._returned, pairs), GIVE_BACK, self._consumer, *words)
        self._on_sent()

    def _acked(self, tags: list[int], reply: Any) -> None:
        if isinstance(reply, Exception):
            self._acks += tags
            self._send_later(reply)

    def _returned(self, pairs: list[tuple[int, int]], reply: Any) -> None:
        if isinstance(reply, Exception):
            self._returns += pairs
            self._send_later(reply)

    def _send_later(self, error: Exception) -> None:
        """Over the next connection, or when Redis takes it."""
        if isinstance(error, ReplyError):
            self._complain(str(publish_error(error, self._link.server)))
            self._timers.later("answer", RETRY_SECONDS, self.send)

"""Gatherer: waits until a queue holds so many messages, takes them all, and deletes it once they are dealt with.

Several processes may look at one queue; each does when it has put a message there. Whoever finds it full consumes it exclusively,
so that one of them has all of it at a time; who is refused leaves it to the other. What cannot be used yet is given
back, and the count is taken again after that: a message that came meanwhile was counted by its own publisher before
the others were back, so one of the two counts sees all of them.

A look costs one passive declare on a channel that all looks share. Looks at one queue that are asked for while one is
under way share the next. The count of a classic queue is exact (its process has every message that was confirmed).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from amqtask.message import Delivery
from amqtask.transport.connection import LoopConnection
from amqtask.transport.loop import PikaLoop
from amqtask.transport.url import BrokerAddress

OnDone = Callable[[], None]
Found = Sequence[Delivery]


@dataclass(slots=True, eq=False)
class _Look:
    """One queue that somebody has looked at. `asked` wait for the look that is under way, `again` for the one after it."""

    queue: str
    size: int
    take: Callable[[Found, OnDone], bool]
    asked: list[OnDone] = field(default_factory=list)
    again: list[OnDone] = field(default_factory=list)
    # Dealt with: all that is left is to delete it.
    is_over: bool = False


class PikaGatherer:
    """One connection, made at the first look; asks again on the next one when it is lost."""

    def __init__(
        self,
        addresses: Sequence[BrokerAddress],
        loop: PikaLoop,
        *,
        heartbeat: int | None = 60,
        connect_timeout: float = 4.0,
        client_name: str = "",
        on_warning: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._warn = on_warning
        self._connection = LoopConnection(
            addresses, loop, self, heartbeat=heartbeat, connect_timeout=connect_timeout, name=client_name
        )
        self._pika: Any = None
        self._channel: Any = None
        self._looks: dict[str, _Look] = {}
        self._line: deque[_Look] = deque()
        self._current: _Look | None = None
        self._is_stopped = False

    def gather(
        self,
        queue: str,
        size: int,
        *,
        take: Callable[[Found, OnDone], bool],
        on_done: OnDone,
    ) -> None:
        """Look whether `queue` holds `size` messages; if so offer them: `take(messages, finished)` returns False to give
        them back, else it calls `finished()` some time, which deletes the queue.

        `on_done()` follows when this queue needs nothing more from the caller: it is not full, somebody else has it, or it is
        dealt with and deleted. It does not come while the broker is away.
        """
        look = self._looks.get(queue)
        if look is not None:
            look.again.append(on_done)
            return
        look = self._looks[queue] = _Look(queue, size, take, [on_done])
        self._line.append(look)
        if not self._connection.is_running and not self._is_stopped:
            self._connection.start()
        self._next()

    def stop(self) -> None:
        """Close; what is held goes back to its queues."""
        self._is_stopped = True
        self._connection.stop()

    # -- counting

    def _next(self) -> None:
        channel = self._channel
        if self._current is not None or not self._line or channel is None or not channel.is_open:
            return
        look = self._current = self._line.popleft()
        if look.is_over:
            channel.queue_delete(look.queue, callback=lambda _: self._counted(look, 0))
        else:
            channel.queue_declare(look.queue, passive=True, callback=lambda frame: self._counted(look, _count(frame)))

    def _counted(self, look: _Look, count: int) -> None:
        if look is not self._current:
            return
        self._current = None
        if count < look.size or look.is_over:
            self._settle(look)
        else:
            _Reader(self, look, count)
        self._next()

    def _settle(self, look: _Look) -> None:
        done, look.asked, look.again = look.asked, look.again, []
        if look.asked and not look.is_over:
            self._line.append(look)
        else:
            done += look.asked
            self._looks.pop(look.queue, None)
        for on_done in done:
            on_done()
        self._next()

    def _look_again(self, look: _Look) -> None:
        """Its reader has lost its channel."""
        self._line.append(look)
        self._next()

    # -- the channel that counts

    def _open_channel(self) -> None:
        if self._pika is not None and self._pika.is_open:
            self._channel = self._pika.channel(on_open_callback=lambda _: self._next())
            self._channel.add_on_close_callback(self._on_channel_closed)

    def _on_channel_closed(self, channel: Any, error: Exception) -> None:
        if channel is not self._channel:
            return
        self._channel = None
        look, self._current = self._current, None
        if self._pika is None or not self._pika.is_open:
            if look is not None:
                self._line.appendleft(look)  # the connection is gone: again on the next
            return
        self._open_channel()
        if look is not None:
            self._settle(look)  # 404: somebody has dealt with it

    # -- the connection's events

    def on_open(self, connection: Any) -> None:
        """Look at what waits."""
        self._pika = connection
        self._open_channel()

    def on_lost(self, error: Exception) -> None:
        """Looks begin again on the next connection."""
        self._pika = self._channel = None
        if self._current is not None:
            self._line.appendleft(self._current)
            self._current = None

    def on_unreachable(self, error: Exception) -> None:
        """The consumer on the same broker says so already."""

    def on_refused(self, error: Exception) -> None:
        """Said once; nobody hears that he is done, so nothing is acknowledged."""
        self._warn(str(error))

    def on_blocked(self, reason: str | None) -> None:
        """Nothing is published here."""


class _Reader:
    """One attempt to have all of a queue, on a channel of its own."""

    def __init__(self, owner: PikaGatherer, look: _Look, count: int) -> None:
        self._owner = owner
        self._look = look
        self._expected = count
        self._found: list[Delivery] = []
        self._tag = ""
        self._is_decided = False
        self._is_completing = False
        self._is_over = False
        self._channel = owner._pika.channel(on_open_callback=self._opened)
        self._channel.add_on_close_callback(self._closed)

    # -- taking

    def _opened(self, channel: Any) -> None:
        self._consume()

    def _consume(self) -> None:
        self._is_decided = False
        self._tag = self._channel.basic_consume(self._look.queue, self._message, exclusive=True)

    def _message(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        self._found.append(
            Delivery(
                body, properties, method.exchange, method.routing_key, method.redelivered, self._look.queue,
                method.delivery_tag, 0,
            )
        )  # fmt: skip
        if len(self._found) >= self._expected and not self._is_decided:
            self._is_decided = True
            self._decide()

    def _decide(self) -> None:
        self._is_completing = True
        if not self._look.take(self._found, self._finished):
            self._is_completing = False
            self._channel.basic_cancel(self._tag, callback=self._give_back)

    def _give_back(self, _: Any) -> None:
        seen = len(self._found)
        self._found.clear()
        self._channel.basic_nack(0, multiple=True, requeue=True)
        self._channel.queue_declare(
            self._look.queue, passive=True, callback=lambda frame: self._recounted(seen, _count(frame))
        )

    def _recounted(self, seen: int, count: int) -> None:
        if count > seen:
            self._expected = count
            self._consume()
        else:
            self._end()

    def _finished(self) -> None:
        self._look.is_over = True
        self._is_completing = False
        if self._channel.is_open:
            self._channel.queue_delete(self._look.queue, callback=lambda _: self._end())
        else:
            self._owner._look_again(self._look)  # which only deletes it

    def _end(self) -> None:
        self._is_over = True
        self._channel.close()
        self._owner._settle(self._look)

    def _closed(self, channel: Any, error: Exception) -> None:
        if self._is_over or self._is_completing:
            return  # in the latter case it goes on when it has finished
        self._is_over = True
        if self._owner._pika is None or not self._owner._pika.is_open:
            self._owner._look_again(self._look)
        else:
            # 403: another has it; 404: another has dealt with it.
            self._owner._settle(self._look)


def _count(frame: Any) -> int:
    return int(frame.method.message_count)

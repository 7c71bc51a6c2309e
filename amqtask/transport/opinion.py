"""SecondOpinion: which other host answers for a queue for which the present one does not.

A quorum queue answers `basic.get` when a majority of its nodes has agreed. A node that stands still keeps such an answer from
everybody, also from those who are connected elsewhere, and may deliver to them all the same; then nothing is won by leaving.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pika

if TYPE_CHECKING:
    from amqtask.ground.loop import Loop
    from amqtask.protocol.message import PropertiesLike
    from amqtask.transport.connection import ConnectionListener, LoopConnection
    from amqtask.transport.pika_types import PikaChannel, PikaMethod
    from amqtask.transport.wire import Wire

SECONDS = 2.0
Connect = Callable[["ConnectionListener"], "LoopConnection"]


class SecondOpinion:
    """Asks other hosts at once for a message of the queue, and gives it back; `on_done(the number of the first that answered)`,
    or `on_done(None)` when none did in time."""

    def __init__(
        self, loop: Loop, connects: Sequence[Connect], queue: str, on_done: Callable[[int | None], None]
    ) -> None:
        self._on_done = on_done
        self._is_over = False
        self._timer = loop.call_later(SECONDS, lambda: self._end(None))
        self._askers = [_Asker(connect, queue, self._end, number) for number, connect in enumerate(connects)]
        for asker in self._askers:
            asker.connection.start()

    def stop(self) -> None:
        """Nobody wants to know any more."""
        self._is_over = True
        self._timer.cancel()
        for asker in self._askers:
            if asker.connection.is_running:
                asker.connection.stop()

    def _end(self, number: int | None) -> None:
        if not self._is_over:
            self.stop()
            self._on_done(number)


class _Asker:
    """The question to one host. Whatever fails, time runs out."""

    def __init__(self, connect: Connect, queue: str, answered: Callable[[int], None], number: int) -> None:
        self._queue = queue
        self._answered = answered
        self._number = number
        self.connection = connect(self)

    def on_open(self, connection: Wire) -> None:
        connection.channel(on_open_callback=self._ask)

    def _ask(self, channel: PikaChannel) -> None:
        channel.add_callback(lambda _: self._answered(self._number), [pika.spec.Basic.GetEmpty])
        channel.basic_get(self._queue, self._got)

    def _got(self, channel: PikaChannel, method: PikaMethod, properties: PropertiesLike, body: bytes) -> None:
        channel.basic_nack(method.delivery_tag, requeue=True)
        self._answered(self._number)

    def on_lost(self, error: Exception) -> None: ...

    def on_unreachable(self, error: Exception) -> None: ...

    def on_refused(self, error: Exception) -> None:
        self.connection.stop()

    def on_blocked(self, reason: str | None) -> None: ...

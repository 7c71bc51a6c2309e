"""LivenessMonitor: whether a connection on a loop still leads to a broker that answers.

A host may be gone without a close: it lost its power, a firewall dropped the connection from its table, its node stands still.
AMQP's heartbeats notice that after a minute; shorter heartbeats would end the connections of every process whose loop is busy for
that long, such as a worker that runs its tasks on the loop. So when nothing came for a second, we send
`channel.flow(active=true)`, which changes nothing and which every RabbitMQ answers at once, on a channel of its own. An idle
connection costs one such question every one and a half seconds. A silent host is left after two to three and a half seconds, so
that a worker goes on within five.

* All bytes that come count as a sign of life, not only the answer. So do bytes that leave a long send buffer, because the broker
  answers only after it has read them.
* Time is counted in turns of the loop: while this process stands still itself, the broker is not to blame.
* A broker that blocks publishing (an alarm) reads nothing, so nothing is asked.
* A broker that applies flow control because a queue cannot keep up does not answer either. It looks the same, so after each
  connection that was given up the next one is given twice the time, until one answers.
* Without another host there is nowhere to go, and giving up a node that stands still for some seconds would only requeue its
  deliveries: then the patience is longer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pika.exceptions import AMQPError

from amqtask.ground.loop import Timer, TurnLoop
from amqtask.transport.wire import Wire

if TYPE_CHECKING:
    from amqtask.transport.pika_types import PikaChannel

TICK_SECONDS = 0.8
# How long a question may stay without an answer (ticks).
PATIENCE, LONE_PATIENCE, MOST_PATIENCE = 2, 11, 75
# From so many unsent bytes on, the answer to a question is late.
LONG_LINE = 65536


class LivenessMonitor:
    """Watches one connection after the other; calls `on_silent(why)` when the present one should be given up."""

    def __init__(self, loop: TurnLoop, *, has_other_hosts: bool, on_silent: Callable[[str], None]) -> None:
        self._loop = loop
        self._on_silent = on_silent
        self._least_patience = PATIENCE if has_other_hosts else LONE_PATIENCE
        self._patience = self._least_patience
        self._connection: Any = None  # a Wire, from `begin` to `end`
        self._channel: PikaChannel | None = None
        self._timer: Timer | None = None
        self._heard = (0, 0)
        self._unsent = 0
        self._quiet = 0
        # While True nothing is asked and no connection is given up.
        self.is_suspended = False

    def begin(self, connection: Wire) -> None:
        """Watch this connection."""
        self.end()
        self._connection = connection
        self._timer = self._loop.call_later(TICK_SECONDS, self._tick)

    def end(self) -> None:
        """Stop watching."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._connection = self._channel = None
        self._quiet = 0
        self.is_suspended = False

    def _tick(self) -> None:
        self._timer = self._loop.call_later(TICK_SECONDS, self._tick)
        if not self._connection.is_open:
            return  # the connection is closing
        if self._has_moved() or self.is_suspended:
            self._quiet = 0
            return
        self._quiet += 1
        if self._quiet == 1:
            self._ask()
        elif self._quiet > self._patience:
            seconds = self._quiet * TICK_SECONDS
            self._patience = min(self._patience * 2, MOST_PATIENCE)
            self._on_silent(f"the broker has not answered for {seconds:.0f} s")

    def _has_moved(self) -> bool:
        connection = self._connection
        heard, unsent = connection.heard, connection.unsent
        has_moved = heard != self._heard or (unsent < self._unsent and self._unsent >= LONG_LINE)
        self._heard, self._unsent = heard, unsent
        return has_moved

    def _ask(self) -> None:
        channel = self._channel
        # A connection without a free channel, or one that is about to close, is not asked, but still watched.
        with contextlib.suppress(AMQPError):
            if channel is None or channel.is_closed:
                self._channel = self._connection.channel(on_open_callback=self._answered)
            elif channel.is_open:
                channel.flow(True, callback=self._answered)

    def _answered(self, _: object) -> None:
        self._patience = self._least_patience

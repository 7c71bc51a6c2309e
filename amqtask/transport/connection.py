"""One broker connection on the worker's loop: hosts in turn, backoff with jitter, for ever; closed and blocked are events.

idle ─start─► connecting ─open─► open ─lost─► waiting ─timer─► connecting …
                   └─failed─────────────────────┘        stop ─► closing ─► closed (from any state)

A host that does not answer is left for the next one (see LivenessMonitor). So is a host that closed the connection itself: it
shuts down, or refuses us. After a mere cut the same host is tried first.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pika.exceptions import AMQPError, AMQPHeartbeatTimeout, ConnectionClosedByBroker

from amqtask.ground.loop import OneTimer, Ticker, TurnLoop
from amqtask.transport.content import install
from amqtask.transport.contract import HostLeft
from amqtask.transport.errors import connection_error, refusal
from amqtask.transport.url import BrokerAddress
from amqtask.transport.wire import Wire

if TYPE_CHECKING:
    from amqtask.transport.wire import PikaChannel


TICK_SECONDS = 0.8
# How long a question may stay without an answer (ticks).
PATIENCE, LONE_PATIENCE, MOST_PATIENCE = 2, 11, 75
# From so many unsent bytes on, the answer to a question is late.
LONG_LINE = 65536
# Seconds between attempts: the longest while no host takes connections, and while hosts take them and they do not last.
FIRST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE_IF_TAKEN = 0.1, 2.0, 1.0
# A connection that lasted so long was no failed attempt.
CALM_SECONDS = 1.0
# With several hosts, the time of each in the first round after a lost connection; in later rounds each has the full time.
FIRST_ROUND_SECONDS = 2.0
# A host that was left for another one is the last choice for so long.
AVOIDED_SECONDS = 60.0
# pika has no time limit for resolving a name; an attempt that exceeds its time by so much is left behind.
OVERTIME_SECONDS = 1.0


class LivenessMonitor:
    """Watches one connection after the other; calls `on_silent(why)` when the present one should be given up.

    A host may be gone without a close: it lost its power, a firewall dropped the connection from its table, its node stands
    still. AMQP's heartbeats notice that after a minute; shorter heartbeats would end the connections of every process whose
    loop is busy for that long, such as a worker that runs its tasks on the loop. So when nothing came for a second, we send
    `channel.flow(active=true)`, which changes nothing and which every RabbitMQ answers at once, on a channel of its own. An
    idle connection costs one such question every one and a half seconds. A silent host is left after two to three and a half
    seconds, so that a worker goes on within five.

    * All bytes that come count as a sign of life, not only the answer. So do bytes that leave a long send buffer, because the
      broker answers only after it has read them.
    * Time is counted in turns of the loop: while this process stands still itself, the broker is not to blame.
    * A broker that blocks publishing (an alarm) reads nothing, so nothing is asked.
    * A broker that applies flow control because a queue cannot keep up does not answer either. It looks the same, so after each
      connection that was given up the next one is given twice the time, until one answers.
    * Without another host there is nowhere to go, and giving up a node that stands still for some seconds would only requeue its
      deliveries: then the patience is longer.
    """

    def __init__(self, loop: TurnLoop, *, has_other_hosts: bool, on_silent: Callable[[str], None]) -> None:
        self._on_silent = on_silent
        self._least_patience = PATIENCE if has_other_hosts else LONE_PATIENCE
        self._patience = self._least_patience
        self._connection: Any = None  # a Wire, from `begin` to `end`
        self._channel: PikaChannel | None = None
        self._ticker = Ticker(loop, TICK_SECONDS, self._tick)
        self._heard = (0, 0)
        self._unsent = 0
        self._quiet = 0
        # While True nothing is asked and no connection is given up.
        self.is_suspended = False

    def begin(self, connection: Wire) -> None:
        """Watch this connection."""
        self.end()
        self._connection = connection
        self._ticker.start()

    def end(self) -> None:
        """Stop watching."""
        self._ticker.stop()
        self._connection = self._channel = None
        self._quiet = 0
        self.is_suspended = False

    def _tick(self) -> None:
        if not self._connection.is_open:
            return  # the connection is closing
        if self._has_moved() or self.is_suspended:
            self._quiet = 0
            if self._patience > self._least_patience and not self.is_suspended:
                self._ask()  # a busy connection, too, shows that it answers
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


class Backoff:
    """Pauses that double from FIRST_PAUSE seconds on, with jitter; they start again after a connection that lasted."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pause = FIRST_PAUSE
        self._well_since: float | None = None

    def succeeded(self) -> None:
        """An attempt succeeded; `next` looks whether it lasted."""
        self._well_since = self._clock()

    def next(self) -> float:
        """How long to wait before the next attempt."""
        since, self._well_since = self._well_since, None
        if since is not None:
            is_calm = self._clock() - since > CALM_SECONDS
            self._pause = FIRST_PAUSE if is_calm else min(self._pause, LONGEST_PAUSE_IF_TAKEN)
        pause, self._pause = self._pause, min(self._pause * 2, LONGEST_PAUSE)
        return pause * random.uniform(0.5, 1.0)


class ConnectionListener(Protocol):
    """A user of a LoopConnection, with the methods that it calls. Who derives from this may leave out those that mean nothing to
    it."""

    def on_open(self, connection: Wire) -> None: ...

    def on_lost(self, error: Exception) -> None:
        """An open connection is gone; another attempt follows by itself."""
        return

    def on_unreachable(self, error: Exception) -> None:
        """No host of a whole round could be reached; another round follows by itself."""
        return

    def on_refused(self, error: Exception) -> None:
        """The broker refused the login or the virtual host, and never accepted it before. Another attempt follows unless
        the users stop. (A broker that accepted us before may refuse for a while only: it may be importing its users, or its
        user directory may be down.)"""

    def on_blocked(self, reason: str | None) -> None:
        """The broker blocks publishing (an alarm), or does not any more (None)."""
        return


class LeftHost(AMQPHeartbeatTimeout, HostLeft):  # type: ignore[misc]  # pika is not typed
    """We closed the connection to a host that answers, for another one."""


class FellSilent(AMQPHeartbeatTimeout, TimeoutError):  # type: ignore[misc]  # pika is not typed
    """We gave up a connection that the broker may still take for alive."""


class LoopConnection:
    """Keeps one connection open while it has users. Events reach the users in the order in which they joined."""

    def __init__(
        self,
        addresses: Sequence[BrokerAddress],
        loop: TurnLoop,
        *,
        heartbeat: int | None = 60,
        connect_timeout: float = 4.0,
        name: str = "",
    ) -> None:
        install()
        self._addresses = tuple(addresses)
        self.loop = loop
        self._heartbeat = heartbeat
        self._connect_timeout = connect_timeout
        self.name = name
        self.users: list[ConnectionUse] = []
        self._next = 0
        # Hosts that were left for others (their positions), and until when they are avoided.
        self._avoided: dict[int, float] = {}
        # How many attempts have failed since a connection was open.
        self._failures = 0
        self._backoff = Backoff()
        self._liveness = LivenessMonitor(loop, has_other_hosts=len(self._addresses) > 1, on_silent=self._give_up)
        self._connection: Any = None
        self.is_open = False
        self._was_open = False
        self._timer, self._overtime = OneTimer(loop), OneTimer(loop)
        self._is_running = False
        self._on_stopped: list[Callable[[], None]] = []

    def join(self, listener: ConnectionListener) -> ConnectionUse:
        """Add a user."""
        use = ConnectionUse(self, listener)
        self.users.append(use)
        return use

    @property
    def host(self) -> str:
        """The URL, without password, of the host that it is connected to; empty while it is not."""
        return self._address.safe_url if self.is_open else ""

    @property
    def hosts(self) -> int:
        """How many hosts there are to go to."""
        return len(self._addresses)

    def start(self, use: ConnectionUse) -> None:
        """A user wants the connection: connect, unless that is under way or done."""
        if use not in self.users:
            self.users.append(use)
        if self.is_open and self._connection.is_open:
            self.loop.call_soon(lambda: self._welcome(use))
        elif not self._is_running:
            self._is_running = True
            self._connect()

    def _welcome(self, use: ConnectionUse) -> None:
        if use.is_running and self.is_open and self._connection.is_open:
            use.listener.on_open(self._connection)

    def stop(self, use: ConnectionUse, on_stopped: Callable[[], None] | None) -> None:
        """A user does not need it any more. After the last one it is closed, flushing what was written; `on_stopped` follows."""
        if use in self.users:
            self.users.remove(use)
        connection = self._connection
        if self._listeners:
            connection = None
        else:
            self._is_running = False
            self._liveness.end()
            self._forget_timers()
        if on_stopped is not None:
            if connection is not None and (connection.is_open or connection.is_closing):
                self._on_stopped.append(on_stopped)
            else:
                self.loop.call_soon(on_stopped)
        if connection is not None:
            connection.end()

    @property
    def _listeners(self) -> list[ConnectionListener]:
        return [use.listener for use in self.users if use.is_running]

    def elsewhere(self, steps: int, listener: ConnectionListener) -> ConnectionUse:
        """Another connection, to the host that is so many steps further on; not started."""
        other = LoopConnection(
            [self._addresses[(self._next + steps) % self.hosts]],
            self.loop,
            heartbeat=self._heartbeat,
            connect_timeout=self._connect_timeout,
            name=self.name,
        )
        return other.join(listener)

    def leave(self, reason: str, *, steps: int = 0) -> None:
        """Treat this connection as lost, for all its users, and go on with the next host, or the one that is so many steps on."""
        if self.is_open:
            self._avoided[self._next % self.hosts] = time.monotonic() + AVOIDED_SECONDS
            if steps:
                self._avoided.pop((self._next + steps) % self.hosts, None)
                self._next += steps - 1  # one more follows, as after each silence
            self._connection.give_up(LeftHost(reason))

    def go_to(self, host: str, reason: str) -> None:
        """Leave for the host with this URL, with all users, if it is one of ours and not the present one."""
        for steps in range(1, self.hosts):
            if self._addresses[(self._next + steps) % self.hosts].safe_url == host:
                self.leave(reason, steps=steps)
                return

    def _give_up(self, reason: str) -> None:
        self._connection.give_up(FellSilent(reason))

    # -- connecting

    @property
    def _address(self) -> BrokerAddress:
        return self._addresses[self._next % len(self._addresses)]

    def _connect(self) -> None:
        if not self._is_running:
            return
        seconds = self._connect_timeout
        if self.hosts > 1 and self._failures < len(self._addresses):
            seconds = min(seconds, FIRST_ROUND_SECONDS)
        parameters = self._address.parameters(heartbeat=self._heartbeat, connect_timeout=seconds, name=self.name)
        self._connection = connection = self._address.wire(
            self.loop, parameters, self._opened, self._failed, self._closed
        )
        connection.add_on_connection_blocked_callback(
            lambda _, frame: self._blocked(frame.method.reason or "no reason given")
        )
        connection.add_on_connection_unblocked_callback(lambda _, __: self._blocked(None))
        self._overtime.set(seconds + OVERTIME_SECONDS, lambda: self._took_too_long(connection, seconds))

    def _took_too_long(self, connection: Wire, seconds: float) -> None:
        self._failed(connection, TimeoutError(f"it did not answer within {seconds:g} s"))
        connection.end()

    def _blocked(self, reason: str | None) -> None:
        self._liveness.is_suspended = reason is not None
        for listener in self._listeners:
            listener.on_blocked(reason)

    def _opened(self, connection: Wire) -> None:
        if connection is not self._connection or not self._is_running:
            connection.end()
            return
        self._forget_timers()
        self.is_open = self._was_open = True
        self._failures = 0
        self._backoff.succeeded()
        self._liveness.begin(connection)
        for listener in self._listeners:
            listener.on_open(connection)

    def _failed(self, connection: Wire, error: Exception) -> None:
        if connection is not self._connection:
            return
        self._connection = None
        self._forget_timers()
        if not self._is_running:
            return
        refused = refusal(error) is not None
        if not refused:
            connection.avoid()
        tried = [self._address] if refused else self._addresses
        self._step()
        self._failures += 1
        is_round = self._failures % len(self._addresses) == 0
        for listener in self._listeners:
            if refused and not self._was_open:
                listener.on_refused(connection_error(error, tried))
            elif is_round:
                listener.on_unreachable(connection_error(error, tried))
        self._connect_later(self._backoff.next() if is_round else 0)

    def _closed(self, connection: Wire, error: Exception) -> None:
        if connection is not self._connection:
            return
        self.is_open = False
        self._connection = None
        self._liveness.end()
        if isinstance(error, (AMQPHeartbeatTimeout, ConnectionClosedByBroker)):
            self._step()
        on_stopped, self._on_stopped = self._on_stopped, []
        for callback in on_stopped:
            callback()
        if self._is_running:
            for listener in self._listeners:
                listener.on_lost(error)
            self._connect_later(self._backoff.next())

    def _step(self) -> None:
        """To the next host that is not avoided; to the next one when all are."""
        now = time.monotonic()
        good = (k for k in range(1, self.hosts) if self._avoided.get((self._next + k) % self.hosts, 0.0) < now)
        self._next += next(good, 1)

    def _connect_later(self, pause: float) -> None:
        if self._is_running and not self._timer.is_set:
            self._timer.set(pause, self._connect)

    def _forget_timers(self) -> None:
        self._timer.cancel()
        self._overtime.cancel()


class ConnectionUse:
    """One user's end of a connection."""

    def __init__(self, connection: LoopConnection, listener: ConnectionListener) -> None:
        self.listener = listener
        self._connection = connection
        # Whether it was started and not stopped.
        self.is_running = False

    @property
    def is_open(self) -> bool:
        """Whether the connection is open and used from here."""
        return self.is_running and self._connection.is_open

    @property
    def has_other_hosts(self) -> bool:
        """Whether this user may go to another host: no user takes the connection from another one."""
        return self._connection.hosts > 1 and len(self._connection.users) == 1

    def start(self) -> None:
        """Connect, unless that is under way or done."""
        if not self.is_running:
            self.is_running = True
            self._connection.start(self)

    def stop(self, on_stopped: Callable[[], None] | None = None) -> None:
        """Stop using the connection; `on_stopped` follows, after the close if this was the last user."""
        self.is_running = False
        self._connection.stop(self, on_stopped)

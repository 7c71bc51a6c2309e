"""One connection for a consumer and a publisher: when one loses it, the other has lost it, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from amqtask.ground.loop import TurnLoop
from amqtask.transport.connection import ConnectionListener, LoopConnection
from amqtask.transport.url import BrokerAddress

if TYPE_CHECKING:
    from amqtask.transport.wire import Wire


class SharedConnection:
    """Keeps one connection open while it has users; each user sees it as a LoopConnection of its own.

    Events reach the users in the order in which they joined.
    """

    def __init__(
        self,
        addresses: Sequence[BrokerAddress],
        loop: TurnLoop,
        *,
        heartbeat: int | None,
        connect_timeout: float,
        name: str,
    ) -> None:
        self._loop = loop
        self._connection = LoopConnection(
            addresses, loop, self, heartbeat=heartbeat, connect_timeout=connect_timeout, name=name
        )
        self._pika: Wire | None = None
        self._users: list[ConnectionUse] = []

    def join(self, listener: ConnectionListener) -> ConnectionUse:
        """Add a user."""
        use = ConnectionUse(self, listener)
        self._users.append(use)
        return use

    @property
    def is_open(self) -> bool:
        """Whether the connection is open."""
        return self._connection.is_open

    @property
    def host(self) -> str:
        """The URL, without password, of the host that it is connected to; empty while it is not."""
        return self._connection.host

    @property
    def hosts(self) -> int:
        """How many hosts there are to go to."""
        return self._connection.hosts

    def elsewhere(self, steps: int, listener: ConnectionListener) -> LoopConnection:
        """A connection to the host that is so many steps further on; not started."""
        return self._connection.elsewhere(steps, listener)

    def leave(self, reason: str, *, steps: int = 0) -> None:
        """Treat the connection as lost, and go on with the next host, or the one that is so many steps further on."""
        self._connection.leave(reason, steps=steps)

    def go_to(self, host: str, reason: str) -> None:
        """Leave for the host with this URL."""
        self._connection.go_to(host, reason)

    def started(self, use: ConnectionUse) -> None:
        """A user wants the connection."""
        if self._pika is not None and self._pika.is_open:
            self._loop.call_soon(lambda: self._welcome(use))
        else:
            self._connection.start()

    def stopped(self, on_stopped: Callable[[], None] | None) -> None:
        """A user does not need the connection any more; the last one closes it."""
        if not any(use.is_running for use in self._users):
            self._connection.stop(on_stopped)
        elif on_stopped is not None:
            self._loop.call_soon(on_stopped)

    def _welcome(self, use: ConnectionUse) -> None:
        if use.is_running and self._pika is not None and self._pika.is_open:
            use.listener.on_open(self._pika)

    @property
    def _listeners(self) -> list[ConnectionListener]:
        return [use.listener for use in self._users if use.is_running]

    # -- the connection's events

    def on_open(self, connection: Wire) -> None:
        """To all users."""
        self._pika = connection
        for listener in self._listeners:
            listener.on_open(connection)

    def on_lost(self, error: Exception) -> None:
        """To all users."""
        self._pika = None
        for listener in self._listeners:
            listener.on_lost(error)

    def on_unreachable(self, error: Exception) -> None:
        """To all users."""
        for listener in self._listeners:
            listener.on_unreachable(error)

    def on_refused(self, error: Exception) -> None:
        """To all users."""
        for listener in self._listeners:
            listener.on_refused(error)

    def on_blocked(self, reason: str | None) -> None:
        """To all users."""
        for listener in self._listeners:
            listener.on_blocked(reason)


class ConnectionUse:
    """One user's end of a shared connection: what a LoopConnection offers its owner."""

    def __init__(self, shared: SharedConnection, listener: ConnectionListener) -> None:
        self.listener = listener
        self._shared = shared
        self._is_running = False

    @property
    def is_open(self) -> bool:
        """Whether the connection is open and used from here."""
        return self._is_running and self._shared.is_open

    @property
    def host(self) -> str:
        """The URL, without password, of the host that it is connected to; empty while it is not."""
        return self._shared.host

    @property
    def is_running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._is_running

    @property
    def hosts(self) -> int:
        """How many hosts there are to go to."""
        return self._shared.hosts

    @property
    def has_other_hosts(self) -> bool:
        """Always False: one user does not take the connection from the other."""
        return False

    def elsewhere(self, steps: int, listener: ConnectionListener) -> LoopConnection:
        """A connection to the host that is so many steps further on; not started."""
        return self._shared.elsewhere(steps, listener)

    def leave(self, reason: str, *, steps: int = 0) -> None:
        """Treat the connection as lost, for all its users."""
        self._shared.leave(reason, steps=steps)

    def go_to(self, host: str, reason: str) -> None:
        """Leave for the host with this URL, with all its users."""
        self._shared.go_to(host, reason)

    def start(self) -> None:
        """Connect, unless that is under way or done."""
        if not self._is_running:
            self._is_running = True
            self._shared.started(self)

    def stop(self, on_stopped: Callable[[], None] | None = None) -> None:
        """Stop using the connection; `on_stopped` follows, after the close if this was the last user."""
        self._is_running = False
        self._shared.stopped(on_stopped)

"""Link: a Redis on a worker's loop, for ever: finds the master, logs in, loads the scripts, and connects again after a loss."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from amqtask.ground.loop import OneTimer
from amqtask.transport.connection import Backoff
from amqtask.transport.redis.layout import Layout
from amqtask.transport.redis.publishing import publish_error
from amqtask.transport.redis.scripts import ALL, Script
from amqtask.transport.redis.wire import Argument, OnReply, Push, ReplyError, Wire, ignore_reply

if TYPE_CHECKING:
    from amqtask.exceptions import PublishError
    from amqtask.ground.loop import TurnLoop
    from amqtask.transport.redis.wire import Place, Way


class Timers:
    """After `stop` none runs any more."""

    def __init__(self, loop: TurnLoop) -> None:
        self._timers: defaultdict[str, OneTimer] = defaultdict(lambda: OneTimer(loop))

    def later(self, name: str, seconds: float, call: Callable[[], None]) -> None:
        """Call after so many seconds."""
        self._timers[name].set(seconds, call)

    def stop(self) -> None:
        """Cancel all."""
        for timer in self._timers.values():
            timer.cancel()


# How often to look whether Redis still answers, and after how many looks without an answer it is left (seconds, looks).
LOOK_SECONDS, MOST_LOOKS = 5.0, 4


class LinkOwner(Protocol):
    """What a Link calls, on the loop. Who derives from this may leave out what means nothing to it."""

    def on_open(self) -> None:
        """Connected, logged in."""

    def on_lost(self, error: Exception) -> None:
        """An open connection is gone; another attempt follows by itself."""
        return

    def on_unreachable(self, error: PublishError) -> None:
        """An attempt failed; another follows by itself. AccessRefused: the login was refused."""

    def on_push(self, push: Push) -> None:
        """What Redis says unasked."""
        return


# Makes the Link of an owner, to a server on a loop.
Connect = Callable[[LinkOwner], "Link"]


class Link:
    """Commands may be sent while it `is_open`; a callback gets a reply, a ReplyError, or a ConnectionError for no reply."""

    def __init__(
        self, way: Way, layout: Layout, loop: TurnLoop, owner: LinkOwner, *, name: str, connect_timeout: float
    ) -> None:
        self._way = way
        self.layout = layout
        self.loop = loop
        self._owner = owner
        self._name = name
        self._timeout = connect_timeout
        # Those that are asked for the server; the next one is the first.
        self._guides = deque(way.guides)
        self._backoff = Backoff()
        self._wire: Wire | None = None
        self._timer, self._watch = OneTimer(loop), OneTimer(loop)
        self._looks = 0
        self._is_running = self.is_open = False
        self.server = way.name

    # -- commands

    def send(self, on_reply: OnReply, *arguments: Argument) -> None:
        """A command."""
        assert self._wire is not None, "not open"
        self._wire.send(on_reply, *arguments)

    def run(self, on_reply: OnReply, script: Script, *arguments: Argument) -> None:
        """A script."""

        def replied(reply: Any) -> None:
            if isinstance(reply, ReplyError) and reply.code == "NOSCRIPT" and self.is_open:
                self.send(on_reply, "EVAL", script.source, 1, self.layout.prefix, *arguments)
            else:
                on_reply(reply)

        self.send(replied, "EVALSHA", script.sha, 1, self.layout.prefix, *arguments)

    # -- connecting

    def start(self) -> None:
        """Connect, unless that is under way or done."""
        if not self._is_running:
            self._is_running = True
            self._connect()

    def stop(self, on_stopped: Callable[[], None] | None = None) -> None:
        """Close once all commands are answered; `on_stopped` follows."""
        wire, was_open = self._wire, self.is_open
        self._is_running = self.is_open = False
        self._timer.cancel()
        self._watch.cancel()
        if wire is not None and was_open:
            # Redis may not answer any more.
            overtime = self.loop.call_later(self._timeout, wire.drain_no_longer)

            def drained() -> None:
                overtime.cancel()
                if on_stopped is not None:
                    on_stopped()

            wire.drain(drained)
            return
        if wire is not None:
            wire.close()
        if on_stopped is not None:
            self.loop.call_soon(on_stopped)

    def _connect(self) -> None:
        if not self._is_running:
            return
        if self._guides:
            self._guides.rotate(-1)
            self._ask(self._guides[-1])
        else:
            self._connect_to(self._way.server)

    def _ask(self, guide: Place) -> None:
        def opened() -> None:
            if guide.password:
                wire.send(ignore_reply, *_auth(guide))
            wire.send(answered, *self._way.question)

        def answered(reply: Any) -> None:
            if isinstance(reply, ConnectionError):
                return  # `_failed` is called
            wire.close()
            server, guides = self._way.directions(reply, guide)
            self._guides += (place for place in dict.fromkeys(guides) if place not in self._guides)
            if server is None:
                self._failed(ConnectionError(f"{guide.name} does not know {self._way.name}: {reply}"))
            else:
                self.server = server.name
                self._connect_to(server)

        wire = self._wire = Wire(self.loop, guide, on_open=opened, on_end=self._failed)
        wire.open(self._timeout)

    def _connect_to(self, place: Place) -> None:
        wire = self._wire = Wire(
            self.loop,
            place,
            on_open=lambda: self._log_in(wire, place),
            on_end=self._ended,
            on_push=self._owner.on_push,
        )
        wire.open(self._timeout)

    def _log_in(self, wire: Wire, place: Place) -> None:
        def check(reply: Any) -> None:
            if isinstance(reply, ReplyError) and self._wire is wire and not self.is_open:
                wire.close()
                self._failed(reply)

        def ready(reply: Any) -> None:
            check(reply)
            if isinstance(reply, (ReplyError, ConnectionError)) or self._wire is not wire or not self._is_running:
                return
            self.is_open = True
            self._backoff.succeeded()
            self._looks = 0
            self._look_later()
            self._owner.on_open()

        login = ["AUTH", place.user or "default", place.password] if place.password or place.user else []
        wire.send(check, "HELLO", 3, *login)
        name = "".join(letter if "!" <= letter <= "~" else "_" for letter in self._name)
        wire.send(ignore_reply, "CLIENT", "SETNAME", name)
        for script in ALL:
            wire.send(ignore_reply, "SCRIPT", "LOAD", script.source)
        wire.send(ready, "SELECT", place.db)

    # -- losses

    def _ended(self, error: Exception) -> None:
        if self.is_open:
            self.is_open = False
            self._watch.cancel()
            self._connect_later(self._backoff.next())
            self._owner.on_lost(error)
        else:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        if not self._is_running:
            return
        self._wire = None
        self._connect_later(self._backoff.next())
        self._owner.on_unreachable(publish_error(error, self.server))

    def _connect_later(self, pause: float) -> None:
        if self._is_running and not self._timer.is_set:
            self._timer.set(pause, self._connect)

    # -- silence

    def _look_later(self) -> None:
        self._watch.set(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        wire = self._wire
        if wire is None or not self.is_open:
            return
        self._looks = self._looks + 1 if wire.is_silent() else 0
        if self._looks >= MOST_LOOKS:
            wire.give_up(TimeoutError(f"Redis has not answered for {LOOK_SECONDS * MOST_LOOKS:g} s"))
            return
        if not wire.unanswered:
            self.send(ignore_reply, "PING")
        self._look_later()


def _auth(place: Place) -> tuple[Argument, ...]:
    return ("AUTH", place.user, place.password) if place.user else ("AUTH", place.password)

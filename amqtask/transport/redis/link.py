"""A Redis on a worker's loop, for ever. Link finds the master, logs in, loads the scripts, and connects again after a loss;
RedisLoopPublisher publishes over one, and keeps over a loss what Redis has not confirmed.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from amqtask.exceptions import PublishError
from amqtask.ground.loop import OneTimer
from amqtask.transport.confirms import OnDone, Pending
from amqtask.transport.connection import Backoff
from amqtask.transport.redis.layout import Layout
from amqtask.transport.redis.publishing import (
    Declared,
    lacks_queue,
    passes,
    prepare,
    publish_error,
    publishing,
    verdict,
)
from amqtask.transport.redis.scripts import ALL, PUBLISH, Script
from amqtask.transport.redis.wire import Argument, OnReply, Push, ReplyError, Wire, ignore_reply

if TYPE_CHECKING:
    from amqtask.ground.loop import TurnLoop
    from amqtask.protocol.message import Message
    from amqtask.transport.redis.layout import Outgoing
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


# -- publishing

# Seconds before a message that Redis does not take now (its memory is full …) is sent again.
RETRY_SECONDS = 0.5


class _Pending(Pending):
    """A message without its answer."""

    __slots__ = ("is_under_way", "leaving", "obstacle")

    def __init__(self, leaving: Outgoing, on_done: OnDone) -> None:
        super().__init__(leaving.message, on_done)
        self.leaving = leaving
        self.is_under_way = False
        self.obstacle: Exception | None = None


class RedisLoopPublisher(LinkOwner):
    """See amqtask.transport.contract.LoopPublisher; connects at `start` or at the first publish."""

    def __init__(
        self,
        connect: Connect,
        *,
        on_warning: Callable[[str], None],
        sole_right: Callable[[], tuple[str, str] | None] = lambda: None,
    ) -> None:
        self._link = connect(self)
        self._layout, self._loop = self._link.layout, self._link.loop
        self._warn = on_warning
        # As one that leads: publish only while it does.
        self._sole_right = sole_right
        self._declared = Declared(self._layout, on_warning)
        self._numbers = itertools.count()
        self._pending: dict[int, _Pending] = {}
        self._unwritable = 0
        self._retry = OneTimer(self._loop)
        self._is_stopped = False
        # The last warning of a Redis that cannot be reached: one is enough while that is so.
        self._complaint = ""

    @property
    def outstanding(self) -> int:
        """How many messages still wait for their answer."""
        return len(self._pending) + self._unwritable

    @property
    def host(self) -> str:
        """No chord asks: Redis counts their parts."""
        return ""

    def go_to(self, host: str, reason: str) -> None:
        """Nothing: there is one server at a time."""

    @property
    def oldest(self) -> Message | None:
        """The message that waits longest, while Redis could take it."""
        if not self._pending or not self._link.is_open or self._retry.is_set:
            return None
        return next(iter(self._pending.values())).message

    def start(self) -> None:
        """Connect."""
        self._is_stopped = False
        self._link.start()

    def publish(self, message: Message, on_done: OnDone) -> None:
        """Publish in this turn, or once there is a connection; `on_done` comes in a later turn."""
        leaving = prepare(message)
        if isinstance(leaving, PublishError):
            self._unwritable += 1
            self._loop.call_soon(partial(self._refused, leaving, on_done))
            return
        number = next(self._numbers)
        self._pending[number] = _Pending(leaving, on_done)
        self._link.start()
        if self._link.is_open and not self._retry.is_set:
            self._send(number)

    def _refused(self, error: PublishError, on_done: OnDone) -> None:
        self._unwritable -= 1
        if not self._is_stopped:
            on_done(error)

    def stop(self) -> None:
        """Close once what was sent is answered; callbacks are not called any more."""
        self._is_stopped = True
        self._retry.cancel()
        self._link.stop()

    # -- sending

    def _send(self, number: int) -> None:
        pending = self._pending[number]
        try:
            missing = self._declared.missing(pending.message.declare)
        except PublishError as error:
            self._loop.call_soon(partial(self._done, number, error))
            return
        for command, on_reply in missing:
            self._link.send(partial(self._declared_one, pending, on_reply), *command)
        pending.is_under_way = True
        script, arguments = publishing(self._layout, pending.leaving)
        if script is PUBLISH:
            arguments += self._sole_right() or ()
        self._link.run(partial(self._answered, number), script, *arguments)

    def _declared_one(self, pending: _Pending, on_reply: Callable[[Any], None], reply: Any) -> None:
        if isinstance(reply, Exception):
            pending.obstacle = reply
        else:
            on_reply(reply)

    def _answered(self, number: int, reply: Any) -> None:
        pending = self._pending.get(number)
        if pending is None or self._is_stopped:
            return
        pending.is_under_way = False
        # Without its declarations a message has no queue: what kept them away is the reason.
        reply, pending.obstacle = pending.obstacle or reply, None
        if isinstance(reply, ConnectionError):
            return  # it is sent again over the next connection
        if isinstance(reply, Exception):
            self._declared.forget(pending.message.declare)
            error = publish_error(reply, self._link.server)
            if passes(reply):
                self._try_later(error)
            else:
                self._done(number, error)
            return
        failure = verdict(int(reply), pending.message)
        if failure is not None and lacks_queue(int(reply)) and pending.declares_anew():
            self._declared.forget(pending.message.declare)
            self._send(number)
            return
        self._done(number, failure)

    def _done(self, number: int, error: PublishError | None) -> None:
        pending = self._pending.pop(number, None)
        if pending is not None and not self._is_stopped:
            pending.on_done(error)

    def _try_later(self, error: PublishError) -> None:
        if not self._retry.is_set:
            self._warn(f"{error}. Messages wait and are sent again.")
            self._retry.set(RETRY_SECONDS, self._send_again)

    def _send_again(self) -> None:
        self._retry.cancel()  # a new connection, too, brings us here
        if self._link.is_open:
            for number, pending in list(self._pending.items()):
                if not pending.is_under_way:
                    self._send(number)

    # -- the link's events

    def on_open(self) -> None:
        """Send what has no answer, in order."""
        self._complaint = ""
        self._declared.forget_all()
        self._send_again()

    def on_unreachable(self, error: PublishError) -> None:
        """Another attempt follows."""
        if self._pending and self._complaint != str(error):
            self._complaint = str(error)
            self._warn(f"{error} Trying again.")

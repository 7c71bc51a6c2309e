"""RedisLoopPublisher: publishes from a worker's loop, and keeps what Redis has not confirmed over a lost connection."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import PublishError
from amqtask.ground.loop import OneTimer
from amqtask.transport.confirms import OnDone, Pending
from amqtask.transport.redis.link import Connect, LinkOwner
from amqtask.transport.redis.publishing import (
    Declared,
    lacks_queue,
    passes,
    prepare,
    publish_error,
    publishing,
    verdict,
)
from amqtask.transport.redis.scripts import PUBLISH

if TYPE_CHECKING:
    from amqtask.protocol.message import Message
    from amqtask.transport.redis.layout import Outgoing

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
        self._unwritable = self._answers = 0
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

    @property
    def answers(self) -> int:
        """How many publishes Redis has answered."""
        return self._answers

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
        self._answers += 1
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

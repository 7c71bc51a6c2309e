"""Publishing without I/O: a burst of messages as commands, what the replies mean, and Redis' errors as ours."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import redis

from amqtask.exceptions import (
    AccessRefused,
    AmqTaskError,
    BrokerUnreachable,
    ConnectionBlocked,
    PublishError,
    PublishRefused,
    PublishTimeout,
    Unroutable,
)
from amqtask.ground.printable import clause
from amqtask.protocol.entities import Declaration
from amqtask.transport.redis.layout import Command, Layout, Outgoing, outgoing
from amqtask.transport.redis.scripts import POSTPONE, PUBLISH, Script
from amqtask.transport.redis.wire import ReplyError, ignore_reply

if TYPE_CHECKING:
    from amqtask.protocol.message import Message


# Codes with which trying again does not help.
_REFUSED = frozenset({"NOAUTH", "WRONGPASS", "NOPERM"})
# What it answers to SELECT of a database that it does not have (src/db.c).
NO_DATABASE = "DB index is out of range"
# Codes of a state that passes: it starts, it is full, it became a replica, its disk is full, a script keeps it busy, a cluster
# moves its keys.
_PASSING = frozenset({"LOADING", "OOM", "READONLY", "MASTERDOWN", "MISCONF", "BUSY", "NOREPLICAS", "CLUSTERDOWN",
                       "ASK", "TRYAGAIN"})  # fmt: skip


def reply_error(error: Exception) -> ReplyError | None:
    """The error that Redis answered; None for another one. redis-py takes the codes of some of them off."""
    if isinstance(error, ReplyError):
        return error
    if isinstance(error, redis.AuthenticationError):
        return ReplyError(str(error) if str(error).startswith(tuple(_REFUSED)) else f"NOAUTH {error}")
    for error_class, code in _CODES.items():
        if isinstance(error, error_class):
            return ReplyError(f"{code} {error}")
    if isinstance(error, redis.ResponseError):
        return ReplyError(str(error))
    return None


_CODES: dict[type[Exception], str] = {
    redis.exceptions.BusyLoadingError: "LOADING",
    redis.exceptions.ReadOnlyError: "READONLY",
    redis.exceptions.OutOfMemoryError: "OOM",
    redis.exceptions.NoPermissionError: "NOPERM",
    redis.exceptions.NoScriptError: "NOSCRIPT",
    redis.exceptions.ClusterDownError: "CLUSTERDOWN",
    redis.exceptions.AskError: "ASK",
    redis.exceptions.TryAgainError: "TRYAGAIN",
}


def is_refusal(error: Exception) -> bool:
    """Whether it refuses the login, the right or the database: trying again does not help."""
    reply = reply_error(error)
    return reply is not None and (reply.code in _REFUSED or NO_DATABASE in str(reply))


def passes(error: Exception) -> bool:
    """Whether trying again may help."""
    reply = reply_error(error)
    return isinstance(error, (OSError, redis.ConnectionError, redis.TimeoutError)) if reply is None else (
        reply.code in _PASSING
    )  # fmt: skip


def publish_error(error: Exception, server: str, *, was_sent: bool = False) -> PublishError:
    """Our error for one of Redis. `was_sent`: the message had left, and the answer is missing."""
    reply = reply_error(error)
    if reply is None:
        if was_sent:
            return PublishTimeout(
                f"Redis at {server} did not confirm the message in time ({clause(str(error))}); it may or may not be stored"
            )
        return BrokerUnreachable(
            f"no Redis answers at {server}: {clause(f'{type(error).__name__}: {error}')}. Is it running there, and is broker_url "
            "right?"
        )
    text = clause(str(reply))
    if reply.code == "OOM":
        return ConnectionBlocked(
            f"Redis at {server} takes no messages, its memory is full: {text}. The deadline passed while waiting. Let workers "
            "take messages out, or raise maxmemory"
        )
    if reply.code == "MISCONF":
        return ConnectionBlocked(
            f"Redis at {server} takes no writes, it cannot save to its disk: {text}. The deadline passed while waiting"
        )
    if reply.code == "READONLY":
        return BrokerUnreachable(
            f"Redis at {server} is a replica that takes no writes: {text}. The deadline passed while waiting. Name the "
            "master, or the sentinels (sentinel://) so that it is found after a failover"
        )
    if NO_DATABASE in text:
        return AccessRefused(
            f"Redis at {server} has no such database: {text}. Check the number in broker_url; Redis has 16, from 0, unless its "
            "setting `databases` says otherwise"
        )
    if reply.code in _REFUSED:
        return AccessRefused(
            f"Redis at {server} refused the login or the command: {text}. Check the user and the password in broker_url, and the "
            "user's ACL (docs/redis.md has the commands and keys it needs)"
        )
    if reply.code in _PASSING:
        return BrokerUnreachable(f"Redis at {server} does not work now: {text}. The deadline passed while waiting")
    return PublishRefused(f"Redis at {server} refused the message: {text}")


def lacks_queue(count: int) -> bool:
    """Whether the script's answer to a publish is that nothing is there for it: no such exchange, or no queue."""
    return count in (0, -1)


def verdict(count: int, message: Message) -> PublishError | None:
    """What the script's answer to a publish means for the message."""
    if count == -2:
        return PublishRefused(
            f"queue {message.routing_key!r} is full (x-max-length with reject-publish): the message was not stored"
        )
    if count == -3:
        return PublishTimeout("this process has not renewed its right to lead in time: another one may lead now")
    if count > 0 or not message.mandatory:
        return None
    if count == -1:
        return Unroutable(
            f"exchange {message.exchange!r} does not exist on this Redis. Declare it (task_queues), or publish to a queue."
        )
    exchange = f"exchange {message.exchange!r}" if message.exchange else "the default exchange"
    return Unroutable(
        f"{exchange} has no queue for routing key {message.routing_key!r}; nothing was stored. Is the queue declared and bound "
        "(does a worker consume it)?"
    )


# How many messages leave before the first reply is read, and seconds before the next attempt.
WINDOW = 200
PAUSE = 0.1
OnReply = Callable[[Any], None]


class Declared:
    """What a publisher has declared, and what it has warned of."""

    def __init__(self, layout: Layout, warn: Callable[[str], None]) -> None:
        self.layout = layout
        self._warn = warn
        self._entities: set[Declaration] = set()
        self._warned: set[str] = set()

    def missing(self, entities: Sequence[Declaration]) -> list[tuple[Command, OnReply]]:
        """The commands that declare what is not declared yet. Raises: PublishError."""
        commands: list[tuple[Command, OnReply]] = []
        for entity in entities:
            if entity not in self._entities:
                commands += self.layout.declaring(entity, self._warn_once)
                self._entities.add(entity)
        return commands

    def forget(self, entities: Sequence[Declaration]) -> bool:
        """Declare these again: somebody has deleted a queue. Whether there were any."""
        had_any = not self._entities.isdisjoint(entities)
        self._entities.difference_update(entities)
        return had_any

    def forget_all(self) -> None:
        """Declare everything again: this may be another server."""
        self._entities.clear()

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self._warn(text)


def publishing(layout: Layout, leaving: Outgoing) -> tuple[Script, tuple[Any, ...]]:
    """The script that publishes, and its arguments."""
    address = (leaving.exchange, leaving.routing_key, leaving.step, leaving.envelope)
    if leaving.due is not None:
        return POSTPONE, (str(uuid.uuid4()), leaving.due, *address)
    return PUBLISH, (layout.channels, *address)


def evalsha(layout: Layout, script: Script, arguments: tuple[Any, ...]) -> Command:
    """The command that runs a script that Redis knows."""
    return ("EVALSHA", script.sha, 1, layout.prefix, *arguments)


def prepare(message: Message) -> Outgoing | PublishError:
    """The message as it leaves, or why it cannot."""
    try:
        return outgoing(message)
    except PublishError as error:
        return error
    except AmqTaskError as error:
        return PublishError(f"the message for routing key {message.routing_key!r} cannot be written: {error}")


class Batch:
    """`errors` has one entry per message, None = stored. `deadline` is monotonic seconds; after it what is open fails."""

    def __init__(self, messages: Sequence[Message], declared: Declared, deadline: float, server: str) -> None:
        self.deadline = deadline
        self._server = server
        self._declared = declared
        self._leaving = [prepare(message) for message in messages]
        self.errors: list[PublishError | None] = [
            leaving if isinstance(leaving, PublishError) else None for leaving in self._leaving
        ]
        self._open = [index for index, leaving in enumerate(self._leaving) if isinstance(leaving, Outgoing)]
        self._under_way: list[OnReply] = []
        self._renewed: set[int] = set()
        self._undeclared: dict[int, Exception] = {}
        # Under way, and those that have left before and may be stored.
        self._sent: list[int] = []
        self._left: set[int] = set()
        self._obstacle: Exception | None = None

    @property
    def is_done(self) -> bool:
        """Whether each message has its answer."""
        return not self._open

    def commands(self) -> list[Command]:
        """What to send next; its replies go to `take`, or what kept them away to `failed`."""
        pending: list[tuple[Command, OnReply]] = []
        if self._obstacle is not None:  # perhaps another server, which does not know the scripts
            pending += [(("SCRIPT", "LOAD", script.source), ignore_reply) for script in (PUBLISH, POSTPONE)]
            self._obstacle = None
        window, self._open = self._open[:WINDOW], self._open[WINDOW:]
        self._sent = []
        for index in window:
            leaving = self._leaving[index]
            assert isinstance(leaving, Outgoing)
            try:
                missing = self._declared.missing(leaving.message.declare)
            except PublishError as error:
                self.errors[index] = error
                continue
            pending += [(command, partial(self._declared_one, index, on_reply)) for command, on_reply in missing]
            script, arguments = publishing(self._declared.layout, leaving)
            command = evalsha(self._declared.layout, script, arguments)
            pending.append((command, partial(self._answered, index)))
            self._sent.append(index)
        self._under_way = [on_reply for _, on_reply in pending]
        return [command for command, _ in pending]

    def take(self, replies: Sequence[Any]) -> float:
        """The replies, in order; an error as an exception. Seconds to wait before the next commands, if any."""
        for on_reply, reply in zip(self._under_way, replies, strict=True):
            on_reply(reply)
        obstacle = None if self._obstacle is None else reply_error(self._obstacle)
        return 0.0 if obstacle is None or obstacle.code == "NOSCRIPT" else self._pause()

    def failed(self, error: Exception) -> float:
        """No connection, or no replies. How long to wait before the next attempt, if there is one (seconds)."""
        self._obstacle = error
        # The next attempt may fail before anything is sent.
        sent, self._sent = self._sent, []
        self._left.update(sent)
        for index in sent:
            leaving = self._leaving[index]
            assert isinstance(leaving, Outgoing)
            self._declared.forget(leaving.message.declare)
        self._open = [*sent, *self._open]
        if is_refusal(error):
            self._give_up()
        return self._pause()

    def _pause(self) -> float:
        if time.monotonic() + 2 * PAUSE >= self.deadline:  # the last attempt has time for its answer, too
            self._give_up()
        return PAUSE if self._open else 0.0

    def _give_up(self) -> None:
        """What is open fails, because of the last obstacle."""
        error = self._obstacle or TimeoutError("the deadline passed")
        for index in self._open:
            was_sent = index in self._left and isinstance(error, (TimeoutError, redis.TimeoutError))
            self.errors[index] = publish_error(error, self._server, was_sent=was_sent)
        self._open = []

    def _declared_one(self, index: int, on_reply: OnReply, reply: Any) -> None:
        if isinstance(reply, Exception):
            self._undeclared[index] = reply
        else:
            on_reply(reply)

    def _answered(self, index: int, reply: Any) -> None:
        # Without its declarations a message has no queue: what kept them away is the reason.
        reply = self._undeclared.pop(index, reply)
        leaving = self._leaving[index]
        assert isinstance(leaving, Outgoing)
        if isinstance(reply, Exception):
            self._declared.forget(leaving.message.declare)
            refusal = reply_error(reply)
            if (refusal is not None and refusal.code == "NOSCRIPT") or passes(reply):
                self._obstacle = reply
                self._open.append(index)
            else:
                self.errors[index] = publish_error(reply, self._server)
            return
        error = verdict(int(reply), leaving.message)
        declare = leaving.message.declare
        if lacks_queue(int(reply)) and error is not None and declare and index not in self._renewed:
            self._renewed.add(index)
            self._declared.forget(declare)
            self._open.append(index)
            return
        self.errors[index] = error


def until(timeout: float | None, default: float | None) -> float:
    """The deadline (monotonic seconds) of a call."""
    seconds = default if timeout is None else timeout
    return float("inf") if seconds is None else time.monotonic() + seconds

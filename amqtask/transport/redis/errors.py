"""Errors of Redis and of redis-py as ours: what happened, to whom, what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import redis

from amqtask.exceptions import (
    AccessRefused,
    BrokerUnreachable,
    ConnectionBlocked,
    PublishError,
    PublishRefused,
    PublishTimeout,
    Unroutable,
)
from amqtask.ground.printable import clause
from amqtask.transport.redis.resp import ReplyError

if TYPE_CHECKING:
    from amqtask.protocol.message import Message

# Codes with which trying again does not help.
_REFUSED = frozenset({"NOAUTH", "WRONGPASS", "NOPERM"})
# Codes of a state that passes: it starts, it is full, it became a replica, its disk is full, a script keeps it busy.
_PASSING = frozenset({"LOADING", "OOM", "READONLY", "MASTERDOWN", "MISCONF", "BUSY", "NOREPLICAS", "CLUSTERDOWN"})


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
}


def is_refusal(error: Exception) -> bool:
    """Whether it refuses the login or the right: trying again does not help."""
    reply = reply_error(error)
    return reply is not None and reply.code in _REFUSED


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

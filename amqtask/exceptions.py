"""One tree of errors; the type says whose fault it is, the message what happened and what to do."""

from __future__ import annotations

import builtins
import os
from typing import TYPE_CHECKING, Any

from amqtask.ground.plugins import others_names

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime


class AmqTaskError(Exception):
    """Anything that amqtask raises on purpose."""


def line_of(error: Exception) -> str:
    """An error in one line: ours as it says itself, one that nobody expected with its class and where it comes from."""
    if isinstance(error, AmqTaskError):
        return str(error)
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = (
        f" ({os.path.basename(trace.tb_frame.f_code.co_filename)}, line {trace.tb_lineno})" if trace is not None else ""
    )
    return f"{type(error).__name__}: {error}{where}"


# -- the caller's configuration -------------------------------------------------------------------


class ConfigurationError(AmqTaskError):
    """A setting, option or name is wrong; nothing was sent or run."""


class WrongValue(ConfigurationError, ValueError, TypeError):
    """A setting, or an option of a task or a call, has a value that it cannot have; nothing was sent or run."""


class SettingUnknown(ConfigurationError, AttributeError):
    """A setting that does not exist."""


class PoolNotFound(ConfigurationError):
    """No pool of that name, or its library is not installed."""


class AppNotFound(ConfigurationError):
    """No application where it was looked for."""


class LimitUnsupported(ConfigurationError):
    """The chosen pool cannot enforce a time limit that a task asks for."""


class QueueNotFound(ConfigurationError, KeyError):
    """A queue that `task_queues` does not name, with `task_create_missing_queues` off."""

    def __str__(self) -> str:  # KeyError would show the message in quotes
        return str(self.args[0]) if self.args else ""


# -- publishing -----------------------------------------------------------------------------------


class OperationalError(AmqTaskError):
    """The broker or the result backend could not do what it was asked to (Celery's name)."""


class PublishError(OperationalError):
    """A message was not stored by the broker, as far as we know."""


class Unroutable(PublishError):
    """The exchange has no queue for that routing key; the broker returned the message."""


class PublishRefused(PublishError):
    """Every host of the broker answered with a nack, for which it gives no reason."""


class MessageRefused(PublishRefused):
    """The broker takes this message from nobody: it closed the channel, or the connection, because of it."""


class MessageTooLarge(PublishError):
    """The message is over the broker's `max_message_size`."""


class ConnectionBlocked(PublishError):
    """The broker accepts no publishes for now (memory or disk alarm) and the deadline passed."""


class PublishTimeout(PublishError):
    """The deadline passed before the broker's confirm; the message may or may not be stored."""


class BrokerUnreachable(PublishError):
    """No host accepted a connection before the deadline."""


class AccessRefused(BrokerUnreachable):
    """The broker refused the login, the virtual host or the operation; trying again won't help."""


class TopologyMismatch(AmqTaskError):
    """An exchange or queue exists with other arguments than asked for."""


# -- messages that somebody else sent ----------------------------------------------------------------


class MessageError(AmqTaskError):
    """A received message cannot be run; it is dead-lettered with this reason."""


class Undecodable(MessageError):
    """The body is not what its content type and encoding say."""


class ContentDisallowed(MessageError):
    """The content type is not in `accept_content`."""


class SecurityError(MessageError):
    """The body's signature is wrong, or it cannot be decrypted; it was not decoded."""


class InvalidTaskError(MessageError):
    """The body decodes, but is no task message."""


class NotRegistered(MessageError, KeyError):
    """No task of that name in this worker."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


TaskUnknown = NotRegistered


class EncodeError(AmqTaskError, TypeError):
    """A value cannot be written with the chosen serializer."""


# -- results ------------------------------------------------------------------------------------------


class ResultError(AmqTaskError):
    """A result could not be read or stored."""


class TimeoutError(ResultError, builtins.TimeoutError):
    """The result was not there before the timeout (Celery's name, and a builtin TimeoutError too)."""


ResultTimeout = TimeoutError


class BackendUnreachable(ResultError, OperationalError):
    """The result backend does not answer. `task_id` and `state` are of the result, where it is known."""

    def __init__(self, *args: object, task_id: str = "", state: str = "") -> None:
        super().__init__(*args)
        self.task_id, self.state = task_id, state


class ResultLost(ResultError):
    """A result will not come, because what it was sent over is gone; the task itself may have run."""


class BackendNotConfigured(ResultError, ConfigurationError):
    """A result was asked for, but the application has no result backend."""


class ChordError(ResultError):
    """A member of a chord's header failed, or its results could not be handed to the body, so the body does not run."""


class FlowStoreUnreachable(OperationalError):
    """The store of locks and places (`flow_store`) does not answer."""


class AlreadyQueued(AmqTaskError):
    """A unique task's key belongs to another call, which waits or runs; `task_id` is that one's."""

    def __init__(self, message: str, task_id: str = "") -> None:
        super().__init__(message)
        self.task_id = task_id

    def __reduce__(self) -> tuple[object, ...]:
        return self.__class__, (str(self), self.task_id)


class TaskRevokedError(AmqTaskError):
    """The task was revoked, or expired before it ran."""


# -- what a task raises to steer its own end ---------------------------------------------------------


class TaskPredicate(AmqTaskError):
    """Not an error: raised by a task to say how its run ends."""


class Ignore(TaskPredicate):
    """Acknowledge the message and store nothing."""


class Replaced(Ignore):
    """The task asked to be replaced by `sig`, which goes on under its id; raised by `Task.replace()`."""

    def __init__(self, sig: Any = None) -> None:
        super().__init__("replaced")
        self.sig = sig


class Reject(TaskPredicate):
    """Give the message back to the broker: `requeue=True` to the queue, else to the dead-letter queue."""

    def __init__(self, reason: object = None, requeue: bool = False) -> None:
        super().__init__(reason, requeue)
        self.reason = reason
        self.requeue = requeue


def _repr(error: BaseException | type[BaseException]) -> str:
    """Its repr, or its class where that fails."""
    try:
        return repr(error)
    except Exception:  # noqa: BLE001 - it is a user's method
        return f"<{type(error).__name__}, whose repr fails>"


class Retry(TaskPredicate):
    """The task is to be run again; raised by `Task.retry()`.

    `when` is a datetime or a number of seconds, `exc` the cause; `sig` the call to publish.
    """

    def __init__(
        self,
        message: str | None = None,
        exc: BaseException | type[BaseException] | str | None = None,
        when: datetime | float | None = None,
        is_eager: bool = False,
        sig: Any = None,
    ) -> None:
        super().__init__(message, exc, when)
        self.message = message
        self.exc = exc if isinstance(exc, BaseException) else None
        self.excs = exc if isinstance(exc, str) else (_repr(exc) if exc is not None else None)
        self.when = when
        self.is_eager = is_eager
        self.sig = sig

    def humanize(self) -> str:
        """The time of the retry in words: "in 3s" or "at 2026-01-01 …"."""
        if isinstance(self.when, (int, float)):
            return f"in {self.when:g}s"
        return f"at {self.when}"

    def __str__(self) -> str:
        if self.message:
            return self.message
        cause = f": {self.excs}" if self.excs else ""
        return f"Retry {self.humanize()}{cause}"

    def __reduce__(self) -> tuple[object, ...]:
        return self.__class__, (self.message, self.exc or self.excs, self.when, self.is_eager, None)


class MaxRetriesExceededError(AmqTaskError):
    """`Task.retry()` was called more often than `max_retries` allows."""

    def __init__(self, *args: object, task_args: Iterable[Any] = (), task_kwargs: Any = None) -> None:
        super().__init__(*args)
        self.task_args = task_args
        self.task_kwargs = task_kwargs or {}


class DuplicateNodenameWarning(UserWarning):
    """Several workers answered under one name."""


class DuplicateTaskNameWarning(UserWarning):
    """Two functions are tasks under one name; the first one is used."""


class UnknownTaskOptionWarning(UserWarning):
    """A task has an option that is no option of amqtask's, but nearly one."""


class FlowGapWarning(UserWarning):
    """A task's `unique` loses calls in a case that may not be meant."""


# -- ends that come from outside ----------------------------------------------------------------------


class WorkerLostError(AmqTaskError):
    """The process that ran the task is gone (killed, out of memory, segmentation fault, exit)."""


WorkerLost = WorkerLostError


class TimeLimitExceeded(AmqTaskError):
    """The task ran longer than its hard time limit and was ended."""


class SoftTimeLimitExceeded(AmqTaskError):
    """Raised inside a task at its soft time limit, so that it can clean up (an Exception, as in Celery)."""


class Terminated(BaseException):
    """Raised inside a task that is terminated; derives from BaseException so that `except Exception` lets it pass."""


__getattr__ = others_names(__name__)

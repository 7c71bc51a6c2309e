"""Exceptions and warnings of Celery's that nothing here raises, for `except` and filters."""

from __future__ import annotations

from typing import Any

from amqtask.exceptions import AmqTaskError


class TaskError(AmqTaskError):
    """Celery's base of errors of tasks."""


class AlreadyRegistered(TaskError):
    """Never raised: two tasks of one name are a warning."""


class IncompleteStream(TaskError):
    """Never raised."""


class CeleryCommandException(AmqTaskError):
    """Never raised."""


class WorkerShutdown(SystemExit):
    """Raised by programs of Celery's users in a worker that is to stop warmly."""


class WorkerTerminate(SystemExit):
    """The same, to stop at once."""


class CeleryWarning(UserWarning):
    """Celery's base of warnings."""


class AlwaysEagerIgnored(CeleryWarning):
    """Never shown."""


class FixupWarning(CeleryWarning):
    """Never shown."""


class NotConfigured(CeleryWarning):
    """Never shown: without a configuration the defaults hold."""


class SecurityWarning(CeleryWarning):
    """Never shown."""


class CPendingDeprecationWarning(PendingDeprecationWarning):
    """Never shown."""


class CDeprecationWarning(DeprecationWarning):
    """Never shown."""


def reraise(tp: object, value: BaseException, tb: Any = None) -> None:
    """Raise an exception with a traceback."""
    raise value.with_traceback(tb) if value.__traceback__ is not tb else value

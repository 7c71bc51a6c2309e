"""ErrorInfo: an exception with its traceback as text, made while the traceback exists."""

from __future__ import annotations

import sys
import traceback as tracebacks
from types import TracebackType
from typing import Any


class ErrorInfo:
    """The `einfo` of hooks and signals."""

    __slots__ = ("exception", "traceback", "type")

    def __init__(self, error: BaseException) -> None:
        self.type = type(error)
        self.exception = error
        self.traceback = _format(error)

    @property  # type: ignore[misc] # nobody sets it
    def __class__(self) -> Any:
        """Receivers of signals (of tracing libraries) check for billiard's ExceptionInfo, as in Celery: where that class is
        imported this is an instance of it."""
        billiard = sys.modules.get("billiard.einfo")
        return ErrorInfo if billiard is None else billiard.ExceptionInfo

    @property
    def tb(self) -> TracebackType | None:
        """The traceback object."""
        return self.exception.__traceback__

    @property
    def exc_info(self) -> tuple[type[BaseException], BaseException, TracebackType | None]:
        """The exception in the form of sys.exc_info()."""
        return self.type, self.exception, self.tb

    def __str__(self) -> str:
        return self.traceback

    def __reduce__(self) -> tuple[object, ...]:
        return _again, (self.exception, self.traceback)


def _format(error: BaseException) -> str:
    try:
        text = "".join(tracebacks.format_exception(type(error), error, error.__traceback__))
        # os.fsdecode makes lone surrogates of invalid bytes, which no database takes.
        return text.encode("utf-8", "backslashreplace").decode()
    except Exception as broken:  # noqa: BLE001 - a user's __str__ or __cause__; what it raised is in the text
        return f"{type(error).__qualname__} (its traceback cannot be printed: {type(broken).__name__})\n"


def _again(error: BaseException, traceback: str) -> ErrorInfo:
    """Restores a pickle, which has no traceback of the exception."""
    restored = ErrorInfo(error)
    restored.traceback = traceback
    return restored

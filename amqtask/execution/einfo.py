"""ErrorInfo: an exception with its traceback as text, made while the traceback is at hand."""

from __future__ import annotations

import traceback as tracebacks


class ErrorInfo:
    """What hooks and signals get as `einfo`."""

    __slots__ = ("exception", "traceback", "type")

    def __init__(self, error: BaseException) -> None:
        self.type = type(error)
        self.exception = error
        self.traceback = _format(error)

    def __str__(self) -> str:
        return self.traceback


def _format(error: BaseException) -> str:
    try:
        text = "".join(tracebacks.format_exception(type(error), error, error.__traceback__))
        # What os.fsdecode makes of odd bytes is text that no database takes.
        return text.encode("utf-8", "backslashreplace").decode()
    except Exception as broken:  # noqa: BLE001 - a user's __str__ or __cause__; what it raised is in the text
        return f"{type(error).__qualname__} (its traceback cannot be printed: {type(broken).__name__})\n"

"""What tasks print becomes log lines (worker_redirect_stdouts), each with the task that printed it."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

from amqtask.exceptions import ConfigurationError
from amqtask.execution.context import AT_END, Context, current_context
from amqtask.ground.printable import unbroken_logger

# Celery's celery.redirected.
LOGGER = "amqtask.redirected"
# A line that grows longer is logged in pieces (characters).
LONGEST_LINE = 65_536
# Whether this thread, greenlet or coroutine is logging right now: what logging itself prints must not be logged.
_is_logging: ContextVar[bool] = ContextVar("amqtask_is_logging", default=False)


class LoggedStream(io.TextIOBase):
    """A text stream whose lines are logged; whoever needs a real file (`fileno`, `buffer`) gets the original's.

    Threads, greenlets and coroutines do not mix their lines; what a task leaves without a newline is logged as its.
    """

    def __init__(self, level: int, original: TextIO) -> None:
        self._level = level
        self._original = original
        self._logger = unbroken_logger(LOGGER)
        self._held: ContextVar[tuple[str, Context | None]] = ContextVar("amqtask_held_line", default=("", None))

    @property
    def encoding(self) -> str:  # type: ignore[override] # the base class has it writable
        return self._original.encoding

    @property
    def buffer(self) -> object:
        return self._original.buffer

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self._original.errors

    @property
    def newlines(self) -> object:  # type: ignore[override]
        return self._original.newlines

    @property
    def line_buffering(self) -> bool:
        return True

    @property
    def write_through(self) -> bool:
        return False

    @property
    def name(self) -> str:
        return str(getattr(self._original, "name", "<logged>"))

    @property
    def mode(self) -> str:
        return "w"

    def reconfigure(self, **_: object) -> None:
        """Accepted: lines are logged as they come, in the log's encoding."""

    def close(self) -> None:
        """Programs close it (and open it again); what is printed later must still be logged."""
        self.flush()

    def fileno(self) -> int:
        return self._original.fileno()

    def isatty(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        if _is_logging.get():
            return self._original.write(text)
        held, owner = self._held.get()
        context = current_context()
        if held and owner is not context:
            self._log(held, owner)
            held = ""
        *lines, unfinished = (held + text).split("\n")
        for line in lines:
            self._log(line, context)
        if len(unfinished) > LONGEST_LINE:
            self._log(unfinished, context)
            unfinished = ""
        if unfinished or held:
            self._held.set((unfinished, context))
        return len(text)

    def flush(self) -> None:
        """Log what waits for its newline here."""
        held, owner = self._held.get()
        if held and not _is_logging.get():
            self._held.set(("", None))
            self._log(held, owner)

    def _log(self, line: str, owner: Context | None) -> None:
        if not line.strip():
            return
        fields = {"task_id": owner.id, "task_name": owner.task} if owner is not None and owner.id else None
        token = _is_logging.set(True)
        try:
            self._logger.log(self._level, "%s", line.rstrip("\r"), extra=fields)
        finally:
            _is_logging.reset(token)


@contextmanager
def redirected(level: str | int) -> Iterator[None]:
    """Standard output and error are logged at `level` within the block. Raises: ConfigurationError (no such level)."""
    number = level if isinstance(level, int) else logging.getLevelName(level.upper())
    if not isinstance(number, int):
        raise ConfigurationError(f"worker_redirect_stdouts_level is {level!r}, which is not a log level")
    before = sys.stdout, sys.stderr
    streams = [LoggedStream(number, stream) for stream in before]
    sys.stdout, sys.stderr = streams
    flushes = [stream.flush for stream in streams]
    AT_END.extend(flushes)
    try:
        yield
    finally:
        for flush in flushes:
            AT_END.remove(flush)
            flush()
        sys.stdout, sys.stderr = before

"""Set up logging for a command by its options and settings: readable lines or JSON, to the terminal or a file."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple, TextIO

from amqtask import signals
from amqtask.exceptions import ConfigurationError
from amqtask.execution.context import AT_END, Context, current_context
from amqtask.ground.printable import Lines, unbroken_logger
from amqtask.ground.processes import POOL_INDEX
from amqtask.log import FORMAT, TASK_FORMAT, TASK_LOGGER, TaskFormatter, WorkerFormatter, add_task_fields
from amqtask.log import ColorFormatter as PlainFormatter
from amqtask.protocol import option_types

if TYPE_CHECKING:
    from types import FrameType

    from amqtask.ground.shapes import JsonObject
    from amqtask.settings import Settings

FileOf = Callable[[int], str]
# What every LogRecord has; the rest are fields somebody gave in `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line, with the fields that records carry in `extra` (queue …), and the task's name and id. `hostname` is
    the node's name."""

    def __init__(self, hostname: str = "") -> None:
        super().__init__()
        self._hostname = hostname

    def format(self, record: logging.LogRecord) -> str:
        add_task_fields(record)
        message, exception = _message_and_traceback(record)
        entry: JsonObject = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "process": record.process,
            **({"hostname": self._hostname} if self._hostname else {}),
            "message": message,
        }
        entry.update({key: value for key, value in vars(record).items() if key not in _STANDARD})
        if record.exc_info:
            exception = record.exc_text or self.formatException(record.exc_info)
        if exception:
            entry["exception"] = textwrap.dedent(exception)
        return json.dumps(entry, default=repr)


def _message_and_traceback(record: logging.LogRecord) -> tuple[str, str | None]:
    """The message, and the traceback that stands below it (of a task that failed in another process)."""
    arguments = record.args
    if not isinstance(arguments, tuple) or not arguments or not isinstance(arguments[-1], Lines):
        return record.getMessage(), None
    return str(record.msg).removesuffix("\n%s") % arguments[:-1], arguments[-1]


class LogStyle(NamedTuple):
    """How lines look. Formats are logging's; `task_…` is for the loggers of `get_task_logger`."""

    format: str = FORMAT
    date_format: str | None = None
    task_format: str = TASK_FORMAT
    task_date_format: str | None = None
    json_lines: bool = False
    color: bool = True
    # Of the node, for JSON.
    hostname: str = ""

    def for_all(self, *, color: bool) -> logging.Formatter:
        """What the root logger's handler writes. Only a format that somebody chose leaves a task unnamed."""
        if self.json_lines:
            return JsonFormatter(self.hostname)
        if self.format != FORMAT:
            return PlainFormatter(self.format, color, self.date_format)
        return WorkerFormatter(self.format, color, self.date_format, task_fmt=self.task_format)

    def for_tasks(self, *, color: bool) -> logging.Formatter:
        """What the task loggers' handler writes."""
        if self.json_lines:
            return JsonFormatter(self.hostname)
        return TaskFormatter(self.task_format, color, self.task_date_format or self.date_format)


def setup_logging(
    level: str | int,
    *,
    file: str | None = None,
    file_of: FileOf | None = None,
    style: LogStyle | None = None,
    hijack_root: bool = True,
) -> None:
    """Send the records of the root logger, and of the task loggers, to `file` or standard error; then the signals. `file_of` is
    the file of each process of a pool, by its number.

    Loggers that have handlers keep them when `hijack_root` is False (Celery's worker_hijack_root_logger).
    pika reports each failed connection in seven lines of its own, and we in one: its lines come with DEBUG only.
    """
    style = style or LogStyle()
    root, tasks = logging.getLogger(), logging.getLogger(TASK_LOGGER)
    color = style.color and not file and sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    for logger, formatter in ((root, style.for_all(color=color)), (tasks, style.for_tasks(color=color))):
        if hijack_root or not logger.handlers:
            handler = _handler(file, file_of)
            handler.setFormatter(formatter)
            logger.handlers[:] = [handler]
        logger.setLevel(level)
    tasks.propagate = False
    if style.json_lines:
        logging.captureWarnings(True)
    for chatty in ("aio_pika", "aiormq", "asyncio"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))
    logging.getLogger("pika").setLevel(logging.WARNING if root.level <= logging.DEBUG else logging.CRITICAL)
    for signal, logger, format in (
        (signals.after_setup_logger, root, style.format),
        (signals.after_setup_task_logger, tasks, style.task_format),
    ):
        if signal:
            signal.send(
                sender=None, logger=logger, loglevel=root.level, logfile=file, format=format, colorize=bool(color)
            )


def _handler(file: str | None, file_of: FileOf | None) -> logging.Handler:
    if file is None:
        return logging.StreamHandler(sys.stderr)
    from logging.handlers import WatchedFileHandler

    class RotatedFileHandler(WatchedFileHandler):
        """Opens the file again when logrotate has moved it. While it cannot be opened, or written to, lines go to standard error:
        a log that is gone, or on a full disk, must not end the worker, nor drown it in tracebacks. A process of a pool may have
        a file of its own."""

        index = 0

        def emit(self, record: logging.LogRecord) -> None:
            if file_of is not None and self.index != POOL_INDEX[0]:
                self.index = POOL_INDEX[0]
                self.baseFilename = os.path.abspath(file_of(self.index))
            try:
                super().emit(record)
            except OSError as error:
                self._tell(record, error)

        def handleError(self, record: logging.LogRecord) -> None:
            error = sys.exc_info()[1]
            if isinstance(error, OSError):
                self._tell(record, error)
            else:
                super().handleError(record)

        def _tell(self, record: logging.LogRecord, error: OSError) -> None:
            stream, self.stream = self.stream, None  # the next line tries again
            with suppress(OSError):
                if stream is not None:
                    stream.close()
            with suppress(OSError, ValueError):
                sys.__stderr__ and sys.__stderr__.write(f"{self.format(record)} (not in the log file: {error})\n")

    handler: logging.Handler = RotatedFileHandler(file, encoding="utf-8", delay=True)
    return handler


def check_logfile(file: str) -> None:
    """Raises: ConfigurationError when the log cannot be written, while somebody still sees it."""
    try:
        with open(file, "a"):
            pass
    except OSError as error:
        raise ConfigurationError(f"the log file {file} cannot be written: {error.strerror}") from error


def enable_own_loggers() -> None:
    """`logging.config.dictConfig` turns all loggers off that it does not name (disable_existing_loggers): not ours."""
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and name.partition(".")[0] in ("amqtask", "amqtask_pools"):
            logger.disabled = False


LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL", "FATAL")


def set_up(
    conf: Settings,
    *,
    loglevel: str,
    logfile: str | None,
    log_format: str | None,
    color: bool,
    hostname: str = "",
    logfile_of: FileOf | None = None,
) -> AbstractContextManager[None]:
    """Set logging up. What tasks print is logged while the returned context lasts, if it is to be. `logfile_of` is the file of
    each process of a pool, by its number."""
    if log_format is not None and log_format != "json":
        log_format = option_types.convert("--log-format", option_types.LOG_FORMAT, log_format)
    level = "CRITICAL" if loglevel == "FATAL" else loglevel
    if signals.setup_logging:  # a receiver sets logging up by itself, as with Celery
        signals.setup_logging.send(
            sender=None, loglevel=logging.getLevelName(level), logfile=logfile, format=None, colorize=None
        )
        enable_own_loggers()
        return nullcontext()
    enable_own_loggers()
    is_json = is_in_json(conf, log_format)
    style = LogStyle(
        format=conf.worker_log_format if is_json or log_format is None else log_format,
        date_format=conf.worker_log_datefmt,
        task_format=conf.worker_task_log_format,
        task_date_format=conf.worker_task_log_datefmt,
        json_lines=is_json,
        color=color and conf.worker_log_color is not False,
        hostname=hostname,
    )
    setup_logging(level, file=logfile, file_of=logfile_of, style=style, hijack_root=conf.worker_hijack_root_logger)
    return redirected(conf.worker_redirect_stdouts_level) if conf.worker_redirect_stdouts else nullcontext()


def is_in_json(conf: Settings, log_format: str | None) -> bool:
    """Whether each line is to be a JSON object; then nothing else is printed."""
    return log_format == "json" or bool(conf.worker_log_json)


# -- What tasks print becomes log lines (worker_redirect_stdouts), each with the task that printed it.

# Celery's celery.redirected.
LOGGER = "amqtask.redirected"
# A line that grows longer is logged in pieces (characters).
LONGEST_LINE = 65_536
# Whether this thread, greenlet or coroutine is logging right now: what logging itself prints must not be logged.
_is_logging: ContextVar[bool] = ContextVar("amqtask_is_logging", default=False)


def _is_complaint() -> bool:
    """Whether a handler whose file, disk or server fails prints that: as log lines it would come to the handler again, each
    with a traceback of its own."""
    if not isinstance(sys.exc_info()[1], OSError):
        return False
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not logging.Handler.handleError.__code__:
        frame = frame.f_back
    return frame is not None


class LoggedStream(io.TextIOBase):
    """A text stream whose lines are logged; whoever needs a real file (`fileno`, `buffer`) gets the original's.

    Threads, greenlets and coroutines do not mix their lines; what a task leaves without a newline is logged as its.
    """

    line_buffering, write_through, mode = True, False, "w"

    def __init__(self, level: int, original: TextIO) -> None:
        self._level = level
        self._original = original
        self._logger = unbroken_logger(LOGGER)
        self._held: ContextVar[tuple[str, Context | None]] = ContextVar("amqtask_held_line", default=("", None))
        self.name = str(getattr(original, "name", "<logged>"))

    @property
    def encoding(self) -> str:  # type: ignore[override] # the base class has it writable
        return self._original.encoding

    @property
    def buffer(self) -> object:
        return self._original.buffer

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self._original.errors

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
        if _is_logging.get() or _is_complaint():
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

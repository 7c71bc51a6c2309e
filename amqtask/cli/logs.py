"""Set up logging for a command: readable lines or JSON, to the terminal or a file."""

from __future__ import annotations

import json
import logging
import os
import sys
import textwrap
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from amqtask import signals
from amqtask.exceptions import ConfigurationError
from amqtask.ground.printable import Lines
from amqtask.log import FORMAT, TASK_FORMAT, TASK_LOGGER, TaskFormatter, WorkerFormatter, add_task_fields
from amqtask.log import ColorFormatter as PlainFormatter

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonObject

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


@dataclass(frozen=True, slots=True, kw_only=True)
class LogStyle:
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
    level: str | int, *, file: str | None = None, style: LogStyle | None = None, hijack_root: bool = True
) -> None:
    """Send the records of the root logger, and of the task loggers, to `file` or standard error; then the signals.

    Loggers that have handlers keep them when `hijack_root` is False (Celery's worker_hijack_root_logger).
    pika reports each failed connection in seven lines of its own, and we in one: its lines come with DEBUG only.
    """
    style = style or LogStyle()
    root, tasks = logging.getLogger(), logging.getLogger(TASK_LOGGER)
    color = style.color and not file and sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    for logger, formatter in ((root, style.for_all(color=color)), (tasks, style.for_tasks(color=color))):
        if hijack_root or not logger.handlers:
            handler = _handler(file)
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


def _handler(file: str | None) -> logging.Handler:
    if file is None:
        return logging.StreamHandler(sys.stderr)
    from logging.handlers import WatchedFileHandler

    class RotatedFileHandler(WatchedFileHandler):
        """Opens the file again when logrotate has moved it. While it cannot be opened lines go to standard error: a log that
        is gone must not end the worker."""

        def emit(self, record: logging.LogRecord) -> None:
            try:
                super().emit(record)
            except OSError as error:
                self.stream = None  # the next line tries again
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

"""Set up logging for a command: readable lines or JSON, to the terminal or a file."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any, TextIO

FORMAT = "[%(asctime)s: %(levelname)s/%(processName)s] %(message)s"
# What every LogRecord has; the rest are fields somebody gave in `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_COLORS = {"DEBUG": "\x1b[34m", "WARNING": "\x1b[33m", "ERROR": "\x1b[31m", "CRITICAL": "\x1b[35m"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line, with the fields that records carry in `extra` (task id, name, queue …)."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
        }
        entry.update({key: value for key, value in vars(record).items() if key not in _STANDARD})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=repr)


class ColorFormatter(logging.Formatter):
    """Colours the whole line by level."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        color = _COLORS.get(record.levelname)
        return f"{color}{line}\x1b[0m" if color else line


def setup_logging(
    level: str | int,
    *,
    file: str | None = None,
    format: str | None = None,
    date_format: str | None = None,
    json_lines: bool = False,
    color: bool = True,
    hijack_root: bool = True,
) -> None:
    """Send the root logger's records to `file` or standard error.

    pika reports each failed connection in seven lines of its own, and we in one: its lines come with DEBUG only.

    `hijack_root` False leaves a root logger alone that already has handlers (Celery's worker_hijack_root_logger).
    """
    root = logging.getLogger()
    if root.handlers and not hijack_root:
        return
    stream: TextIO = sys.stderr
    handler: logging.Handler = logging.FileHandler(file, delay=True) if file else logging.StreamHandler(stream)
    if json_lines:
        handler.setFormatter(JsonFormatter())
    elif color and not file and stream.isatty() and not os.environ.get("NO_COLOR"):
        handler.setFormatter(ColorFormatter(format or FORMAT, date_format))
    else:
        handler.setFormatter(logging.Formatter(format or FORMAT, date_format))
    root.handlers[:] = [handler]
    root.setLevel(level)
    for chatty in ("aio_pika", "aiormq", "asyncio"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))
    logging.getLogger("pika").setLevel(logging.WARNING if root.level <= logging.DEBUG else logging.CRITICAL)

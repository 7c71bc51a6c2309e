"""Logging for tasks: loggers, formatters and a filter that know which task runs (Celery's celery.utils.log, celery.app.log)."""

from __future__ import annotations

import logging
from typing import Any

from amqtask.execution.context import current_context

FORMAT = "[%(asctime)s: %(levelname)s/%(processName)s] %(message)s"
TASK_FORMAT = "[%(asctime)s: %(levelname)s/%(processName)s] %(task_name)s[%(task_id)s]: %(message)s"
# What stands in a task's line that no task has logged, as in Celery.
NO_TASK = "???"
TASK_LOGGER = "amqtask.task"
_RESERVED = frozenset({"amqtask", TASK_LOGGER})
_COLORS = {"DEBUG": "\x1b[34m", "WARNING": "\x1b[33m", "ERROR": "\x1b[31m", "CRITICAL": "\x1b[35m"}


def get_logger(name: str) -> logging.Logger:
    """The standard library's; here because Celery has it here."""
    return logging.getLogger(name)


def get_task_logger(name: str) -> logging.Logger:
    """A logger for a module of tasks: in a worker, its lines are in `worker_task_log_format`, with task name and id.

    It stands below the logger `amqtask.task`. Raises: RuntimeError for a name that amqtask uses itself.
    """
    if name in _RESERVED:
        raise RuntimeError(f"the logger name {name!r} is amqtask's own; take your module's, get_task_logger(__name__)")
    logger = logging.getLogger(name)
    above = logger.parent
    while above is not None and above.name != TASK_LOGGER:
        above = above.parent
    if above is None:
        # A package's logger that is made later would put itself, and with it all its modules, below the task logger.
        for end in (position for position, sign in enumerate(name) if sign == "."):
            logging.getLogger(name[:end])
        logger.parent = logging.getLogger(TASK_LOGGER)
    return logger


def add_task_fields(record: logging.LogRecord) -> bool:
    """Write `task_id` and `task_name` on the record if a task runs here and it has none; whether it has them now."""
    if hasattr(record, "task_id"):
        return True
    context = current_context()
    if context is None or context.task is None:
        return False
    # What the function of a batch says is about no single call.
    record.task_id, record.task_name = context.id or "batch", context.task
    return True


class TaskFields(logging.Filter):
    """For handlers of one's own: gives every record that a task logs, by whatever logger, `task_id` and `task_name`."""

    def filter(self, record: logging.LogRecord) -> bool:
        add_task_fields(record)
        return True


class ColorFormatter(logging.Formatter):
    """Colours the whole line by level, unless `use_color` is false. `%(task_name)s` and `%(task_id)s` may be used."""

    def __init__(self, fmt: str | None = None, use_color: bool = True, datefmt: str | None = None) -> None:
        super().__init__(fmt, datefmt, defaults={"task_name": NO_TASK, "task_id": NO_TASK})
        self.use_color = use_color

    def format(self, record: logging.LogRecord) -> str:
        add_task_fields(record)
        return self._colored(super().format(record), record)

    def _colored(self, line: str, record: logging.LogRecord) -> str:
        color = _COLORS.get(record.levelname) if self.use_color else None
        return f"{color}{line}\x1b[0m" if color else line


class TaskFormatter(ColorFormatter):
    """The lines of task loggers; `worker_task_log_format` unless another format is given."""

    def __init__(self, fmt: str | None = None, use_color: bool = True, datefmt: str | None = None) -> None:
        super().__init__(fmt or TASK_FORMAT, use_color, datefmt)


class WorkerFormatter(ColorFormatter):
    """The worker's own lines, and those that a task logs by ordinary loggers, which name the task too."""

    def __init__(
        self, fmt: str | None = None, use_color: bool = True, datefmt: str | None = None, *, task_fmt: str = TASK_FORMAT
    ) -> None:
        super().__init__(fmt or FORMAT, use_color, datefmt)
        self._of_tasks = TaskFormatter(task_fmt, use_color, datefmt)

    def format(self, record: logging.LogRecord) -> str:
        context: Any = current_context()
        return super().format(record) if context is None else self._of_tasks.format(record)

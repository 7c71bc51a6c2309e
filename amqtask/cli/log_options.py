"""What the options and settings of a worker or of beat say about logging, set up."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from amqtask import signals
from amqtask.cli.capture_output import redirected
from amqtask.cli.logs import LogStyle, enable_own_loggers, setup_logging
from amqtask.options import value_types

if TYPE_CHECKING:
    from amqtask.settings import Settings

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL", "FATAL")


def set_up(
    conf: Settings, *, loglevel: str, logfile: str | None, log_format: str | None, color: bool, hostname: str = ""
) -> AbstractContextManager[None]:
    """Set logging up. What tasks print is logged while the returned context lasts, if it is to be."""
    if log_format is not None and log_format != "json":
        log_format = value_types.convert("--log-format", value_types.LOG_FORMAT, log_format)
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
    setup_logging(level, file=logfile, style=style, hijack_root=conf.worker_hijack_root_logger)
    return redirected(conf.worker_redirect_stdouts_level) if conf.worker_redirect_stdouts else nullcontext()


def is_in_json(conf: Settings, log_format: str | None) -> bool:
    """Whether each line is to be a JSON object; then nothing else is printed."""
    return log_format == "json" or bool(conf.worker_log_json)

"""pika's own log records of connections that are ours: their errors are ours to tell, once, in our words.

A program that uses pika by itself, too, goes on to see its own; and who looks into pika (its logger's level is DEBUG) sees all.
"""

from __future__ import annotations

import logging
import sys
from types import FrameType

# Where pika tells of errors; a logger's filter does not see what its children log.
_LOGGERS = (
    "pika.adapters.base_connection",
    "pika.adapters.blocking_connection",
    "pika.adapters.select_connection",
    "pika.adapters.utils.connection_workflow",
    "pika.adapters.utils.io_services_utils",
    "pika.adapters.utils.selector_ioloop_adapter",
    "pika.callback",
    "pika.channel",
    "pika.connection",
    "pika.heartbeat",
)
# What stands between pika's code and whoever called it.
_BETWEEN = ("pika", "logging", "functools", "amqtask.transport.quiet", "amqtask.transport.wire")


class _NotOurs(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        """Whether somebody else has called pika."""
        if logging.getLogger("pika").level == logging.DEBUG:
            return True
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and _is_between(frame):
            frame = frame.f_back
        return frame is None or not str(frame.f_globals.get("__name__")).startswith("amqtask.")


def _is_between(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__"))
    return name in _BETWEEN or name.startswith("pika.")


_not_ours = _NotOurs()


def keep_quiet() -> None:
    """From now on; may be called often."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_not_ours)

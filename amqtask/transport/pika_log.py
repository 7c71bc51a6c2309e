"""Drops pika's log records on our own connections: we report their errors ourselves, once.

A program that also uses pika by itself still sees the records of its own connections. With pika's logger at level DEBUG all
records are kept.
"""

from __future__ import annotations

import logging
import sys
from types import FrameType

# Loggers with pika's error records; a logger's filter does not see the records of its children.
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
# Modules that stand on the stack between pika's code and its caller.
_BETWEEN = ("pika", "logging", "functools", __name__, f"{__package__}.wire")


class _NotOurs(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        """Whether pika was called by other code than ours."""
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
    """Install the filter; may be called often."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_not_ours)

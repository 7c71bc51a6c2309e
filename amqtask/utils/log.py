"""`from celery.utils.log import get_task_logger`, with `celery` replaced; see amqtask.log."""

from __future__ import annotations

import importlib
from typing import Any

from amqtask.log import ColorFormatter, get_logger, get_task_logger

__all__ = ["ColorFormatter", "get_logger", "get_task_logger"]


def __getattr__(name: str) -> Any:
    return importlib.import_module("amqtask.compat").lookup(__name__, name)

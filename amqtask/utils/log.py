"""`from celery.utils.log import get_task_logger`, with `celery` replaced; see amqtask.log."""

from __future__ import annotations

from amqtask.ground.plugins import others_names
from amqtask.log import ColorFormatter, get_logger, get_task_logger

__all__ = ["ColorFormatter", "get_logger", "get_task_logger"]

__getattr__ = others_names(__name__)

"""`from celery.utils.log import get_task_logger`, with `celery` replaced; see amqtask.log."""

from amqtask.log import ColorFormatter, get_logger, get_task_logger

__all__ = ["ColorFormatter", "get_logger", "get_task_logger"]

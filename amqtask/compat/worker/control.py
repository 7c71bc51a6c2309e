"""`celery.worker.control`."""

from amqtask.commands import control_command, inspect_command

__all__ = ["control_command", "inspect_command"]

"""`celery.worker.control`."""

from amqtask.remote.commands import control_command, inspect_command

__all__ = ["control_command", "inspect_command"]

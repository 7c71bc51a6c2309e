"""`celery.bin.worker`: the command."""

from amqtask.cli.worker import command as worker

__all__ = ["worker"]

"""`celery.bin.beat`: the command."""

from amqtask.cli.beat import command as beat

__all__ = ["beat"]

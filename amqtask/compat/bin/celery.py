"""`celery.bin.celery`: the command line."""

from __future__ import annotations

import sys

from amqtask.cli.main import cli as celery
from amqtask.cli.main import run

__all__ = ["celery", "main"]


def main() -> int:
    """Run it with this program's arguments."""
    return run(sys.argv[1:])

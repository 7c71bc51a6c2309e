"""`manage.py amqtask worker …`: the whole command line, with the application of this project."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from amqtask.contrib.django.project import project_app
from amqtask.ground.plugins import plugins
from amqtask.ground.startup import pool_on_command_line
from amqtask.pool import GREEN_POOLS

# Django's own options, which it has acted on before it looked for this command.
_OF_DJANGO = ("--settings", "--pythonpath")
# Called by the command line to get the application.
PROJECT = "amqtask.contrib.django.project:project_app"


class Command(BaseCommand):
    """Everything after `amqtask` is for the command line of that name."""

    help = "Run amqtask's command line (worker, beat, inspect, dead …) with this project's application."

    def run_from_argv(self, argv: list[str]) -> None:
        """Run from the shell; exits with the command's exit code."""
        sys.exit(self._run(without_djangos(argv[2:])))

    def add_arguments(self, parser: CommandParser) -> None:
        """Arguments of call_command."""
        parser.add_argument("arguments", nargs=argparse.REMAINDER)

    def handle(self, *args: object, **options: Any) -> None:
        """Run by call_command. Raises: CommandError with the exit code."""
        code = self._run(options["arguments"])
        if code:
            raise CommandError(f"amqtask ended with exit code {code}", returncode=code)

    def _run(self, arguments: Sequence[str]) -> int:
        is_told = bool(os.environ.get("AMQTASK_APP")) or any(
            argument.startswith(("-A", "--app")) for argument in arguments
        )
        if pool_on_command_line(arguments) in GREEN_POOLS:
            _start_anew(arguments if is_told else ["-A", PROJECT, *arguments])
        app = None if is_told else project_app()
        return plugins().run_command_line(app, arguments)


def without_djangos(arguments: Sequence[str]) -> list[str]:
    """The arguments without Django's own options."""
    kept: list[str] = []
    is_value = False
    for argument in arguments:
        if is_value or argument.startswith(tuple(f"{option}=" for option in _OF_DJANGO)):
            is_value = False
        elif argument in _OF_DJANGO:
            is_value = True
        else:
            kept.append(argument)
    return kept


def _start_anew(arguments: Sequence[str]) -> None:
    """Replace this process by one that lets the pool patch Python before Django is imported."""
    folder = str(Path(sys.argv[0]).resolve().parent)
    path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "amqtask", *arguments]
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path})

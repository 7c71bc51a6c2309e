"""`celery.bin`: the command line, and what commands of a library's own are made of, which are click's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from amqtask.cli.logs import LEVELS
from amqtask.cli.main import run
from amqtask.cli.params import CommaList

F = TypeVar("F", bound=Callable[..., Any])
COMMA_SEPARATED_LIST = CommaList()
LOG_LEVEL = click.Choice(LEVELS, case_sensitive=False)


class CeleryOption(click.Option):
    """An option; `help_group` and `default_value_from_context` are taken and not used."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name in ("help_group", "help_option", "default_value_from_context"):
            kwargs.pop(name, None)
        super().__init__(*args, **kwargs)


class CeleryCommand(click.Command):
    """A command."""


class CeleryDaemonCommand(CeleryCommand):
    """A command."""


def handle_preload_options(f: F) -> F:
    """The function as it is: options of `app.user_options["preload"]` are told to their signal by our own commands."""
    return f


def main() -> int:
    """Run the command line with this program's arguments."""
    return run(sys.argv[1:])

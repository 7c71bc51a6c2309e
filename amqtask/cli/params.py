"""Options that several commands have, and types of them."""

from __future__ import annotations

import click

from amqtask.cli import complete
from amqtask.cli.globals import ParamType


class CommaList(ParamType):
    """`a,b,c` as a tuple."""

    name = "a,b,c"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(part.strip() for part in str(value).split(",") if part.strip())


queues_option = click.option(
    "-Q",
    "--queues",
    type=CommaList(),
    default=(),
    shell_complete=complete.queues,
    help="Only these queues [all that the application knows].",
)

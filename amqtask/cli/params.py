"""Options that several commands have, types of them, and options that an application has of its own (`app.user_options`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from amqtask import signals
from amqtask.cli import complete
from amqtask.cli.globals import ParamType

if TYPE_CHECKING:
    from amqtask.app import AmqTask


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


_FOUND = "amqtask.own_options"


class Extensible(click.Command):
    """A command that asks the application for its options when it meets one that it does not know."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's parameters, and the application's options once they are known."""
        return [*super().get_params(ctx), *ctx.meta.get(_FOUND, ())]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does, and a second time when the application has options."""
        all_args = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption:
            ctx.meta[_FOUND] = _options(ctx.obj.load(_app_of(all_args)), self.name)
            if not ctx.meta[_FOUND]:
                raise
        return super().parse_args(ctx, all_args)


def own_options(app: AmqTask, ctx: click.Context, params: dict[str, object]) -> dict[str, object]:
    """The application's own options with their values; receivers of `user_preload_options` are told of them."""
    options = _options(app, ctx.command.name)
    absent = [option for option in options if option.name not in params]
    values = {
        **{str(option.name): params.pop(str(option.name)) for option in options if option not in absent},
        **click.Command("defaults", params=list(absent), add_help_option=False).make_context("defaults", []).params,
    }
    if options and signals.user_preload_options:
        signals.user_preload_options.send(sender=ctx.command, app=app, options=values)
    return values


def _options(app: AmqTask, command: str | None) -> list[click.Option]:
    if "user_options" not in vars(app):
        return []
    user_options: Any = vars(app)["user_options"]
    return [*user_options.get(command, ()), *user_options.get("preload", ())]


def _app_of(args: list[str]) -> str | None:
    for argument, following in zip(args, [*args[1:], None], strict=True):
        if argument in ("-A", "--app"):
            return following
        if argument.startswith("--app="):
            return argument.partition("=")[2]
    return None

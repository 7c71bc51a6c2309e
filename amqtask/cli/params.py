"""Options that several commands have, types of them, and options that an application has of its own (`app.user_options`)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from amqtask import signals
from amqtask.cli.base import COMPLETE_VARIABLE, PROGRAM, Globals, ParamType
from amqtask.ground.printable import moment

if TYPE_CHECKING:
    from amqtask.app import AmqTask


# -- What a shell may offer for an argument: pools, the application's queues and tasks.
#
# A failure offers nothing: while a line is being typed there is nowhere to report it, and the command itself will.


def complete_pools(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The registered pools."""
    from importlib.metadata import entry_points

    return _fitting((point.name for point in entry_points(group="amqtask.pools")), incomplete)


def complete_queues(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The application's queues; of a list `a,b` the last one is completed."""
    from amqtask.cli.broker import known_queues

    before, comma, last = incomplete.rpartition(",")
    names = _names_from_app(ctx, lambda app: [queue.name for queue in known_queues(app)])
    return [CompletionItem(f"{before}{comma}{item.value}") for item in _fitting(names, last)]


def complete_tasks(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The application's tasks."""
    from amqtask.cli.broker import task_routes

    return _fitting(_names_from_app(ctx, lambda app: [route.task for route in task_routes(app)]), incomplete)


def _names_from_app(ctx: click.Context, question: Callable[[AmqTask], Iterable[str]]) -> Iterable[str]:
    """Names from the application, which is loaded from the options of the line that is being completed."""
    root_params = ctx.find_root().params
    settings = Globals(app=ctx.params.get("told_app") or root_params.get("app"), config=root_params.get("config"))
    nowhere = io.StringIO()  # what the modules print is no completion
    try:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            return question(settings.load())
    except Exception:  # noqa: BLE001 - the user's modules are imported here; see above
        return ()


def _fitting(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in sorted(set(names)) if name.startswith(incomplete)]


# -- `amqtask completion SHELL`: what makes a shell complete our commands, options, pools, queues and tasks.

HOWTO = {
    "bash": 'eval "$(amqtask completion bash)" in ~/.bashrc',
    "zsh": 'eval "$(amqtask completion zsh)" in ~/.zshrc, after compinit',
    "fish": "amqtask completion fish > ~/.config/fish/completions/amqtask.fish",
}


@click.command("completion", epilog="\b\n" + "\n".join(f"  {line}" for line in HOWTO.values()))
@click.argument("shell", type=click.Choice(list(HOWTO)))
@click.pass_context
def completion_command(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell."""
    completion_class = get_completion_class(shell)
    if completion_class is None:
        raise click.ClickException(f"the installed click has no completion for {shell}")
    click.echo(completion_class(ctx.find_root().command, {}, PROGRAM, COMPLETE_VARIABLE).source())


class CommaList(ParamType):
    """`a,b,c` as a tuple."""

    name = "a,b,c"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(part.strip() for part in str(value).split(",") if part.strip())


rate_option = click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    help="So many a second: the others wait in the broker as delayed tasks [all at once].",
)


class Moment(ParamType):
    """A time in ISO 8601 (local without a zone), or so long ago: 30s, 10m, 2h, 7d."""

    name = "TIME"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        try:
            return moment(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


queues_option = click.option(
    "-Q",
    "--queues",
    type=CommaList(),
    default=(),
    shell_complete=complete_queues,
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
    if not options:
        return {}
    absent = [option for option in options if option.name not in params]
    values = {
        **{str(option.name): params.pop(str(option.name)) for option in options if option not in absent},
        **click.Command("defaults", params=list(absent), add_help_option=False).make_context("defaults", []).params,
    }
    if signals.user_preload_options:
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

"""The `amqtask` command: global options, and sub-commands that are imported when they are used."""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from amqtask.cli.base import PROGRAM, Globals, echo, echo_text
from amqtask.exceptions import AmqTaskError
from amqtask.ground import VERSION
from amqtask.ground.plugins import did_you_mean, load_path
from amqtask.ground.printable import printable_lines
from amqtask.ground.startup import make_usable, no_collection

if TYPE_CHECKING:
    from amqtask.app import AmqTask

# name → (module beside this one : its click command, help).
COMMANDS = {
    "beat": ("beat:command", "Send periodic tasks when they are due."),
    "call": ("call:call_command", "Publish a task by its name."),
    "completion": ("params:completion_command", "Print a shell's completion script."),
    "console": ("console:command", "Serve the console: tasks, failures, queues and workers in a browser."),
    "control": ("remote:control_command", "Change running workers (rate limits, pool size, queues, shutdown …)."),
    "dead": ("dead:command", "List, show, retry or purge dead-lettered messages."),
    "dev": ("dev:command", "Develop without a broker: one in memory, a worker that reloads, beat, the console."),
    "doctor": ("doctor:command", "Say what is wrong with the project and its broker, and what to do."),
    "events": ("events:command", "Show workers and tasks as they work, print events, take snapshots."),
    "flower": ("flower:command", "Start Flower, the web monitor, where it is installed."),
    "graph": ("topology:graph_command", "Draw the topology, or who consumes what, as DOT."),
    "history": ("relay:history_command", "Index what happened to tasks, so that it can be searched."),
    "inspect": ("remote:inspect_command", "Ask running workers what they do."),
    "limits": ("limits:command", "Limits over all workers: how far they are used; set and reset them."),
    "list": ("queues:list_command", "List tasks, or bindings."),
    "migrate": ("migrate:command", "Move messages between brokers or queues."),
    "multi": ("multi:command", "Start and stop several workers on this host."),
    "purge": ("purge:command", "Delete all messages that wait in queues."),
    "queues": ("queues:queues_command", "Depth, consumers, rates and age of queues; pause and resume them."),
    "relay": ("relay:command", "Publish the calls that committed transactions left in the outbox."),
    "report": ("doctor:report_command", "Versions and settings for a bug report."),
    "result": ("call:result_command", "Print the result of a task."),
    "schema": ("schema:command", "JSON Schema or AsyncAPI of the tasks, or a producer in TypeScript."),
    "shell": ("shell:command", "Python with the application and its tasks."),
    "status": ("remote:status_command", "List the workers that answer."),
    "tasks": ("tasks:command", "Find, show, run again or revoke tasks, by their history."),
    "top": ("top:command", "What happened lately, queues and workers, live in a terminal."),
    "topology": ("topology:topology_command", "Show, declare or check exchanges, queues and bindings."),
    "worker": ("worker:command", "Start a worker."),
    "workers": ("workers:command", "What each worker is, runs and has done."),
}


def _take_app_too(command: click.Command) -> None:
    """Let a command take `-A` as well, which tutorials write after it. What hands its options on finds it by itself."""
    if command.context_settings.get("allow_interspersed_args") is False:
        return
    if not any("--app" in parameter.opts for parameter in command.params):
        option = click.Option(
            ["-A", "--app"], hidden=True, expose_value=False, allow_from_autoenv=False, callback=_use_app
        )
        command.params.append(option)
    for inner in command.commands.values() if isinstance(command, click.Group) else ():
        _take_app_too(inner)


def _use_app(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.ensure_object(Globals).app = value


class LazyGroup(click.Group):
    """Finds a sub-command's module when the sub-command is used, so that a worker boots without the others."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        with no_collection():
            command: click.Command = load_path(f"{__package__}.{COMMANDS[cmd_name][0]}")
        _take_app_too(command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            hint = did_you_mean(name, COMMANDS) or f" There are: {', '.join(sorted(COMMANDS))}."
            ctx.fail(f"No such command {name!r}.{hint}")
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands, without importing them all; else options."""
        commands = [
            CompletionItem(name, help=text) for name, (_, text) in COMMANDS.items() if name.startswith(incomplete)
        ]
        return [*commands, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted((name, text) for name, (_, text) in COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "AMQTASK"},
    invoke_without_command=False,
)
@click.option("-A", "--app", metavar="MODULE[:ATTR]", help="The application, e.g. tasks or proj.amqtask:app.")
@click.option(
    "-b", "--broker", metavar="URL", allow_from_autoenv=False,
    help="Broker URL (amqp://, redis:// …), instead of the application's.",
)  # fmt: skip
@click.option(
    "--result-backend", metavar="URL", allow_from_autoenv=False, help="Result backend URL (rpc://, redis://…)."
)
@click.option("--config", metavar="MODULE", help="A module with settings, on top of the application's own.")
@click.option("--loader", hidden=True, help="The class that reads the application's settings, as in Celery.")
@click.option("--workdir", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Change to this folder.")
@click.option("-C", "--no-color", is_flag=True, help="No colours.")
@click.option("-q", "--quiet", is_flag=True, help="Say only what matters.")
@click.option("--skip-checks", is_flag=True, hidden=True, help="Accepted for Celery's sake.")
@click.version_option(VERSION, "--version", message="%(version)s")
@click.pass_context
def cli(
    ctx: click.Context, /, workdir: Path | None, loader: str | None, no_color: bool, skip_checks: bool, **options: Any
) -> None:
    """amqtask: a RabbitMQ-first task queue with Celery's names and messages."""
    if loader:
        os.environ["CELERY_LOADER"] = loader
    started_in = _start_folder(workdir)
    if workdir is not None:
        try:
            os.chdir(workdir)
        except OSError as error:
            raise click.ClickException(f"--workdir {workdir}: {error.strerror}") from None
    loaded = ctx.obj.loaded if isinstance(ctx.obj, Globals) else None
    ctx.obj = Globals(color=not no_color, started_in=started_in, loaded=loaded, **options)


def _start_folder(workdir: Path | None) -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:  # a deployment has replaced it
        if workdir is None or not workdir.is_absolute():
            raise click.ClickException(
                "the current folder is gone: change to another one, or name one with --workdir"
            ) from None
        return workdir


def run(argv: Sequence[str], app: AmqTask | None = None) -> int:
    """Run the command line and return its exit code; `app` when the caller already is the application."""
    make_usable()
    try:
        preset = Globals(loaded=app) if app is not None else None
        outcome = cli.main(args=list(argv), prog_name=PROGRAM, standalone_mode=False, obj=preset)
    except click.exceptions.Exit as stop:
        return int(stop.exit_code)
    except click.Abort:
        echo("Aborted.", err=True)
        return 1
    except click.ClickException as error:
        error.message = printable_lines(error.message)  # type: ignore[misc]  # "final", and all that is shown
        error.show()
        return int(error.exit_code)
    except AmqTaskError as error:
        echo_text(f"amqtask: {error}{_place_in_module(error)}", err=True)
        return 1
    return outcome if isinstance(outcome, int) else 0


def _place_in_module(error: AmqTaskError) -> str:
    """The line of a module of the user's that raised the error while it was imported; nothing where no import did."""
    ours = str(Path(__file__).parents[1])
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    imports = [index for index, frame in enumerate(frames) if frame.filename.startswith("<frozen importlib")]
    modules = [frame for frame in frames[imports[0] :] if not frame.filename.startswith("<")] if imports else []
    return f"\n  {modules[-1].filename}, line {modules[-1].lineno}: {modules[-1].line}" if modules else ""

"""`amqtask control COMMAND`: change running workers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from amqtask.cli.globals import Globals
from amqtask.cli.output import echo
from amqtask.cli.remote_client import (
    Remote,
    Unavailable,
    ask,
    collect,
    exit_code,
    find,
    listing,
    print_list,
    read_arguments,
    remote_options,
)
from amqtask.exceptions import PublishError
from amqtask.remote.commands import BUILTIN

if TYPE_CHECKING:
    from amqtask.ground.shapes import CommandArguments

# Those that --terminate and --signal are for.
REVOKING = ("revoke", "revoke_by_stamped_headers")


@click.command("control", epilog=listing("control"))
@click.argument("order", metavar="COMMAND", required=False)
@click.argument("raw_arguments", metavar="[ARGUMENTS]...", nargs=-1)
@click.option("--list", "only_list", is_flag=True, help="List the commands and what they take.")
@click.option("--terminate", is_flag=True, help="revoke…: end the tasks that run, too.")
@click.option("--signal", metavar="NAME", help="revoke… --terminate: by this signal (default: SIGTERM).")
@click.option("--reload", is_flag=True, help="pool_restart: reload modules that are imported already.")
@remote_options
@click.pass_obj
def command(
    settings: Globals,
    order: str | None,
    raw_arguments: tuple[str, ...],
    only_list: bool,
    terminate: bool,
    signal: str | None,
    reload: bool,
    remote: Remote,
) -> int:
    """Give all workers an order, or those of --destination.

    The exit code is 69 when none answers, 1 when one refuses, or one of --destination does not answer.
    """
    if only_list:
        print_list(settings, "control")
        return 0
    info = find(settings, "control", order)
    arguments = {**read_arguments(info, raw_arguments), **_options(info.name, terminate, signal, reload)}
    if info.name == "pool_restart" and not raw_arguments:
        arguments.pop("modules")  # all of them, as when app.control.pool_restart() is told none
    if info is BUILTIN["shutdown"]:
        return _shut_down(settings, remote)
    return exit_code(remote, ask(settings, info, arguments, remote))


def _shut_down(settings: Globals, remote: Remote) -> int:
    """Shut workers down. They do not answer then, so a ping first asks which are there."""
    replies = collect(settings, BUILTIN["ping"], {}, remote)
    app = settings.load()
    try:
        # To all who are meant: one that is slow to answer hears it, too.
        app.control.broadcast(
            "shutdown", destination=remote.destination or None, pattern=remote.pattern, matcher=remote.matcher
        )
    except PublishError as error:
        raise Unavailable(f"Could not tell them over the broker: {error}") from error
    finally:
        app.close()
    answers = {node: {"ok": "told to shut down"} for node in replies}
    if remote.as_json:
        echo(json.dumps([{node: answer} for node, answer in answers.items()]))
    for node, answer in () if remote.as_json else answers.items():
        echo(f"->  {node}: {answer['ok']}")
    return exit_code(remote, answers)


def _options(order: str, terminate: bool, signal: str | None, reload: bool) -> CommandArguments:
    arguments: dict[str, object] = {}
    if terminate or signal:
        if order not in REVOKING:
            raise click.UsageError(f"--terminate and --signal are for {' and '.join(REVOKING)}")
        arguments["terminate"] = True
        if signal:
            arguments["signal"] = signal
    if reload:
        if order != "pool_restart":
            raise click.UsageError("--reload is for pool_restart")
        arguments["reload"] = True
    return arguments

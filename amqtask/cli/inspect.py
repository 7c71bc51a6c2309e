"""`amqtask inspect COMMAND`: ask running workers."""

from __future__ import annotations

import click

from amqtask.cli.globals import Globals
from amqtask.cli.remote_client import (
    Remote,
    ask,
    exit_code,
    find,
    listing,
    print_count,
    print_list,
    read_arguments,
    remote_options,
)


@click.command("inspect", epilog=listing("inspect"))
@click.argument("question", metavar="COMMAND", required=False)
@click.argument("raw_arguments", metavar="[ARGUMENTS]...", nargs=-1)
@click.option("--list", "only_list", is_flag=True, help="List the commands and what they take.")
@remote_options
@click.pass_obj
def command(
    settings: Globals,
    question: str | None,
    raw_arguments: tuple[str, ...],
    only_list: bool,
    remote: Remote,
) -> int:
    """Ask all workers, or those of --destination.

    The exit code is 69 when none answers, 1 when one answers with an error, or one of --destination does not answer.
    """
    if only_list:
        print_list(settings, "inspect")
        return 0
    info = find(settings, "inspect", question)
    arguments = read_arguments(info, raw_arguments)
    replies = ask(settings, info, arguments, remote)
    if not remote.as_json and not settings.quiet:
        print_count(len(replies))
    return exit_code(remote, replies)

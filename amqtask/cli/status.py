"""`amqtask status`: which workers are there."""

from __future__ import annotations

import click

from amqtask.cli.globals import Globals
from amqtask.cli.remote_client import Remote, ask, exit_code, print_count, remote_options
from amqtask.remote.commands import BUILTIN


@click.command("status")
@remote_options
@click.pass_obj
def command(settings: Globals, remote: Remote) -> int:
    """List the workers that answer a ping; the exit code is 69 when none does."""
    ping = BUILTIN["ping"]
    replies = ask(settings, ping, {}, remote, with_replies=False)
    if not remote.as_json and not settings.quiet:
        print_count(len(replies))
    return exit_code(remote, replies)

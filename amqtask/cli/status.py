"""`amqtask status`: which workers are there."""

from __future__ import annotations

import click

from amqtask.cli.main import Globals
from amqtask.cli.remote import ask, print_count, remote_options
from amqtask.commands import BUILTIN


@click.command("status")
@remote_options
@click.pass_obj
def command(settings: Globals, timeout: float | None, destination: tuple[str, ...], as_json: bool) -> None:
    """List the workers that answer a ping; the exit code is 69 when none does."""
    ping = BUILTIN["ping"]
    count = ask(settings, ping, {}, timeout=timeout, destination=destination, as_json=as_json, with_replies=False)
    if not as_json and not settings.quiet:
        print_count(count)

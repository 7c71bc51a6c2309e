"""`amqtask status`: which workers are there."""

from __future__ import annotations

import click

from amqtask.cli.main import Globals
from amqtask.cli.remote import print_replies, remote_options


@click.command("status")
@remote_options
@click.pass_obj
def command(settings: Globals, timeout: float, destination: tuple[str, ...], as_json: bool) -> None:
    """List the workers that answer a ping; exit code 1 when none does."""
    app = settings.load()
    replies = app.control.ask("ping", {}, destination=destination or None, timeout=timeout)
    app.close()
    print_replies(replies, as_json=as_json)

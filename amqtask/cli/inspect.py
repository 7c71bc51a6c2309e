"""`amqtask inspect COMMAND`: ask running workers."""

from __future__ import annotations

import click

from amqtask.cli.main import Globals
from amqtask.cli.remote import print_replies, remote_options

QUESTIONS = (
    "active", "active_queues", "clock", "conf", "ping", "query_task", "registered", "report", "reserved", "revoked",
    "scheduled", "stats",
)  # fmt: skip


@click.command("inspect")
@click.argument("question", type=click.Choice(QUESTIONS))
@click.argument("ids", nargs=-1)
@remote_options
@click.pass_obj
def command(
    settings: Globals,
    question: str,
    ids: tuple[str, ...],
    timeout: float,
    destination: tuple[str, ...],
    as_json: bool,
) -> None:
    """Ask all workers (or those of --destination) a QUESTION; `query_task` takes task ids."""
    app = settings.load()
    arguments = {"ids": list(ids)} if question == "query_task" else {}
    replies = app.control.ask(question, arguments, destination=destination or None, timeout=timeout)
    app.close()
    print_replies(replies, as_json=as_json)

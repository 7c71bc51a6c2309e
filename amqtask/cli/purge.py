"""`amqtask purge`: delete what waits in queues."""

from __future__ import annotations

import click

from amqtask.cli import complete
from amqtask.cli.broker import open_admin, refuse_memory
from amqtask.cli.globals import Globals
from amqtask.cli.output import echo, json_option, print_json
from amqtask.cli.params import CommaList
from amqtask.exceptions import QueueNotFound
from amqtask.ground.wording import count


@click.command("purge")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@click.option("-Q", "--queues", type=CommaList(), default=(), shell_complete=complete.queues, help="Only these queues.")
@click.option("-X", "--exclude-queues", type=CommaList(), default=(), help="All configured queues but these.")
@json_option
@click.pass_obj
def command(
    settings: Globals, force: bool, queues: tuple[str, ...], exclude_queues: tuple[str, ...], as_json: bool
) -> None:
    """Delete all messages that wait in the application's queues. They cannot be brought back.

    Delayed tasks (eta, countdown, retries) wait elsewhere and stay: `amqtask queues` counts them, and
    `amqtask control revoke ID` keeps one from running.
    """
    app = settings.load()
    if queues:
        app.queues.select(queues)
    if exclude_queues:
        app.queues.deselect(exclude_queues)
    names = [queue.name for queue in app.queues.consumed if not queue.broadcast]
    if not names:
        raise click.ClickException("no queue is left to purge")
    refuse_memory(app)
    if not force:
        click.confirm(f"Delete all messages in {', '.join(names)}?", abort=True, err=as_json)
    purged: dict[str, int] = {}
    with open_admin(app) as admin:
        for name in names:
            try:
                purged[name] = admin.purge(name)
            except QueueNotFound as error:
                echo(str(error), err=True)
    if as_json:
        print_json({"purged": purged})
        return
    echo(f"Purged {count(sum(purged.values()), 'message')} from {count(len(purged), 'queue')}.")

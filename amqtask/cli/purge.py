"""`amqtask purge`: delete what waits in queues."""

from __future__ import annotations

import click

from amqtask.cli.main import Globals
from amqtask.cli.worker import CommaList
from amqtask.exceptions import QueueNotFound
from amqtask.transport.admin import QueueAdmin


@click.command("purge")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@click.option("-Q", "--queues", type=CommaList(), default=(), help="Only these queues.")
@click.option("-X", "--exclude-queues", type=CommaList(), default=(), help="All configured queues but these.")
@click.pass_obj
def command(settings: Globals, force: bool, queues: tuple[str, ...], exclude_queues: tuple[str, ...]) -> None:
    """Delete all messages that wait in the application's queues. They cannot be brought back."""
    app = settings.load()
    if queues:
        app.queues.select(queues)
    if exclude_queues:
        app.queues.deselect(exclude_queues)
    names = [queue.name for queue in app.queues.consumed]
    if not force:
        click.confirm(f"Delete all messages in {', '.join(names)}?", abort=True)
    total = 0
    with QueueAdmin(app.broker_addresses) as admin:
        for name in names:
            try:
                total += admin.purge(name)
            except QueueNotFound as error:
                click.echo(str(error), err=True)
    click.echo(
        f"Purged {total} message{'' if total == 1 else 's'} from {len(names)} queue{'' if len(names) == 1 else 's'}."
    )

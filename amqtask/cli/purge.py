"""`amqtask purge`: delete what waits in queues."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from amqtask.cli import params
from amqtask.cli.broker import open_admin, refuse_memory
from amqtask.cli.globals import Globals
from amqtask.cli.move_messages import Delayed
from amqtask.cli.output import echo, json_option, print_json
from amqtask.cli.params import CommaList
from amqtask.exceptions import AmqTaskError, QueueNotFound
from amqtask.ground.printable import count
from amqtask.services.delayed import MOST_COUNTED
from amqtask.transport.contract import Admin

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonFields


@click.command("purge")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@click.option(
    "-Q", "--queues", type=CommaList(), default=(), shell_complete=params.complete_queues, help="Only these queues."
)
@click.option("-X", "--exclude-queues", type=CommaList(), default=(), help="All configured queues but these.")
@click.option(
    "--delayed", is_flag=True, help="Also the tasks that wait for their time (eta, countdown, retries) to go there."
)
@json_option
@click.pass_obj
def command(
    settings: Globals,
    force: bool,
    queues: tuple[str, ...],
    exclude_queues: tuple[str, ...],
    delayed: bool,
    as_json: bool,
) -> None:
    """Delete all messages that wait in the application's queues. They cannot be brought back.

    Delayed tasks (eta, countdown, retries) wait elsewhere. They stay, and are counted, unless --delayed is given: that deletes
    those that are addressed to these queues, also what workers hold until its time; all others stay where they are. What
    is due while they are looked at (some thousands a second) is late by so much.
    """
    app = settings.load()
    if queues:
        app.queues.select(queues)
    if exclude_queues:
        app.queues.deselect(exclude_queues)
    chosen = [queue for queue in app.queues.consumed if not queue.broadcast]
    names = [queue.name for queue in chosen]
    if not names:
        raise click.ClickException("no queue is left to purge")
    refuse_memory(app)
    if not force:
        also = ", and the delayed tasks for them" if delayed else ""
        click.confirm(f"Delete all messages in {', '.join(names)}{also}?", abort=True, err=as_json)
    with open_admin(app) as admin:
        waiting = Delayed(app, admin, chosen)
        # They first: what becomes due meanwhile is purged after them.
        deleted = waiting.delete() if delayed else None
        purged = dict(_purge(admin, names))
        if deleted is not None:
            _tell(as_json, {"purged": purged, "purged_delayed": deleted}, _told(purged, deleted))
            return
        remaining, why = _count(waiting)
    _tell(as_json, {"purged": purged, "delayed": remaining}, _told(purged, None))
    if why:
        echo(why, err=True)
    elif remaining is not None and any(remaining.values()) and not as_json:
        numbers = ", ".join(f"{number} for {name}" for name, number in remaining.items() if number)
        echo(f"Delayed tasks remain ({numbers}): --delayed deletes them, too.")


def _count(waiting: Delayed) -> tuple[dict[str, int] | None, str]:
    """The delayed tasks that remain; or None, and why they are not known: what was purged is purged."""
    try:
        remaining = waiting.count()
    except AmqTaskError as error:
        return None, f"Whether delayed tasks for them remain is not known: {error}"
    if remaining is None:
        return (
            None,
            f"More than {MOST_COUNTED} delayed tasks wait, so those for these queues were not counted; --delayed deletes them.",
        )
    return remaining, ""


def _tell(as_json: bool, data: JsonFields, text: str) -> None:
    if as_json:
        print_json(data)
    else:
        echo(text)


def _purge(admin: Admin, names: Sequence[str]) -> Iterator[tuple[str, int]]:
    for name in names:
        try:
            yield name, admin.purge(name)
        except QueueNotFound as error:
            echo(str(error), err=True)


def _told(purged: Mapping[str, int], deleted: Mapping[str, int] | None) -> str:
    also = "" if deleted is None else f", and {count(sum(deleted.values()), 'delayed task')}"
    return f"Purged {count(sum(purged.values()), 'message')} from {count(len(purged), 'queue')}{also}."

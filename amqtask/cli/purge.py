"""`amqtask purge`: delete what waits in queues."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from amqtask.cli import params
from amqtask.cli.base import Globals, echo, json_option, tell
from amqtask.cli.broker import open_admin, refuse_memory
from amqtask.cli.params import CommaList
from amqtask.exceptions import AmqTaskError, QueueNotFound
from amqtask.ground.printable import count
from amqtask.services.delayed import ANSWER_SECONDS, MOST_COUNTED, delay_queues
from amqtask.topology.delays import Address, address_of, addresses
from amqtask.transport.contract import Admin

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.protocol.entities import Queue
    from amqtask.protocol.message import Delivery


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
            tell({"purged": purged, "purged_delayed": deleted}, _told(purged, deleted), as_json=as_json)
            return
        remaining, why = _count(waiting)
    tell({"purged": purged, "delayed": remaining}, _told(purged, None), as_json=as_json)
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


def _purge(admin: Admin, names: Sequence[str]) -> Iterator[tuple[str, int]]:
    for name in names:
        try:
            yield name, admin.purge(name)
        except QueueNotFound as error:
            echo(str(error), err=True)


def _told(purged: Mapping[str, int], deleted: Mapping[str, int] | None) -> str:
    also = "" if deleted is None else f", and {count(sum(deleted.values()), 'delayed task')}"
    return f"Purged {count(sum(purged.values()), 'message')} from {count(len(purged), 'queue')}{also}."


# -- The delayed tasks for some queues, counted or deleted: what waits in the delay queues, and what workers hold until its time.


class Delayed:
    """Delayed tasks that are addressed to these queues, for all applications of the virtual host."""

    def __init__(self, app: AmqTask, admin: Admin, queues: Sequence[Queue]) -> None:
        self._app = app
        self._admin = admin
        self._names = [queue.name for queue in queues]
        self._queue_of: dict[Address, str] = {address: queue.name for queue in queues for address in addresses(queue)}

    def count(self) -> dict[str, int] | None:
        """How many there are, by queue; None: too many wait to look at all."""
        waiting = delay_queues(self._app, self._admin)
        if sum(self._admin.count(name) for _, name in waiting) > MOST_COUNTED:
            return None
        counts = dict.fromkeys(self._names, 0)
        self._ask_workers(counts, delete=False)
        self._look(waiting, counts, delete=False)
        return counts

    def delete(self) -> dict[str, int]:
        """Delete them; how many there were, by queue. Workers are asked twice: some came to them while the queues were
        looked at."""
        counts = dict.fromkeys(self._names, 0)
        self._ask_workers(counts, delete=True)
        self._look(delay_queues(self._app, self._admin), counts, delete=True)
        self._ask_workers(counts, delete=True)
        return counts

    def _look(self, waiting: Sequence[tuple[int, str]], counts: dict[str, int], *, delete: bool) -> None:
        def is_meant(delivery: Delivery) -> bool:
            queue = self._queue_of.get(address_of(delivery))
            if queue is not None:
                counts[queue] += 1
            return queue is not None

        for _, name in waiting:
            self._admin.sift(name, is_meant, delete=delete)

    def _ask_workers(self, counts: dict[str, int], *, delete: bool) -> None:
        pairs = list(self._queue_of)
        answers = self._app.control.ask("purge_delayed", {"addresses": pairs, "delete": delete}, timeout=ANSWER_SECONDS)
        for answer in answers.values():
            for address, number in zip(pairs, _counts(answer), strict=False):
                counts[self._queue_of[address]] += number


def _counts(answer: object) -> Sequence[int]:
    """What a worker that knows the command answers; Celery's, and older ones, have nothing to tell."""
    counts = answer.get("counts") if isinstance(answer, dict) else None
    return [number for number in counts if isinstance(number, int)] if isinstance(counts, list) else []

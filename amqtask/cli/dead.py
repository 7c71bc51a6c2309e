"""`amqtask dead`: what was dead-lettered, why, and back to work with it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from amqtask.cli import params
from amqtask.cli.base import Globals, echo, echo_text, json_option, print_json
from amqtask.cli.broker import known_queues, open_admin
from amqtask.exceptions import SecurityError
from amqtask.ground.printable import count
from amqtask.protocol.encryption import key_id_of
from amqtask.protocol.message import Delivery, Message
from amqtask.protocol.serialization import ENCRYPTED
from amqtask.services.rerunning import (
    Pace,
    as_entry,
    back_to_work,
    has_expired,
    header_text,
    reason,
    work_queue_of,
)
from amqtask.topology.declarations import base_of, own_dead_letters
from amqtask.transport.contract import Admin

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.ground.shapes import JsonFields, JsonObject

ALL = 1_000_000


def line_of(entry: JsonFields) -> str:
    """What `dead list` says about a message."""
    attempts = "-" if entry["attempts"] is None else entry["attempts"]
    summary = f"{entry['id'] or '?'}  {entry['task'] or '?'}  attempts={attempts}  {entry['reason']}"
    return f"{_when(entry['died_at'])}  {summary}"


def _when(died_at: str | None) -> str:
    """A time as `dead list` shows it: local, to the second."""
    try:
        return f"{datetime.fromisoformat(died_at or '').astimezone():%Y-%m-%d %H:%M:%S}"
    except (ValueError, ArithmeticError, OSError):  # not told, or a year that the calendar here has not
        return "-".ljust(19)


def _matching(deliveries: Iterable[Delivery], task: str | None, ids: Sequence[str]) -> Iterator[Delivery]:
    for delivery in deliveries:
        headers = delivery.properties.headers or {}
        if (task is None or header_text(headers.get("task")) == task) and (
            not ids or header_text(headers.get("id")) in ids
        ):
            yield delivery


def _queue_options(function: Any) -> Any:
    one_queue = click.option(
        "-Q",
        "--queue",
        shell_complete=params.complete_queues,
        help="The work queue (its dead-letter queue is meant) [the default queue].",
    )
    every = click.option("--all-queues", is_flag=True, help="Of all queues that the application knows.")
    return one_queue(every(function))


def _names(app: AmqTask, admin: Admin, queue: str | None, all_queues: bool) -> list[str]:
    """The dead-letter queues that are meant; of all queues those that exist."""
    suffix: str = app.conf.task_dead_letter_suffix
    if not all_queues:
        work = queue or app.conf.task_default_queue
        return [work if work.endswith(suffix) else f"{base_of(work)}{suffix}"]
    if queue:
        raise click.UsageError("say either --queue or --all-queues")
    planned = [own_dead_letters(work_queue, app.queue_defaults) for work_queue in known_queues(app)]
    return list(admin.states([name for name in planned if name is not None]))


@click.group("dead")
def command() -> None:
    """List, show, retry or purge dead-lettered messages (of the default queue, of -Q, or of --all-queues)."""


@command.command("list")
@_queue_options
@click.option("-t", "--task", help="Only this task.")
@click.option("-n", "--limit", type=click.IntRange(min=1), default=100, show_default=True, help="Messages per queue.")
@click.option("-r", "--by-reason", is_flag=True, help="Count all messages by task and reason instead.")
@json_option
@click.pass_obj
def list_(
    settings: Globals,
    queue: str | None,
    all_queues: bool,
    task: str | None,
    limit: int,
    by_reason: bool,
    as_json: bool,
) -> None:
    """One line a message: when it died, id, task, attempts, reason. They stay, but count as delivered once more."""
    app = settings.load()
    totals: dict[str, int] = {}
    entries: list[JsonObject] = []
    reasons: Counter[tuple[str, str | None, str]] = Counter()
    with open_admin(app) as admin:
        for name in _names(app, admin, queue, all_queues):
            totals[name] = admin.count(name)
            matching = _matching(admin.browse(name, ALL if by_reason else limit), task, ())
            if by_reason:
                reasons.update((delivery.queue, *_why(delivery)) for delivery in matching)
            else:
                entries += map(as_entry, matching)
    if by_reason:
        _print_reasons(reasons, totals, as_json)
    elif as_json:
        print_json({"queues": totals, "messages": entries})
    else:
        for entry in entries:
            echo(line_of(entry))
        _print_totals(totals)


def _print_reasons(counts: Counter[tuple[str, str | None, str]], totals: dict[str, int], as_json: bool) -> None:
    rows = [
        {"queue": name, "task": task, "reason": reason, "count": number}
        for (name, task, reason), number in counts.most_common()
    ]
    if as_json:
        print_json({"queues": totals, "reasons": rows})
        return
    for row in rows:
        echo(f"{row['count']:>7}  {row['queue']}  {row['task'] or '?'}  {row['reason']}")
    _print_totals(totals)


def _why(delivery: Delivery) -> tuple[str | None, str]:
    headers = delivery.properties.headers or {}
    return header_text(headers.get("task")), reason(headers)


def _print_totals(totals: dict[str, int]) -> None:
    for name, number in totals.items():
        echo(f"{number} in {name}")
    if not totals:
        echo("no dead-letter queue exists yet")


@command.command("show")
@click.argument("task_id")
@_queue_options
@json_option
@click.pass_obj
def show(settings: Globals, task_id: str, queue: str | None, all_queues: bool, as_json: bool) -> None:
    """Everything about one message: headers and body."""
    app = settings.load()
    with open_admin(app) as admin:
        names = _names(app, admin, queue, all_queues)
        deliveries = [delivery for name in names for delivery in _matching(admin.browse(name, ALL), None, (task_id,))]
    if not deliveries:
        raise click.ClickException(f"no message with the id {task_id!r} in {', '.join(names) or 'any queue'}")
    if as_json:
        print_json([_full_entry(delivery) for delivery in deliveries])
        return
    for delivery in deliveries:
        print_json(delivery.properties.headers)
        echo_text(_readable(delivery))


def _readable(delivery: Delivery) -> str:
    """The body for a terminal. One that is encrypted stays so, also for who has the keys: terminals are recorded."""
    if delivery.properties.content_type != ENCRYPTED:
        return delivery.body.decode(errors="replace")
    try:
        return f"({len(delivery.body)} bytes, encrypted with the key {key_id_of(delivery.body)})"
    except SecurityError as error:
        return f"({error})"


def _full_entry(delivery: Delivery) -> JsonObject:
    properties = delivery.properties
    return {
        **as_entry(delivery),
        "content_type": properties.content_type,
        "content_encoding": properties.content_encoding,
        "correlation_id": properties.correlation_id,
        "reply_to": properties.reply_to,
        "headers": properties.headers,
        "body": delivery.body,
    }


@command.command("retry", short_help="Publish messages to their queue again.")
@click.argument("task_ids", nargs=-1)
@_queue_options
@click.option("-t", "--task", help="Only this task.")
@click.option("--all", "everything", is_flag=True, help="All messages.")
@click.option("--to", metavar="QUEUE", help="To this queue [each to the one it died in].")
@click.option("--drop-expiry", is_flag=True, help="Also what has expired; its `expires` is taken off.")
@params.rate_option
@json_option
@click.pass_obj
def retry(
    settings: Globals,
    task_ids: tuple[str, ...],
    queue: str | None,
    all_queues: bool,
    task: str | None,
    everything: bool,
    to: str | None,
    drop_expiry: bool,
    rate: float | None,
    as_json: bool,
) -> int:
    """Publish messages to their work queue again; each leaves the dead-letter queue after the broker's confirm.

    A task that has expired would be dropped by the next worker, so it stays, unless --drop-expiry is given. So does a unique one
    while another call has its key: it would end REVOKED.
    """
    if not (task_ids or task or everything):
        raise click.UsageError("say which: TASK_IDS, --task NAME or --all")
    app = settings.load()
    expired: list[str] = []
    held: dict[str, str] = {}
    convert = _retrying(app, task, task_ids, to, None if drop_expiry else expired, Pace(app, rate), held)
    moved: dict[str, int] = {}
    failed = 0
    failure: Exception | None = None
    with open_admin(app) as admin:
        for name in _names(app, admin, queue, all_queues):
            done = admin.move(name, app.publisher, convert)
            moved[name], failed, failure = done.moved, failed + done.failed, failure or done.failure
    app.close()
    if as_json:
        why = str(failure) if failure else None
        print_json({"retried": moved, "expired": expired, "held": held, "failed": failed, "error": why})
    else:
        for name, number in moved.items():
            echo(f"{number} back to work from {name}")
        for task_id in expired:
            echo(f"{task_id} has expired and stays; --drop-expiry runs it all the same", err=True)
        for task_id, holder in held.items():
            echo(
                f"{task_id} stays: its unique key is that of {holder}, which waits or runs; it would end REVOKED",
                err=True,
            )
        if failure is not None:
            summary = f"{count(failed, 'message')} could not be published and stay where they were, the first because:"
            echo(f"amqtask: {summary} {failure}", err=True)
    return 1 if failure is not None or (not sum(moved.values()) and task_ids) else 0


def _retrying(
    app: AmqTask,
    task: str | None,
    ids: Sequence[str],
    to: str | None,
    expired: list[str] | None,
    pace: Pace,
    held: dict[str, str],
) -> Callable[[Delivery], Message | None]:
    """What `move` calls for each delivery: the message to publish, or None. Ids of expired ones are added to `expired`; with None
    their expiry is dropped. Those of unique ones whose key another call has go to `held`, with that one's."""
    suffix: str = app.conf.task_dead_letter_suffix
    now = time.time()

    def convert(delivery: Delivery) -> Message | None:
        if next(_matching([delivery], task, ids), None) is None:
            return None
        headers = delivery.properties.headers or {}
        is_late = has_expired(headers, now)
        if is_late and expired is not None:
            expired.append(str(headers.get("id")))
            return None
        message = back_to_work(delivery, to or work_queue_of(delivery, suffix), without_expiry=is_late)
        holder = app.caller.key_holder(message)
        if holder is not None:
            held[str(headers["id"])] = holder
            return None
        return pace(message)

    return convert


@command.command("purge", short_help="Delete all messages of a queue.")
@_queue_options
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@json_option
@click.pass_obj
def purge(settings: Globals, queue: str | None, all_queues: bool, force: bool, as_json: bool) -> None:
    """Delete all dead-lettered messages of a queue. They cannot be brought back."""
    app = settings.load()
    with open_admin(app) as admin:
        names = _names(app, admin, queue, all_queues)
        total = sum(admin.count(name) for name in names)
    if not force:  # with no connection that could break while the question stands
        click.confirm(f"Delete {count(total, 'message')} in {', '.join(names)}?", abort=True, err=as_json)
    with open_admin(app) as admin:
        purged = {name: admin.purge(name) for name in names}
    if as_json:
        print_json({"purged": purged})
        return
    for name, number in purged.items():
        echo(f"Purged {count(number, 'message')} from {name}.")

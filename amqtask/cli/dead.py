"""`amqtask dead`: what was dead-lettered, why, and back to work with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from amqtask.cli.main import Globals
from amqtask.message import Delivery, Message, Properties
from amqtask.protocol.task import strip_death_headers
from amqtask.transport.admin import QueueAdmin

if TYPE_CHECKING:
    from amqtask.app import AmqTask

REASON = "x-amqtask-reason"
OURS = "x-amqtask-"
ALL = 1_000_000


def reason(headers: Mapping[str, Any]) -> str:
    """Why a message died: our own words, else the broker's x-death entry."""
    if REASON in headers:
        return str(headers[REASON])
    for death in headers.get("x-death") or ():
        return f"{death.get('reason')} in {death.get('queue')} ({death.get('count')}×)"
    return "unknown"


def back_to_work(delivery: Delivery) -> Message:
    """The message as it was published, for the queue that it died in; its attempts count from zero again."""
    old = delivery.properties
    headers = strip_death_headers(dict(old.headers or {}))
    queue = str(headers.get(f"{OURS}queue") or delivery.queue.removesuffix(".dead"))
    headers = {key: value for key, value in headers.items() if not key.startswith(OURS) and key != "x-delivery-count"}
    properties = Properties(
        content_type=old.content_type,
        content_encoding=old.content_encoding,
        headers=headers,
        delivery_mode=2,
        priority=old.priority,
        correlation_id=old.correlation_id,
        reply_to=old.reply_to,
        message_id=old.message_id,
    )
    return Message(body=delivery.body, properties=properties, exchange="", routing_key=queue)


def _matching(deliveries: list[Delivery], task: str | None, ids: tuple[str, ...]) -> Iterator[Delivery]:
    for delivery in deliveries:
        headers = delivery.properties.headers or {}
        if (task is None or headers.get("task") == task) and (not ids or headers.get("id") in ids):
            yield delivery


def _name(app: AmqTask, queue: str | None) -> str:
    work = queue or app.conf.task_default_queue
    suffix: str = app.conf.task_dead_letter_suffix
    return work if work.endswith(suffix) else f"{work}{suffix}"


@click.group("dead")
def command() -> None:
    """List, show, retry or purge dead-lettered messages (of the default queue, or of -Q)."""


@command.command("list")
@click.option("-Q", "--queue", help="The work queue (its dead-letter queue is meant).")
@click.option("-t", "--task", help="Only this task.")
@click.option("-n", "--limit", type=int, default=100, show_default=True)
@click.pass_obj
def list_(settings: Globals, queue: str | None, task: str | None, limit: int) -> None:
    """One line a message: id, task, attempts, reason."""
    app = settings.load()
    with QueueAdmin(app.broker_addresses) as admin:
        name = _name(app, queue)
        total, found = admin.count(name), admin.browse(name, limit)
    for delivery in _matching(found, task, ()):
        headers = delivery.properties.headers or {}
        attempts = headers.get(f"{OURS}attempts", "-")
        click.echo(f"{headers.get('id', '?')}  {headers.get('task', '?')}  attempts={attempts}  {reason(headers)}")
    click.echo(f"{total} in {name}")


@command.command("show")
@click.argument("task_id")
@click.option("-Q", "--queue")
@click.pass_obj
def show(settings: Globals, task_id: str, queue: str | None) -> None:
    """Everything about one message: headers and body."""
    app = settings.load()
    name = _name(app, queue)
    with QueueAdmin(app.broker_addresses) as admin:
        found = list(_matching(admin.browse(name, ALL), None, (task_id,)))
    if not found:
        raise click.ClickException(f"no message with the id {task_id!r} in {name}")
    for delivery in found:
        click.echo(json.dumps(delivery.properties.headers, indent=2, default=repr))
        click.echo(delivery.body.decode(errors="replace"))


@command.command("retry")
@click.argument("task_ids", nargs=-1)
@click.option("-Q", "--queue")
@click.option("-t", "--task", help="Only this task.")
@click.option("--all", "everything", is_flag=True, help="All messages.")
@click.pass_obj
def retry(settings: Globals, task_ids: tuple[str, ...], queue: str | None, task: str | None, everything: bool) -> None:
    """Publish messages to their work queue again; each leaves the dead-letter queue after the broker's confirm."""
    if not (task_ids or task or everything):
        raise click.UsageError("say which: TASK_IDS, --task NAME or --all")
    app = settings.load()
    name = _name(app, queue)

    def convert(delivery: Delivery) -> Message | None:
        wanted = next(_matching([delivery], task, task_ids), None)
        return back_to_work(delivery) if wanted is not None else None

    with QueueAdmin(app.broker_addresses) as admin:
        moved = admin.move(name, admin.count(name), convert)
    click.echo(f"{moved} back to work from {name}")


@command.command("purge")
@click.option("-Q", "--queue")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@click.pass_obj
def purge(settings: Globals, queue: str | None, force: bool) -> None:
    """Delete all dead-lettered messages of a queue. They cannot be brought back."""
    app = settings.load()
    name = _name(app, queue)
    with QueueAdmin(app.broker_addresses) as admin:
        if not force:
            click.confirm(f"Delete {admin.count(name)} messages in {name}?", abort=True)
        click.echo(f"Purged {admin.purge(name)} messages from {name}.")

"""`amqtask limits`: limits over all workers, how far they are used, and other numbers for them, without a deploy."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from amqtask.cli.base import Globals, echo, json_option, print_json, print_table
from amqtask.ground.printable import local_time

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.client.flow_store import LimitState

# Keys of a limit that a table has.
MOST_SHOWN = 3


@click.group("limits", invoke_without_command=True)
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Each task's limits: what holds, what the code says, how many run and wait (about), the keys with most of both."""
    if ctx.invoked_subcommand is not None:
        return
    with _load(ctx.obj) as app:
        limits = app.limits.read()
    if as_json:
        print_json([asdict(limit) | {"keys": [use._asdict() for use in limit.keys]} for limit in limits])
    elif limits:
        print_table(("TASK", "LIMIT", "VALUE", "RUNNING", "WAITING", "MOST", "SET BY"), map(_row, limits))
    else:
        echo("No task has a limit.")


@command.command("set")
@click.argument("task")
@click.argument("limit")
@click.argument("value")
@click.option("--burst", type=click.IntRange(min=1), help="Of a rate: how many may begin at once after a pause.")
@click.option("--by", metavar="WHO", help="Who wants that, for those who look.  [default: user@host]")
@click.pass_obj
def set_command(settings: Globals, task: str, limit: str, value: str, burst: int | None, by: str | None) -> None:
    """Have a limit be another number (20, 500/m) in all workers from now on, until `amqtask limits reset`, whatever the code
    says. LIMIT as `amqtask limits` writes it: concurrency, "rate by tenant" …"""
    with _load(settings) as app:
        app.limits.set(task, limit, value, burst=burst, by=by)
    echo(f"{limit} of {task} is {value}")


@command.command("reset")
@click.argument("task")
@click.argument("limit")
@click.pass_obj
def reset_command(settings: Globals, task: str, limit: str) -> None:
    """Have a limit be what the code says again."""
    with _load(settings) as app:
        was_set = app.limits.reset(task, limit)
    echo(f"{limit} of {task} is what the code says{'' if was_set else ', as it was'}")


def _load(settings: Globals) -> AmqTask:
    app = settings.load()
    app.load_tasks()
    return app


def _row(limit: LimitState) -> tuple[object, ...]:
    value = limit.value if limit.value == limit.in_code else f"{limit.value} (code: {limit.in_code})"
    keys = ", ".join(f"{use.key} {use.running}+{use.waiting}" for use in limit.keys[:MOST_SHOWN] if use.key)
    setting = None if limit.since is None else f"{limit.by}, {local_time(limit.since)}"
    return limit.task, limit.limit, value, limit.running, limit.waiting, keys or None, setting

"""`amqtask tasks`: find and show tasks by their history."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING

import click

from amqtask.cli.globals import Globals
from amqtask.cli.output import duration, echo, echo_text, json_option, local_time, print_json, print_table
from amqtask.cli.params import Moment

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonObject
    from amqtask.history.client import PastTask, TaskHistory

_COLUMNS = ("TIME", "STATE", "TASK", "ID", "QUEUE", "WAITED", "RAN", "WORKER", "ERROR")
# Characters of an error in a table.
_LONGEST_ERROR = 60


@click.group("tasks")
def command() -> None:
    """Find and show tasks by their history (task_history, docs/history.md)."""


@command.command("find")
@click.argument("text", required=False)
@click.option(
    "-s", "--state", multiple=True, help="SUCCESS, FAILURE, RETRY, STARTED, RECEIVED, PENDING, REVOKED; several."
)
@click.option("-t", "--task", help="Its name.")
@click.option("-Q", "--queue", help="Its queue.")
@click.option("-w", "--worker", help="The worker that had it last.")
@click.option("-e", "--error", help="The class of its exception, such as ValueError.")
@click.option("--since", type=Moment(), help="First heard of since then: 2h, 7d, 2026-11-30T08:15.")
@click.option("--until", type=Moment(), help="First heard of before that.")
@click.option("--stamp", metavar="NAME=VALUE", help="With this stamp.")
@click.option("--root", "root_id", metavar="ID", help="All tasks of one workflow.")
@click.option("-n", "--limit", type=click.IntRange(min=1), default=50, show_default=True, help="How many.")
@click.option("--after", metavar="CURSOR", help="Go on after a task: the `cursor` of its --json.")
@json_option
@click.pass_obj
def find(
    settings: Globals,
    text: str | None,
    state: tuple[str, ...],
    task: str | None,
    queue: str | None,
    worker: str | None,
    error: str | None,
    since: datetime | None,
    until: datetime | None,
    stamp: str | None,
    root_id: str | None,
    limit: int,
    after: str | None,
    as_json: bool,
) -> None:
    """The newest tasks for which all of this holds. TEXT are words (or their beginnings) in arguments and errors."""
    app = settings.load()
    try:
        tasks = app.history.find(
            text=text,
            state=state or None,
            task=task,
            queue=queue,
            worker=worker,
            error=error,
            since=since,
            until=until,
            stamp=_stamp(stamp),
            root_id=root_id,
            limit=limit,
            after=after,
        )
    finally:
        app.close()
    if as_json:
        print_json([document(one) for one in tasks])
    elif tasks:
        print_table(_COLUMNS, [_row(one) for one in tasks])
    else:
        echo("No task fits. (Only what `amqtask history` has taken in is found.)", err=True)


def _stamp(written: str | None) -> tuple[str, str] | None:
    if written is None:
        return None
    name, separator, value = written.partition("=")
    if not separator:
        raise click.UsageError("--stamp wants NAME=VALUE")
    return name, value


def _row(task: PastTask) -> list[object]:
    error = task.exception if task.exception is None or task.state == "SUCCESS" else task.exception[:_LONGEST_ERROR]
    return [
        local_time(task.first),
        task.state,
        task.name,
        task.id,
        task.queue,
        duration(task.waited),
        duration(task.runtime),
        task.worker,
        error if task.state != "SUCCESS" else None,
    ]


def document(task: PastTask) -> JsonObject:
    """A task as JSON; without its message, which may be large and is nobody's to see."""
    fields = asdict(task)
    fields["can_run_again"] = fields.pop("message") is not None
    return fields


@command.command("show")
@click.argument("task_id")
@json_option
@click.pass_obj
def show(settings: Globals, task_id: str, as_json: bool) -> None:
    """One task: what happened to it and when, arguments, result or error, who called it and what it called."""
    app = settings.load()
    try:
        history = app.history.get(task_id)
    finally:
        app.close()
    if history is None:
        raise click.ClickException(f"nothing is known of a task {task_id}")
    if as_json:
        family = {"parents": history.parents, "children": history.children}
        print_json(document(history.task) | {name: [document(one) for one in tasks] for name, tasks in family.items()})
    else:
        _print(history)


def _print(history: TaskHistory) -> None:
    task = history.task
    facts: list[tuple[str, object]] = [
        ("id", task.id),
        ("state", task.state),
        ("queue", task.queue),
        ("worker", task.worker),
        ("args", task.args),
        ("kwargs", task.kwargs),
        ("retries", task.retries or None),
        ("eta", task.eta),
        ("expires", task.expires),
        ("stands for", task.rerun_of),
        ("waited", duration(task.waited)),
        ("ran", duration(task.runtime)),
        ("result", task.result),
        ("error", task.exception),
        *((f"stamp {name}", ", ".join(values)) for name, values in task.stamps.items()),
    ]
    echo(task.name or "(no event has told its name)")
    for title, value in facts:
        if value is not None:
            echo(f"  {title:<10}  {value}")
    echo()
    print_table(
        ("TIME", "EVENT", "BY"), [(f"{local_time(s.at)}.{s.at:%f}"[:-3], s.event, s.worker) for s in task.steps]
    )
    for title, relatives in (("Called by", history.parents), ("Called", history.children)):
        if relatives:
            echo(f"\n{title}:")
            print_table(_COLUMNS[:4], [_row(one)[:4] for one in relatives])
    if task.traceback and task.state != "SUCCESS":
        echo()
        echo_text(task.traceback)

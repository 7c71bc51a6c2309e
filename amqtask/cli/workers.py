"""`amqtask workers`: what each worker is, runs and has done."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from amqtask.cli.base import Globals, echo, json_option, print_json, print_table
from amqtask.cli.broker import load_shared
from amqtask.console.pages import worker_rows
from amqtask.ground.printable import duration

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonObject

_COLUMNS = (
    ("WORKER", "worker"),
    ("STATE", "state"),
    ("POOL", "pool"),
    ("SLOTS", "slots"),
    ("RUNNING", "running"),
    ("DONE", "done"),
    ("HOLDS", "prefetch"),
    ("UP", "up"),
    ("QUEUES", "queues"),
    ("PAUSED", "paused"),
)


@click.command("workers")
@click.option(
    "-t", "--timeout", type=click.FloatRange(min=0.1), default=1.0, show_default=True, help="Seconds for answers."
)
@json_option
@click.pass_obj
def command(settings: Globals, timeout: float, as_json: bool) -> int:
    """The workers that answer; with task_history those that are silent or gone, too. Exit code 69 when none answers."""
    with load_shared(settings) as app:
        rows = worker_rows(app, timeout)
    if as_json:
        print_json(rows)
    elif rows:
        print_table([title for title, _ in _COLUMNS], [[_cell(row, field) for _, field in _COLUMNS] for row in rows])
    else:
        echo("No worker answers. Is one running on this broker?", err=True)
    return 0 if any(row["state"] == "there" for row in rows) else 69


def _cell(row: JsonObject, field: str) -> object:
    value = row[field]
    if field == "up":
        return duration(value)
    return (", ".join(map(str, value)) or None) if isinstance(value, list) else value

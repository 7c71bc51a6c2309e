"""`amqtask workers`: what each worker is, runs and has done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from amqtask.cli.broker import refuse_memory
from amqtask.cli.globals import Globals
from amqtask.cli.output import duration, echo, json_option, print_json, print_table

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.ground.shapes import JsonObject
    from amqtask.history.client import PastWorker

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
    """The workers that answer; and with task_history those that are gone without a word. Exit code 69 when none answers."""
    app = settings.load()
    refuse_memory(app)
    try:
        rows = look(app, timeout)
    finally:
        app.close()
    if as_json:
        print_json(rows)
    elif rows:
        print_table([title for title, _ in _COLUMNS], [[_cell(row, field) for _, field in _COLUMNS] for row in rows])
    else:
        echo("No worker answers. Is one running on this broker?", err=True)
    return 0 if any(row["state"] == "there" for row in rows) else 69


def look(app: AmqTask, timeout: float) -> list[JsonObject]:
    """A row for each worker."""
    stats = app.control.ask("stats", {}, timeout=timeout)
    names = list(stats)
    limit = len(names)
    active = app.control.ask("active", {"safe": True}, timeout=timeout, limit=limit) if names else {}
    queues = app.control.ask("active_queues", {}, timeout=timeout, limit=limit) if names else {}
    rows = [_row(name, stats[name], active.get(name), queues.get(name)) for name in sorted(names)]
    if app.conf.task_history:
        rows += [_gone(worker) for worker in app.history.workers() if worker.is_gone and worker.hostname not in stats]
    return rows


def _row(name: str, stats: Any, active: Any, queues: Any) -> JsonObject:
    """Of what a worker answers; Celery's have other numbers, and what is not there is None."""
    numbers = _mapping(stats)
    pool, total = _mapping(numbers.get("pool")), _mapping(numbers.get("total"))
    return {
        "worker": name,
        "state": "there",
        "pool": pool.get("implementation"),
        "slots": pool.get("max-concurrency"),
        "running": len(active) if isinstance(active, list) else None,
        "done": sum(number for number in total.values() if isinstance(number, int)),
        "prefetch": numbers.get("prefetch_count"),
        "up": numbers.get("uptime"),
        "pid": numbers.get("pid"),
        "queues": [queue.get("name") for queue in queues if isinstance(queue, dict)]
        if isinstance(queues, list)
        else [],
        "paused": numbers.get("paused") or [],
        "tasks": active if isinstance(active, list) else [],
    }


def _mapping(value: object) -> JsonObject:
    return value if isinstance(value, dict) else {}


def _gone(worker: PastWorker) -> JsonObject:
    row = _row(worker.hostname, {}, None, None)
    return row | {"state": "gone", "done": worker.processed, "last_heard": worker.last_heard}


def _cell(row: JsonObject, field: str) -> object:
    value = row[field]
    if field == "up":
        return duration(value)
    return (", ".join(map(str, value)) or None) if isinstance(value, list) else value

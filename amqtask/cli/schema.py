"""`amqtask schema`: the application's tasks for programs in other languages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from amqtask.cli.base import Globals, echo
from amqtask.cli.broker import task_routes
from amqtask.cli.params import complete_tasks
from amqtask.exceptions import ConfigurationError
from amqtask.ground.plugins import did_you_mean
from amqtask.schemas import Contracts, asyncapi, json_schema, read_contracts, typescript

if TYPE_CHECKING:
    from amqtask.app import AmqTask


@click.command("schema")
@click.argument("names", nargs=-1, metavar="[TASK]…", shell_complete=complete_tasks)
@click.option("--asyncapi", "form", flag_value="asyncapi", help="An AsyncAPI 3.0 document.")
@click.option("--typescript", "form", flag_value="typescript", help="A producer in TypeScript, over amqplib.")
@click.option(
    "--api-version", default="1.0.0", show_default=True, help="With --asyncapi: the version of your application."
)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write to this file.")
@click.pass_obj
def command(settings: Globals, names: tuple[str, ...], form: str | None, api_version: str, output: Path | None) -> int:
    """Describe tasks (all, or these) from their signatures: JSON Schema of arguments and results, or …"""
    app = settings.load()
    title = app.main or "amqtask"
    if form == "typescript":
        if app.broker.transport == "redis":
            raise ConfigurationError("the producer speaks AMQP, and the application's broker is Redis")
        text = typescript.producer(title, _contracts(app, names, typescript.REFS))
    elif form == "asyncapi":
        document = asyncapi.asyncapi(title, api_version, app.broker.info(), _contracts(app, names, asyncapi.REFS))
        text = json.dumps(document, indent=2, ensure_ascii=False)
    else:
        text = json.dumps(json_schema(title, _contracts(app, names, typescript.REFS)), indent=2, ensure_ascii=False)
    if output is not None:
        output.write_text(text if text.endswith("\n") else f"{text}\n")
    else:
        click.echo(text)
    return 0


def _contracts(app: AmqTask, names: tuple[str, ...], refs: str) -> Contracts:
    """Raises: UsageError for a task that there is not, ConfigurationError without pydantic."""
    routes = {destination.task: destination.route for destination in task_routes(app)}
    for name in names:
        if name not in routes:
            raise click.UsageError(f"there is no task {name!r}.{did_you_mean(name, routes)}")
    tasks = [(app.tasks[name], routes[name]) for name in names or routes]
    return read_contracts(tasks, refs=refs, warn=lambda text: echo(f"schema: {text}", err=True))

"""`amqtask result ID`: print what came of a task."""

from __future__ import annotations

import click

from amqtask.cli.main import Globals


@click.command("result")
@click.argument("task_id")
@click.option("-t", "--task", help="Accepted for Celery's sake: all tasks share one result backend.")
@click.option("--traceback", is_flag=True, help="The traceback instead of the result.")
@click.pass_obj
def command(settings: Globals, task_id: str, task: str | None, traceback: bool) -> None:
    """Print the result of task TASK_ID (needs a backend that other processes can read, such as Redis)."""
    del task
    app = settings.load()
    result = app.AsyncResult(task_id)
    if not result.ready():
        raise click.ClickException(f"task {task_id} is {result.state}")
    click.echo(result.traceback or "" if traceback else repr(result.result))

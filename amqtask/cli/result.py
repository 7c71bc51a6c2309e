"""`amqtask result ID`: print what came of a task."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from amqtask.cli.globals import Globals
from amqtask.cli.output import echo_text, json_option, print_json
from amqtask.exceptions import BackendNotConfigured

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonObject
    from amqtask.result import UntypedResult


@click.command("result")
@click.argument("task_id")
@click.option("-t", "--task", help="Accepted for Celery's sake: all tasks share one result backend.")
@click.option("--traceback", is_flag=True, help="The traceback instead of the result.")
@click.option("-w", "--wait", type=click.FloatRange(min=0), help="Wait so many seconds for the result.")
@json_option
@click.pass_obj
def command(
    settings: Globals, task_id: str, task: str | None, traceback: bool, wait: float | None, as_json: bool
) -> int:
    """Print the result of task TASK_ID; exit code 1 while there is none.

    Needs a backend that other processes can read, such as Redis: what rpc:// stores only its caller gets.
    """
    del task
    app = settings.load()
    url = app.backend_url
    if not url:
        raise BackendNotConfigured("the application has no result backend: set result_backend, or --result-backend")
    if url.partition("://")[0] == "rpc":
        raise click.ClickException(
            "results over rpc:// go to the process that made the call and nobody else; use e.g. redis:// to look at them"
        )
    result = app.AsyncResult(task_id)
    if wait is not None:
        result.get(timeout=wait, propagate=False)
    is_ready = result.ready()
    if as_json:
        print_json(_as_data(result))
        return 0 if is_ready else 1
    if not is_ready:
        raise click.ClickException(f"task {task_id} is {result.state}")
    echo_text(result.traceback or "" if traceback else repr(result.result))
    return 0


def _as_data(result: UntypedResult) -> JsonObject:
    value = result.result
    return {
        "id": str(result.id),
        "state": result.state,
        "result": repr(value) if isinstance(value, BaseException) else value,
        "traceback": result.traceback,
        "date_done": result.date_done,
    }

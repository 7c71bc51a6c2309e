"""The commands `call` and `result`: publish a task by its name, print the result of one."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from amqtask.cli import params
from amqtask.cli.base import Globals, ParamType, echo_text, json_option, print_json, tell
from amqtask.cli.broker import load_shared
from amqtask.exceptions import BackendNotConfigured
from amqtask.ground.plugins import did_you_mean

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.ground.shapes import JsonObject, KeywordDict
    from amqtask.result import UntypedResult


class Json(ParamType):
    """A JSON value of one type."""

    def __init__(self, json_type: type, name: str) -> None:
        self.name = name
        self._json_type = json_type

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> object:
        if isinstance(value, self._json_type):
            return value
        try:
            parsed = json.loads(value)
        except ValueError as error:
            self.fail(f"{value!r} is not JSON: {error}", param, ctx)
        if not isinstance(parsed, self._json_type):
            self.fail(f"{value!r} is not a {self.name}", param, ctx)
        return parsed


class Moment(ParamType):
    """An ISO-8601 time."""

    name = "ISO-8601"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        try:
            return datetime.fromisoformat(str(value).replace("Z", "+00:00")).astimezone()
        except ValueError:
            self.fail(f"{value!r} is not an ISO-8601 time, e.g. 2026-01-31T12:00:00Z", param, ctx)


class Expiry(Moment):
    """Seconds, or an ISO-8601 time."""

    name = "seconds or ISO-8601"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return float(value)
        except ValueError:
            return super().convert(value, param, ctx)


def check(app: AmqTask, name: str, arguments: list[object], kwargs: KeywordDict) -> None:
    """What the loaded application knows. Another one's task it need not know, unless it has one of nearly that name.

    Raises: ClickException."""
    app.load_tasks()
    task = app.tasks.get(name)
    if task is None:
        hint = did_you_mean(name, app.tasks.own, alike=0.8)
        if hint:
            raise click.ClickException(f"no task {name!r} is registered.{hint}")
        return
    try:
        task.check_arguments(tuple(arguments), kwargs)
    except TypeError as error:
        raise click.ClickException(str(error)) from error


@click.command("call")
@click.argument("name", shell_complete=params.complete_tasks)
@click.option("-a", "--args", "arguments", type=Json(list, "JSON array"), default="[]", help="Positional arguments.")
@click.option("-k", "--kwargs", type=Json(dict, "JSON object"), default="{}", help="Keyword arguments.")
@click.option("--eta", type=Moment(), help="Not before this time.")
@click.option("--countdown", type=float, help="Not before so many seconds from now.")
@click.option("--expires", type=Expiry(), help="Not after.")
@click.option("--serializer", help="json, msgpack, yaml or pickle.")
@click.option("--queue", shell_complete=params.complete_queues, help="Queue to publish to.")
@click.option("--exchange", help="Exchange to publish to.")
@click.option("--routing-key", help="Routing key to publish with.")
@click.option("--priority", type=click.IntRange(0, 255), help="Priority of the message.")
@click.option("--task-id", help="Use this id instead of a new one.")
@json_option
@click.pass_obj
def call_command(
    settings: Globals, /, name: str, arguments: list[object], kwargs: KeywordDict, as_json: bool, **options: object
) -> None:
    """Publish task NAME and print its id, once the broker has confirmed it."""
    chosen_options = {key: value for key, value in options.items() if value is not None}
    with load_shared(settings) as app:
        check(app, name, arguments, kwargs)
        result = app.send_task(name, arguments, kwargs, **chosen_options)
    tell({"id": result.id, "task": name}, result.id, as_json=as_json)


@click.command("result")
@click.argument("task_id")
@click.option("-t", "--task", help="Accepted for Celery's sake: all tasks share one result backend.")
@click.option("--traceback", is_flag=True, help="The traceback instead of the result.")
@click.option("-w", "--wait", type=click.FloatRange(min=0), help="Wait so many seconds for the result.")
@json_option
@click.pass_obj
def result_command(
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

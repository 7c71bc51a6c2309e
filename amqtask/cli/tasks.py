"""`amqtask tasks`: find and show tasks by their history, run them again, revoke them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

import click

from amqtask.cli.base import Globals, echo, echo_text, gathered, json_option, print_json, print_table
from amqtask.cli.broker import load_shared
from amqtask.cli.params import Moment, rate_option
from amqtask.exceptions import AmqTaskError
from amqtask.ground.printable import count, duration, local_time
from amqtask.services.rerunning import run_all_again, run_edited
from amqtask.states import READY_STATES

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.ground.shapes import JsonObject
    from amqtask.history.client import PastTask, TaskHistory

_COLUMNS = ("TIME", "STATE", "TASK", "ID", "QUEUE", "WAITED", "RAN", "WORKER", "ERROR")
# Characters of an error in a table.
_LONGEST_ERROR = 60
# Tasks that one command changes at most, and ids in one order to the workers.
MOST_AT_ONCE, AT_ONCE = 10_000, 1_000
T = TypeVar("T", list[Any], dict[str, Any])


@click.group("tasks")
def command() -> None:
    """Find, show, run again and revoke tasks, by their history (task_history, docs/history.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Which tasks are meant."""

    state: tuple[str, ...]
    task: str | None
    queue: str | None
    worker: str | None
    error: str | None
    text: str | None
    since: datetime | None
    until: datetime | None
    stamp: str | None
    root_id: str | None

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing."""
        return not any(getattr(self, field.name) for field in fields(self))

    def find(self, app: AmqTask, *, limit: int, after: str | None = None) -> list[PastTask]:
        """The tasks."""
        asked = {**asdict(self), "state": self.state or None, "stamp": _stamp(self.stamp)}
        return app.history.find(**asked, limit=limit, after=after)


_search_options = gathered(
    "search",
    Search,
    [
        click.option(
            "-s",
            "--state",
            multiple=True,
            help="SUCCESS, FAILURE, RETRY, STARTED, RECEIVED, PENDING, REVOKED; several.",
        ),
        click.option("-t", "--task", help="Its name."),
        click.option("-Q", "--queue", help="Its queue."),
        click.option("-w", "--worker", help="The worker that had it last."),
        click.option("-e", "--error", help="The class of its exception, such as ValueError."),
        click.option("--text", help="Words in its arguments or its error; addr* for all that begin so."),
        click.option("--since", type=Moment(), help="First heard of since then: 2h, 7d, 2026-11-30T08:15."),
        click.option("--until", type=Moment(), help="First heard of before that."),
        click.option("--stamp", metavar="NAME=VALUE", help="With this stamp."),
        click.option("--root", "root_id", metavar="ID", help="All tasks of one workflow."),
    ],
)


@command.command("find")
@click.argument("words", required=False)
@_search_options
@click.option("-n", "--limit", type=click.IntRange(min=1), default=50, show_default=True, help="How many.")
@click.option("--after", metavar="CURSOR", help="Go on after a task: the `cursor` of its --json.")
@json_option
@click.pass_obj
def find(settings: Globals, words: str | None, search: Search, limit: int, after: str | None, as_json: bool) -> None:
    """The newest tasks for which all of this holds. WORDS are what --text says, too."""
    with settings.load() as app:
        tasks = (replace(search, text=words) if words else search).find(app, limit=limit, after=after)
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
    del fields["message"]
    return fields


@command.command("show")
@click.argument("task_id")
@json_option
@click.pass_obj
def show(settings: Globals, task_id: str, as_json: bool) -> None:
    """One task: what happened to it and when, arguments, result or error, who called it and what it called."""
    with settings.load() as app:
        history = app.history.get(task_id)
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


@command.command("retry", short_help="Run tasks again.")
@click.argument("task_ids", nargs=-1)
@_search_options
@click.option(
    "-a", "--args", "args_text", metavar="JSON", help="Other arguments by position: a JSON list. One task only."
)
@click.option("-k", "--kwargs", "kwargs_text", metavar="JSON", help="Other arguments by name: a JSON object.")
@click.option("--to", metavar="QUEUE", help="To this queue [each to the one it was in].")
@rate_option
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@json_option
@click.pass_obj
def retry(
    settings: Globals,
    task_ids: tuple[str, ...],
    search: Search,
    args_text: str | None,
    kwargs_text: str | None,
    to: str | None,
    rate: float | None,
    force: bool,
    as_json: bool,
) -> int:
    """Run tasks again: TASK_IDS, or all that the options name, after a question with their number.

    A task runs as it was, under its own id: from its dead letter if there is one, else from the message that history has kept
    (task_history_arguments). With --args or --kwargs it is a new task, whose history points to the old one.
    """
    args, kwargs = _json(args_text, list, "--args"), _json(kwargs_text, dict, "--kwargs")
    reruns: list[JsonObject] = []
    failed: list[JsonObject] = []
    with load_shared(settings) as app:
        tasks = _meant(app, task_ids, search, failed)
        if (args is not None or kwargs is not None) and len(task_ids) != 1:
            raise click.UsageError("other arguments are for one task: name its id")
        _confirm(f"Run {count(len(tasks), 'task')} again?", task_ids, force, as_json)
        if args is None and kwargs is None:
            done = run_all_again(app, tasks, queue=to, rate=rate)
            reruns += [{"id": task_id} for task_id in done.done]
            failed += [{"id": task_id, "error": str(error)} for task_id, error in done.failed]
        for task in tasks if args is not None or kwargs is not None else ():
            try:
                reruns.append({"id": run_edited(app, task, args, kwargs, queue=to), "rerun_of": task.id})
            except AmqTaskError as error:
                failed.append({"id": task.id, "error": str(error)})
    return _tell("run again", reruns, failed, as_json)


@command.command("revoke", short_help="Have tasks not run.")
@click.argument("task_ids", nargs=-1)
@_search_options
@click.option("--terminate", is_flag=True, help="Also end those that run.")
@click.option("--signal", default="SIGTERM", show_default=True, help="With --terminate, on prefork.")
@click.option(
    "--tree", is_flag=True, help="Cancel them, with all that they have called or will call; TASK_IDS may be groups'."
)
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@json_option
@click.pass_obj
def revoke(
    settings: Globals,
    task_ids: tuple[str, ...],
    search: Search,
    terminate: bool,
    signal: str,
    tree: bool,
    force: bool,
    as_json: bool,
) -> int:
    """Have workers not run tasks: TASK_IDS, or all that the options name, after a question with their number.

    Of those that the options name, what has ended is left alone.
    """
    with settings.load() as app:
        # Also ids that history knows nothing of.
        ids = list(task_ids) or [task.id for task in _meant(app, (), search, []) if task.state not in READY_STATES]
        _confirm(f"Revoke {count(len(ids), 'task')}?", task_ids, force, as_json)
        for start in range(0, len(ids), AT_ONCE):
            revoke_some = app.control.cancel if tree else app.control.revoke
            revoke_some(ids[start : start + AT_ONCE], terminate=terminate, signal=signal)
    return _tell("revoked", [{"id": task_id} for task_id in ids], [], as_json)


def _meant(app: AmqTask, ids: Sequence[str], search: Search, unknown: list[JsonObject]) -> list[PastTask]:
    if ids:
        tasks = {task_id: history.task for task_id in ids if (history := app.history.get(task_id)) is not None}
        unknown += [{"id": task_id, "error": "nothing is known of it"} for task_id in ids if task_id not in tasks]
        return list(tasks.values())
    if search.is_empty:
        raise click.UsageError("say which: TASK_IDS, or options as for `amqtask tasks find`")
    return search.find(app, limit=MOST_AT_ONCE)


def _confirm(question: str, ids: Sequence[str], force: bool, as_json: bool) -> None:
    if not ids and not force:
        click.confirm(question, abort=True, err=as_json)


def _json(written: str | None, json_type: type[T], option: str) -> T | None:
    if written is None:
        return None
    try:
        value = json.loads(written)
    except ValueError as error:
        raise click.UsageError(f"{option} wants JSON: {error}") from error
    if not isinstance(value, json_type):
        raise click.UsageError(f"{option} wants a JSON {'list' if json_type is list else 'object'}")
    return value


def _tell(done: str, tasks: Sequence[JsonObject], failed: Sequence[JsonObject], as_json: bool) -> int:
    if as_json:
        print_json({done.replace(" ", "_"): tasks, "failed": failed})
    else:
        for task in tasks:
            old = f" (for {task['rerun_of']})" if "rerun_of" in task else ""
            echo(f"{task['id']} {done}{old}")
        for task in failed:
            echo(f"{task['id']}: {task['error']}", err=True)
    return 1 if failed else 0

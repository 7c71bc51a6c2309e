"""What a shell may offer for an argument: pools, the application's queues and tasks.

A failure offers nothing: while a line is being typed there is nowhere to report it, and the command itself will.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from amqtask.cli.globals import Globals

if TYPE_CHECKING:
    from amqtask.app import AmqTask


def pools(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The registered pools."""
    from importlib.metadata import entry_points

    return _fitting((point.name for point in entry_points(group="amqtask.pools")), incomplete)


def queues(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The application's queues; of a list `a,b` the last one is completed."""
    before, comma, last = incomplete.rpartition(",")
    names = _names_from_app(ctx, _queue_names)
    return [CompletionItem(f"{before}{comma}{item.value}") for item in _fitting(names, last)]


def tasks(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The application's tasks."""
    return _fitting(_names_from_app(ctx, _task_names), incomplete)


def _queue_names(app: AmqTask) -> Iterable[str]:
    from amqtask.cli.broker import known_queues

    return [queue.name for queue in known_queues(app)]


def _task_names(app: AmqTask) -> Iterable[str]:
    from amqtask.cli.broker import task_routes

    return [route.task for route in task_routes(app)]


def _names_from_app(ctx: click.Context, question: Callable[[AmqTask], Iterable[str]]) -> Iterable[str]:
    """Names from the application, which is loaded from the options of the line that is being completed."""
    root_params = ctx.find_root().params
    settings = Globals(app=ctx.params.get("told_app") or root_params.get("app"), config=root_params.get("config"))
    nowhere = io.StringIO()  # what the modules print is no completion
    try:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            return question(settings.load())
    except Exception:  # noqa: BLE001 - the user's modules are imported here; see above
        return ()


def _fitting(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in sorted(set(names)) if name.startswith(incomplete)]

"""What every sub-command has: the options before it, which lead to the application, and how it prints."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from amqtask.cli.handover import await_load
from amqtask.ground.printable import printable, printable_lines
from amqtask.ground.startup import no_collection

if TYPE_CHECKING:
    from types import FrameType

    from amqtask.app import AmqTask

    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # generic only in newer versions of click

PROGRAM = "amqtask"
COMPLETE_VARIABLE = "_AMQTASK_COMPLETE"


@dataclass(eq=False)
class Globals:
    """The options before the sub-command, and the app they lead to."""

    app: str | None = None
    broker: str | None = None
    result_backend: str | None = None
    config: str | None = None
    color: bool = True
    quiet: bool = False
    # Where the command was started, before --workdir.
    started_in: Path = field(default_factory=Path)
    loaded: Any = field(default=None, repr=False)
    _is_told: bool = False

    def load(self, app_path: str | None = None) -> AmqTask:
        """The application, with the command line's broker, backend and configuration put into its settings."""
        if not self._is_told:
            await_load()
            with no_collection():
                from amqtask.cli.find_app import find_app

            app: AmqTask = self.loaded or find_app(app_path or self.app)
            if self.config:
                app.conf.read_object(self.config)  # what it says counts more than the application
            if self.broker:
                app.conf.broker_url = self.broker
                os.environ.pop("CELERY_BROKER_URL", None)  # it would win over the settings
            if self.result_backend:
                app.conf.result_backend = self.result_backend
                os.environ.pop("CELERY_RESULT_BACKEND", None)
            app.set_current()  # whatever else its modules made: shared tasks and `current_app` are this one's
            self.loaded, self._is_told = app, True
        loaded: AmqTask = self.loaded
        return loaded


# -- Options that belong together.

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def with_options(*groups: Iterable[Decorator]) -> Decorator:
    """A command has all these, in this order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed([option for group in groups for option in group]):
            function = option(function)
        return function

    return decorate


def gathered(name: str, record: Callable[..., Any], options: Iterable[Decorator]) -> Decorator:
    """A command has these options, and gets them as one argument of that name: a `record`, a dataclass with a field for each."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(*args: object, **params: object) -> Any:
            values = {one.name: params.pop(one.name) for one in fields(record)}  # type: ignore[arg-type] # a dataclass
            return function(*args, **{name: record(**values)}, **params)

        return with_options(options)(command)

    return decorate


# -- How commands print data: tables for people, JSON for programs.

# Characters that one line may have.
LONGEST_LINE = 10_000
json_option = click.option("-j", "--json", "as_json", is_flag=True, help="Print JSON.")


# JSON of ours is escaped where it must be; a terminal takes more than that for commands.
_RAW = "[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"


def echo(text: str = "", *, err: bool = False, nl: bool = True) -> None:
    """Print one line, which may hold what strangers have written."""
    click.echo(printable(text, LONGEST_LINE), err=err, nl=nl)


def echo_text(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print text of several lines, which may hold what strangers have written."""
    click.echo(printable_lines(text), err=err, nl=nl)


def print_json(data: object, *, one_line: bool = False) -> None:
    """The data as one JSON document; what JSON has no form for (bytes, times) as text."""
    text = json.dumps(data, default=_as_text, indent=None if one_line else 2, ensure_ascii=False)
    click.echo(re.sub(_RAW, lambda match: f"\\u{ord(match[0]):04x}", text))


def tell(document: object, line: str, *, as_json: bool) -> None:
    """The document for programs, or the line for people."""
    if as_json:
        print_json(document)
    else:
        echo(line)


def _as_text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, datetime):
        return value.isoformat()
    return repr(value)


def print_table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns as wide as their widest cell, numbers to the right; None is shown as `-`."""
    body = [list(row) for row in rows]
    cells = [[printable(_cell(value), LONGEST_LINE) for value in row] for row in body]
    widths = [max(len(line[column]) for line in [list(titles), *cells]) for column in range(len(titles))]
    is_number = [
        bool(body) and all(row[column] is None or isinstance(row[column], (int, float)) for row in body)
        for column in range(len(titles))
    ]
    for line in [list(titles), *cells]:
        padded = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, is_number, strict=True)
        ]
        echo("  ".join(padded).rstrip())


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


@contextmanager
def signals_to(
    handler: Callable[[int, FrameType | None], object] | signal.Handlers, *signums: signal.Signals
) -> Iterator[None]:
    """Have the handler called for them, or what it stands for done (SIG_DFL, SIG_IGN), until the end of the block."""
    before = {signum: signal.signal(signum, handler) for signum in signums}
    try:
        yield
    finally:
        for signum, handler_before in before.items():
            signal.signal(signum, handler_before)

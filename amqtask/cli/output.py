"""How commands print data: tables for people, JSON for programs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime

import click

from amqtask.ground.printable import printable, printable_lines

# Characters that one line may have.
LONGEST_LINE = 10_000
json_option = click.option("-j", "--json", "as_json", is_flag=True, help="Print JSON.")


# JSON of ours is escaped where it must be; a terminal takes more than that for commands.
_RAW = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def echo(text: str = "", *, err: bool = False, nl: bool = True) -> None:
    """Print one line, which may hold what strangers have written."""
    click.echo(printable(text, LONGEST_LINE), err=err, nl=nl)


def echo_text(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print text of several lines, which may hold what strangers have written."""
    click.echo(printable_lines(text), err=err, nl=nl)


def print_json(data: object, *, one_line: bool = False) -> None:
    """The data as one JSON document; what JSON has no form for (bytes, times) as text."""
    text = json.dumps(data, default=_as_text, indent=None if one_line else 2, ensure_ascii=False)
    click.echo(_RAW.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


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

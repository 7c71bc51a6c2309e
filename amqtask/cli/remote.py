"""What `inspect`, `control` and `status` share: options, and how replies are printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import click

from amqtask.cli.worker import CommaList

REMOTE: tuple[Callable[[Any], Any], ...] = (
    click.option("-t", "--timeout", type=float, default=1.0, show_default=True, help="Seconds to wait for replies."),
    click.option("-d", "--destination", type=CommaList(), default=(), help="Only these nodes (celery@host,…)."),
    click.option("-j", "--json", "as_json", is_flag=True, help="Print JSON."),
)


def remote_options(function: Any) -> Any:
    """The options of every remote command."""
    for option in reversed(REMOTE):
        function = option(function)
    return function


def print_replies(replies: Mapping[str, Any], *, as_json: bool) -> None:
    """One block a node; raises ClickException (exit code 1) when nobody answered."""
    if as_json:
        click.echo(json.dumps(dict(replies), default=repr))
    else:
        for node, reply in sorted(replies.items()):
            click.echo(f"->  {node}: {_readable(reply)}")
    if not replies:
        raise click.ClickException("No nodes replied within time constraint. Is a worker running on this broker?")
    if not as_json:
        click.echo(f"\n{len(replies)} node{'' if len(replies) == 1 else 's'} online.")


def _readable(reply: Any) -> str:
    if isinstance(reply, Mapping) and set(reply) == {"ok"}:
        return f"OK {reply['ok']}"
    if isinstance(reply, Mapping) and set(reply) == {"error"}:
        return f"ERROR {reply['error']}"
    if isinstance(reply, list):
        return "".join(f"\n    * {item}" for item in reply) or "- empty -"
    return json.dumps(reply, indent=4, default=repr)

"""What `inspect`, `control` and `status` share: options, words to arguments, and how replies are printed."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pprint import pformat
from typing import Any

import click

from amqtask.cli.main import Globals
from amqtask.cli.output import echo, echo_text
from amqtask.cli.params import CommaList
from amqtask.commands import CommandInfo, Kind, commands_of, find_command
from amqtask.exceptions import AppNotFound, ConfigurationError, PublishError
from amqtask.printable import printable, printable_lines
from amqtask.questions import MATCHERS

# As Celery's exit code when no node replied, or there is no broker: Kubernetes probes look at it.
EX_UNAVAILABLE = getattr(os, "EX_UNAVAILABLE", 69)
REMOTE: tuple[Callable[[Any], Any], ...] = (
    click.option("-t", "--timeout", type=float, default=None, help="Seconds to wait for replies (default: 1)."),
    click.option("-d", "--destination", type=CommaList(), default=(), help="Only these nodes (celery@host,…)."),
    click.option("--pattern", metavar="PATTERN", help="Only nodes whose name fits, e.g. 'celery@web*'."),
    click.option("--matcher", type=click.Choice(MATCHERS), default=None, help="What PATTERN is (default: glob)."),
    click.option("-j", "--json", "as_json", is_flag=True, help="Print JSON."),
)


class Unavailable(click.ClickException):
    """Nobody answered."""

    exit_code = EX_UNAVAILABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """What the options of a remote command say. `timeout` is seconds, None the command's own."""

    timeout: float | None
    destination: tuple[str, ...]
    pattern: str | None
    matcher: str | None
    as_json: bool


def remote_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every remote command, handed to it as `remote`."""

    @functools.wraps(function)
    def collected(*args: Any, **given: Any) -> Any:
        names = [field.name for field in fields(Remote)]
        return function(*args, remote=Remote(**{name: given.pop(name) for name in names}), **given)

    decorated: Callable[..., Any] = collected
    for option in reversed(REMOTE):
        decorated = option(decorated)
    return decorated


def listing(kind: Kind) -> str:
    """The names of the built-in commands, for the help text."""
    return "Commands: " + ", ".join(sorted(commands_of(kind))) + ". --list explains them, and the application's own."


def find(settings: Globals, kind: Kind, name: str | None) -> CommandInfo:
    """The command that was asked for; the application's modules may bring it. Raises: UsageError."""
    if name is None:
        raise click.UsageError(f"Missing argument 'COMMAND'. There are: {', '.join(commands_of(kind))}.")
    settings.load().import_modules()
    try:
        return find_command(kind, name)
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from error


def print_list(settings: Globals, kind: Kind) -> None:
    """All commands of a kind; the application's own, too, if there is an application."""
    try:
        settings.load().import_modules()
    except AppNotFound as error:
        echo(f"(only the built-in ones: {error})", err=True)
    formatter = click.HelpFormatter()
    with formatter.section(f"{kind.capitalize()} Commands"):
        formatter.write_dl(
            [(f"{name} {info.signature}".rstrip(), info.help) for name, info in commands_of(kind).items()]
        )
    echo_text(formatter.getvalue(), nl=False)


def read_words(info: CommandInfo, words: Sequence[str]) -> dict[str, Any]:
    """The arguments of a command. Raises: UsageError."""
    try:
        return info.read(words)
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from error


def ask(
    settings: Globals,
    info: CommandInfo,
    arguments: Mapping[str, Any],
    remote: Remote,
    *,
    with_replies: bool = True,
    may_be_silent: bool = False,
) -> int:
    """Send a command and print each reply as it comes; how many there were.

    Raises: Unavailable (exit code 69) when there were none (unless that `may_be`), or the broker cannot be reached.
    """
    app = settings.load()

    def say(reply: Mapping[str, Any]) -> None:
        ((node, answer),) = reply.items()
        click.echo(_told(node, answer, with_replies=with_replies))

    try:
        replies = app.control.ask(
            info.name,
            arguments,
            destination=remote.destination or None,
            timeout=max(1.0, info.default_timeout) if remote.timeout is None else remote.timeout,
            pattern=remote.pattern,
            matcher=remote.matcher,
            callback=None if remote.as_json else say,
        )
    except PublishError as error:
        raise Unavailable(f"Could not ask over the broker: {error}") from error
    finally:
        app.close()
    if not replies and may_be_silent:
        return 0
    if not replies:
        raise Unavailable("No nodes replied within time constraint. Is a worker running on this broker?")
    if remote.as_json:
        # As Celery prints it: an object of a question's answers, a list of an order's.
        shown = replies if info.kind == "inspect" else [{node: answer} for node, answer in replies.items()]
        echo(json.dumps(shown, default=repr))
    return len(replies)


def print_count(count: int) -> None:
    """How many nodes answered."""
    echo()
    echo(f"{count} node{'' if count == 1 else 's'} online.")


def _told(node: str, answer: Any, *, with_replies: bool) -> str:
    is_error = isinstance(answer, Mapping) and "error" in answer and "ok" not in answer
    status = click.style("ERROR", fg="red", bold=True) if is_error else click.style("OK", fg="green", bold=True)
    line = f"->  {click.style(f'{printable(node)}: ', fg='cyan', bold=True)}{status}"
    return f"{line}\n{_indented(_readable(answer))}" if with_replies else line


def _readable(answer: Any) -> str:
    if isinstance(answer, Mapping):
        for word in ("ok", "error"):
            if word in answer:
                return _indented(_readable(answer[word]))
        return json.dumps(answer, sort_keys=True, indent=4, default=repr)
    if isinstance(answer, list):
        return "\n".join(f"* {printable(str(item))}" for item in answer) or "- empty -"
    return printable_lines(answer if isinstance(answer, str) else pformat(answer))


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())

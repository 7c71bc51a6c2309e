"""The commands `control`, `inspect` and `status`: running workers are asked and changed, by remote control."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pprint import pformat
from typing import TYPE_CHECKING

import click

from amqtask.cli.base import Globals, echo, echo_text, gathered, json_option
from amqtask.cli.params import CommaList
from amqtask.exceptions import AppNotFound, ConfigurationError, PublishError
from amqtask.ground.printable import printable, printable_lines
from amqtask.remote.commands import BUILTIN, MATCHERS, CommandInfo, Kind, commands_of, find_command

if TYPE_CHECKING:
    from amqtask.ground.shapes import CommandArguments, JsonFields, Replies

# As Celery's exit code when no node replied, or there is no broker: Kubernetes probes look at it.
EX_UNAVAILABLE = getattr(os, "EX_UNAVAILABLE", 69)
# Seconds in which a node answers that has nothing to do for it.
SHORT = 1.0
# The end of what `datetime` can show (seconds since 1970).
_LAST_SECOND = 253_402_214_400


class Unavailable(click.ClickException):
    """No node answered, or the broker cannot be reached."""

    exit_code = EX_UNAVAILABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """What the options of a remote command say. `timeout` is seconds, None the command's own."""

    timeout: float | None
    destination: tuple[str, ...]
    pattern: str | None
    matcher: str | None
    as_json: bool


# The options of every remote command, which gets them as its argument `remote`.
remote_options = gathered(
    "remote",
    Remote,
    [
        click.option("-t", "--timeout", type=float, default=None, help="Seconds to wait for replies (default: 1)."),
        click.option("-d", "--destination", type=CommaList(), default=(), help="Only these nodes (celery@host,…)."),
        click.option("--pattern", metavar="PATTERN", help="Only nodes whose name fits, e.g. 'celery@web*'."),
        click.option("--matcher", type=click.Choice(MATCHERS), default=None, help="What PATTERN is (default: glob)."),
        json_option,
    ],
)


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


def read_arguments(info: CommandInfo, texts: Sequence[str]) -> dict[str, object]:
    """The arguments of a command. Raises: UsageError."""
    try:
        return info.read(texts)
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from error


def ask(
    settings: Globals, info: CommandInfo, arguments: CommandArguments, remote: Remote, *, with_replies: bool = True
) -> Replies:
    """Send a command and print each reply as it comes, and which named nodes do not answer; returns the answers by node.

    Raises: Unavailable (exit code 69) when there were none, or the broker cannot be reached.
    """

    def say(reply: JsonFields) -> None:
        ((node, answer),) = reply.items()
        click.echo(_answer_lines(node, answer, with_replies=with_replies))

    replies = collect(settings, info, arguments, remote, None if remote.as_json else say)
    if remote.as_json:
        # As Celery prints it: an object of a question's answers, a list of an order's.
        shown = replies if info.kind == "inspect" else [{node: answer} for node, answer in replies.items()]
        echo(json.dumps(shown, default=repr))
    return replies


def collect(
    settings: Globals,
    info: CommandInfo,
    arguments: CommandArguments,
    remote: Remote,
    on_reply: Callable[[JsonFields], None] | None = None,
) -> Replies:
    """Send a command; returns the answers by node, without printing them."""
    app = settings.load()
    try:
        replies = app.control.ask(
            info.name,
            arguments,
            destination=remote.destination or None,
            timeout=max(SHORT, info.default_timeout) if remote.timeout is None else remote.timeout,
            pattern=remote.pattern,
            matcher=remote.matcher,
            callback=on_reply,
        )
    except PublishError as error:
        raise Unavailable(f"Could not ask over the broker: {error}") from error
    finally:
        app.close()
    if not replies:
        raise Unavailable("No nodes replied within time constraint. Is a worker running on this broker?")
    missing = _missing(remote, replies)
    if missing:
        echo(f"No reply from {', '.join(missing)}.", err=True)
    return replies


def addressed(settings: Globals, info: CommandInfo, remote: Remote) -> Remote:
    """For a command that may take long, the nodes that are there by their names: nobody waits once they have answered.

    Raises: Unavailable.
    """
    if remote.timeout is not None or remote.destination or info.default_timeout <= SHORT:
        return remote
    there = collect(settings, BUILTIN["ping"], {}, remote)
    return replace(remote, destination=tuple(there), pattern=None, matcher=None)


def exit_code(remote: Remote, replies: Replies) -> int:
    """1 when a node refused, or one that was named did not answer."""
    return int(any(map(_is_error, replies.values())) or bool(_missing(remote, replies)))


def _missing(remote: Remote, replies: Replies) -> list[str]:
    return [node for node in remote.destination if node not in replies]


def _is_error(answer: object) -> bool:
    return isinstance(answer, Mapping) and "error" in answer and "ok" not in answer


def print_count(count: int) -> None:
    """How many nodes answered."""
    echo()
    echo(f"{count} node{'' if count == 1 else 's'} online.")


def _answer_lines(node: str, answer: object, *, with_replies: bool) -> str:
    status = (
        click.style("ERROR", fg="red", bold=True) if _is_error(answer) else click.style("OK", fg="green", bold=True)
    )
    line = f"->  {click.style(f'{printable(node)}: ', fg='cyan', bold=True)}{status}"
    return f"{line}\n{_indented(_readable(answer))}" if with_replies else line


def _readable(answer: object) -> str:
    if isinstance(answer, Mapping):
        for key in ("ok", "error"):
            if key in answer:
                return _indented(_readable(answer[key]))
        return json.dumps(answer, sort_keys=True, indent=4, default=repr)
    if isinstance(answer, list):
        return "\n".join(f"* {printable(_item(item))}" for item in answer) or "- empty -"
    return printable_lines(answer if isinstance(answer, str) else pformat(answer))


def _item(item: object) -> str:
    """A task or a queue of a worker in a line, anything else as Python shows it."""
    if not isinstance(item, Mapping):
        return str(item)
    if isinstance(item.get("request"), Mapping):
        return f"at {item.get('eta')}  {_item(item['request'])}"
    if {"id", "name", "args", "kwargs"} <= item.keys():
        return _task(item)
    return str(item)


def _task(task: JsonFields) -> str:
    parts = [f"{task['name']}[{task['id']}]", f"args={task['args']}", f"kwargs={task['kwargs']}"]
    since = task.get("time_start")
    if isinstance(since, (int, float)) and 0 < since < _LAST_SECOND:
        parts.append(f"since {datetime.fromtimestamp(since):%Y-%m-%d %H:%M:%S}")
    for name, value in (("pid", task.get("worker_pid")), ("queue", _queue(task))):
        if value is not None:
            parts.append(f"{name}={value}")
    return "  ".join(parts)


def _queue(task: JsonFields) -> object:
    about = task.get("delivery_info")
    return about.get("routing_key") if isinstance(about, Mapping) else None


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


# Those that --terminate and --signal are for.
REVOKING = ("revoke", "revoke_by_stamped_headers")


@click.command("control", epilog=listing("control"))
@click.argument("order", metavar="COMMAND", required=False)
@click.argument("raw_arguments", metavar="[ARGUMENTS]...", nargs=-1)
@click.option("--list", "only_list", is_flag=True, help="List the commands and what they take.")
@click.option("--terminate", is_flag=True, help="revoke…: end the tasks that run, too.")
@click.option("--signal", metavar="NAME", help="revoke… --terminate: by this signal (default: SIGTERM).")
@click.option("--reload", is_flag=True, help="pool_restart: reload modules that are imported already.")
@remote_options
@click.pass_obj
def control_command(
    settings: Globals,
    order: str | None,
    raw_arguments: tuple[str, ...],
    only_list: bool,
    terminate: bool,
    signal: str | None,
    reload: bool,
    remote: Remote,
) -> int:
    """Give all workers an order, or those of --destination.

    The exit code is 69 when none answers, 1 when one refuses, or one of --destination does not answer.
    """
    if only_list:
        print_list(settings, "control")
        return 0
    info = find(settings, "control", order)
    arguments = {**read_arguments(info, raw_arguments), **_options(info.name, terminate, signal, reload)}
    if info.name == "pool_restart" and not raw_arguments:
        arguments.pop("modules")  # all of them, as when app.control.pool_restart() is told none
    if info is BUILTIN["shutdown"]:
        return _shut_down(settings, remote)
    remote = addressed(settings, info, remote)
    return exit_code(remote, ask(settings, info, arguments, remote))


def _shut_down(settings: Globals, remote: Remote) -> int:
    """Shut workers down. They do not answer then, so a ping first asks which are there."""
    replies = collect(settings, BUILTIN["ping"], {}, remote)
    app = settings.load()
    try:
        # To all who are meant: one that is slow to answer hears it, too.
        app.control.broadcast(
            "shutdown", destination=remote.destination or None, pattern=remote.pattern, matcher=remote.matcher
        )
    except PublishError as error:
        raise Unavailable(f"Could not tell them over the broker: {error}") from error
    finally:
        app.close()
    answers = {node: {"ok": "told to shut down"} for node in replies}
    if remote.as_json:
        echo(json.dumps([{node: answer} for node, answer in answers.items()]))
    for node, answer in () if remote.as_json else answers.items():
        echo(f"->  {node}: {answer['ok']}")
    return exit_code(remote, answers)


def _options(order: str, terminate: bool, signal: str | None, reload: bool) -> CommandArguments:
    arguments: dict[str, object] = {}
    if terminate or signal:
        if order not in REVOKING:
            raise click.UsageError(f"--terminate and --signal are for {' and '.join(REVOKING)}")
        arguments["terminate"] = True
        if signal:
            arguments["signal"] = signal
    if reload:
        if order != "pool_restart":
            raise click.UsageError("--reload is for pool_restart")
        arguments["reload"] = True
    return arguments


@click.command("inspect", epilog=listing("inspect"))
@click.argument("question", metavar="COMMAND", required=False)
@click.argument("raw_arguments", metavar="[ARGUMENTS]...", nargs=-1)
@click.option("--list", "only_list", is_flag=True, help="List the commands and what they take.")
@remote_options
@click.pass_obj
def inspect_command(
    settings: Globals,
    question: str | None,
    raw_arguments: tuple[str, ...],
    only_list: bool,
    remote: Remote,
) -> int:
    """Ask all workers, or those of --destination.

    The exit code is 69 when none answers, 1 when one answers with an error, or one of --destination does not answer.
    """
    if only_list:
        print_list(settings, "inspect")
        return 0
    info = find(settings, "inspect", question)
    arguments = read_arguments(info, raw_arguments)
    remote = addressed(settings, info, remote)
    replies = ask(settings, info, arguments, remote)
    if not remote.as_json and not settings.quiet:
        print_count(len(replies))
    return exit_code(remote, replies)


@click.command("status")
@remote_options
@click.pass_obj
def status_command(settings: Globals, remote: Remote) -> int:
    """List the workers that answer a ping; the exit code is 69 when none does."""
    ping = BUILTIN["ping"]
    replies = ask(settings, ping, {}, remote, with_replies=False)
    if not remote.as_json and not settings.quiet:
        print_count(len(replies))
    return exit_code(remote, replies)

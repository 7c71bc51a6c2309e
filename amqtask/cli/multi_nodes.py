"""The arguments after `amqtask multi ACTION` → the workers that are meant, each with its command line (Celery's grammar).

    3 -c 3 -c:1 10              celery1, celery2, celery3 @host; the first with 10 slots
    image video -Q:image a,b    image@host, video@host; options for one by its name, or its number in the list
    10 -Q:1-3 a -Q:4,5 b -Q c   ranges and lists of nodes; the rest gets what has no node
    foo@%h --logfile=/var/log/%n%I.log

A node's own option replaces everybody's. `--` ends the options; what follows goes to each worker as it is.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import click

from amqtask.cli.daemon import expand

RANGE_PREFIX = "celery"  # as in Celery, and as in the default node name
PIDFILE = "%n.pid"
LOGFILE = "%n%I.log"
# Celery's documentation still has -L for the log level, and its multi -p for the pid file.
_OTHER_NAMES = {"-L": "--loglevel", "-p": "--pidfile"}


class OptionNames(NamedTuple):
    """The options of a command: each spelling with the option's own name, and the spellings that take no value."""

    names: Mapping[str, str]
    flags: frozenset[str]


class NodeOption(NamedTuple):
    """One option as it was written; `nodes` is what stood after the colon, "" for everybody's."""

    spelling: str
    value: str | None
    nodes: str

    @property
    def argv(self) -> list[str]:
        """As arguments of a command."""
        if self.value is None:
            return [self.spelling]
        return [f"{self.spelling}={self.value}"] if self.spelling.startswith("--") else [self.spelling, self.value]


@dataclass(frozen=True, slots=True)
class Node:
    """One worker: its node name, the files it writes, and the command that starts it in the background."""

    name: str
    pidfile: str
    logfile: str
    argv: tuple[str, ...]


class ParsedArguments(NamedTuple):
    """Names of nodes, options, and what goes to each worker as it is."""

    names: list[str]
    options: list[NodeOption]
    passed_on: list[str]


def options_of(*commands: click.Command) -> OptionNames:
    """What those commands' options are called."""
    names: dict[str, str] = {}
    flags: set[str] = set()
    for command in commands:
        for option in command.params:
            if not isinstance(option, click.Option):
                continue
            for spelling in (*option.opts, *option.secondary_opts):
                names[spelling] = str(option.name)
                if option.is_flag or option.count:
                    flags.add(spelling)
    return OptionNames(names, frozenset(flags))


def read(arguments: Sequence[str], worker_options: OptionNames) -> ParsedArguments:
    """Parse the arguments. An unknown short option takes the next argument as its value, as in Celery."""
    parsed = ParsedArguments([], [], [])
    remaining = [argument for argument in arguments if argument]
    while remaining:
        argument = remaining.pop(0)
        if argument == "--":
            parsed.passed_on.extend(remaining)
            break
        if not argument.startswith("-") or argument == "-":
            parsed.names.append(argument)
            continue
        option, value, nodes = _split(argument, worker_options)
        takes_value = option not in worker_options.flags and (
            option in worker_options.names or not option.startswith("--")
        )
        if value is None and takes_value and remaining and not remaining[0].startswith("-"):
            value = remaining.pop(0)
        parsed.options.append(NodeOption(option, value, nodes))
    return parsed


def _split(argument: str, worker_options: OptionNames) -> tuple[str, str | None, str]:
    name, equals, value = argument.partition("=")
    option_value = value if equals else None
    name, _, nodes = name.partition(":")
    if not name.startswith("--") and len(name) > 2 and name[:2] in worker_options.names and not equals:
        # -c3, -lINFO: the value follows at once, and may hold a colon (-Aproj:app).
        return name[:2], argument[2:], ""
    return _OTHER_NAMES.get(name, name), option_value, nodes


def nodes(
    parsed: ParsedArguments, worker_options: OptionNames, top: OptionNames, *, above: Sequence[str] = ()
) -> list[Node]:
    """The workers that are meant. `top` are the options that stand before `worker`, `above` those already given there.

    Raises: UsageError for no node, or for options of a node that there is not.
    """
    settings = {
        option.spelling: option.value for option in parsed.options if option.spelling in _OF_MULTI and not option.nodes
    }
    names = _names(parsed.names, settings)
    shorts = [name.partition("@")[0] for name in names]
    options = [option for option in parsed.options if option.spelling not in _OF_MULTI]
    for option in options:
        if option.nodes:
            _meant(option, names, shorts)
    return [
        _node(
            name, _chosen(options, number, names, shorts, worker_options, top), parsed.passed_on, settings, top, above
        )
        for number, name in enumerate(names, 1)
    ]


_OF_MULTI = frozenset({"-n", "--hostname", "--prefix", "--suffix", "--range-prefix", "--append", "--executable"})


def _names(names: Sequence[str], settings: Mapping[str, str | None]) -> list[str]:
    host = settings.get("--suffix") or settings.get("-n") or settings.get("--hostname") or "%h"
    if "@" in host:
        raise click.UsageError(
            f"--hostname {host}: say the host only, and name the node like this: amqtask multi start {host}"
        )
    if not names:
        raise click.UsageError("name the nodes, or say how many: amqtask multi start w1 w2, amqtask multi start 3")
    prefix = settings.get("--prefix") or ""
    if len(names) == 1 and names[0].isdigit():
        if names[0].strip("0") == "":
            raise click.UsageError("0 nodes: say at least 1")
        prefix = settings.get("--range-prefix") or RANGE_PREFIX
        names = [str(number) for number in range(1, int(names[0]) + 1)]
    local_node = f"celery@{socket.gethostname()}"
    node_names = [expand(name if "@" in name else f"{prefix}{name}@{host}", local_node) for name in names]
    twice = next((name for name in node_names if node_names.count(name) > 1), None)
    if twice:
        raise click.UsageError(f"two nodes are called {twice}")
    return node_names


def _meant(option: NodeOption, names: Sequence[str], shorts: Sequence[str]) -> set[int]:
    """The numbers (from 1) of the nodes that an option is for."""
    numbers: set[int] = set()
    for part in filter(None, option.nodes.split(",")):
        first, dash, last = part.partition("-")
        if part in names or part in shorts:
            numbers.update(
                number for number in range(1, len(names) + 1) if part in (names[number - 1], shorts[number - 1])
            )
        elif part.isdigit():
            numbers.add(int(part))
        elif dash and first.isdigit() and last.isdigit():
            numbers.update(range(int(first), int(last) + 1))
        else:
            numbers.add(0)
    unknown = [number for number in numbers if not 1 <= number <= len(names)]
    if unknown:
        raise click.UsageError(
            f"{option.spelling}:{option.nodes} is for a node that there is not; there are {', '.join(shorts)}"
        )
    return numbers


def _chosen(
    options: Sequence[NodeOption],
    number: int,
    names: Sequence[str],
    shorts: Sequence[str],
    worker_options: OptionNames,
    top: OptionNames,
) -> dict[str, NodeOption]:
    """The options of one node by their names; those for this node replace those for all."""
    node_options = [option for option in options if option.nodes and number in _meant(option, names, shorts)]
    common = [option for option in options if not option.nodes]
    return {_key(option.spelling, worker_options, top): option for option in (*common, *node_options)}


def _key(spelling: str, worker_options: OptionNames, top: OptionNames) -> str:
    return worker_options.names.get(spelling) or top.names.get(spelling) or spelling


def _node(
    name: str,
    chosen: dict[str, NodeOption],
    passed_on: Sequence[str],
    settings: Mapping[str, str | None],
    top: OptionNames,
    above: Sequence[str],
) -> Node:
    for key, option, default in (("pidfile", "--pidfile", PIDFILE), ("logfile", "--logfile", LOGFILE)):
        file_option = chosen.get(key)
        path = os.path.abspath(os.path.expanduser((file_option.value if file_option else None) or default))
        chosen[key] = NodeOption(option, path, "")
    before = [node_option for node_option in chosen.values() if node_option.spelling in top.names]
    after = [node_option for node_option in chosen.values() if node_option.spelling not in top.names]
    append = settings.get("--append")
    argv = (
        settings.get("--executable") or sys.executable,
        "-m",
        "amqtask",
        *above,
        *_argv(before, name),
        "worker",
        "--detach",
        "-n",
        name,
        *_argv(after, name),
        *passed_on,
        *([expand_node(append, name)] if append else []),
    )
    pidfile, logfile = (expand(chosen[key].value or "", name) for key in ("pidfile", "logfile"))
    return Node(name, pidfile, logfile, argv)


def _argv(options: Sequence[NodeOption], node: str) -> Iterator[str]:
    for option in options:
        value = None if option.value is None else expand_node(option.value, node)
        yield from option._replace(value=value).argv


def expand_node(text: str, node: str) -> str:
    """The node's %-fields; those of a process (`%i`, `%I`) and `%%` are left to the worker, which expands again."""
    kept = re.sub(r"%[%iI]", lambda match: "%%%%" if match[0] == "%%" else f"%{match[0]}", text)
    return expand(kept, node)

"""The words after `amqtask multi ACTION` → the workers that are meant, each with its command line (Celery's grammar).

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

from amqtask.cli.nodename import expand

RANGE_PREFIX = "celery"  # as in Celery, and as in the default node name
PIDFILE = "%n.pid"
LOGFILE = "%n%I.log"
# Celery's documentation still has -L for the log level, and its multi -p for the pid file.
_OTHER_NAMES = {"-L": "--loglevel", "-p": "--pidfile"}


class Known(NamedTuple):
    """The options of a command: each spelling with the option's own name, and the spellings that take no value."""

    names: Mapping[str, str]
    flags: frozenset[str]


class Word(NamedTuple):
    """One option as it was written; `nodes` is what stood after the colon, "" for everybody's."""

    option: str
    value: str | None
    nodes: str

    @property
    def argv(self) -> list[str]:
        """As arguments of a command."""
        if self.value is None:
            return [self.option]
        return [f"{self.option}={self.value}"] if self.option.startswith("--") else [self.option, self.value]


@dataclass(frozen=True, slots=True)
class Node:
    """One worker: its node name, the files it writes, and the command that starts it in the background."""

    name: str
    pidfile: str
    logfile: str
    argv: tuple[str, ...]


class Words(NamedTuple):
    """What was written: names of nodes, options, and what goes to each worker as it is."""

    names: list[str]
    options: list[Word]
    rest: list[str]


def options_of(*commands: click.Command) -> Known:
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
    return Known(names, frozenset(flags))


def read(arguments: Sequence[str], known: Known) -> Words:
    """Take the words apart. An unknown short option takes the next word as its value, as in Celery."""
    words = Words([], [], [])
    left = [word for word in arguments if word]
    while left:
        word = left.pop(0)
        if word == "--":
            words.rest.extend(left)
            break
        if not word.startswith("-") or word == "-":
            words.names.append(word)
            continue
        option, value, nodes = _split(word, known)
        takes_value = option not in known.flags and (option in known.names or not option.startswith("--"))
        if value is None and takes_value and left and not left[0].startswith("-"):
            value = left.pop(0)
        words.options.append(Word(option, value, nodes))
    return words


def _split(word: str, known: Known) -> tuple[str, str | None, str]:
    name, equals, value = word.partition("=")
    given = value if equals else None
    name, _, nodes = name.partition(":")
    if not name.startswith("--") and len(name) > 2 and name[:2] in known.names and not equals:
        # -c3, -lINFO: the value follows at once, and may hold a colon (-Aproj:app).
        return name[:2], word[2:], ""
    return _OTHER_NAMES.get(name, name), given, nodes


def nodes(words: Words, known: Known, top: Known, *, above: Sequence[str] = ()) -> list[Node]:
    """The workers that are meant. `top` are the options that stand before `worker`, `above` those already given there.

    Raises: UsageError for no node, or for options of a node that there is not.
    """
    settings = {word.option: word.value for word in words.options if word.option in _OF_MULTI and not word.nodes}
    names = _names(words.names, settings)
    shorts = [name.partition("@")[0] for name in names]
    options = [word for word in words.options if word.option not in _OF_MULTI]
    for word in options:
        if word.nodes:
            _meant(word, names, shorts)
    return [
        _node(name, _chosen(options, number, names, shorts, known, top), words.rest, settings, top, above)
        for number, name in enumerate(names, 1)
    ]


_OF_MULTI = frozenset({"-n", "--hostname", "--prefix", "--suffix", "--range-prefix", "--append", "--executable"})


def _names(given: Sequence[str], settings: Mapping[str, str | None]) -> list[str]:
    host = settings.get("--suffix") or settings.get("-n") or settings.get("--hostname") or "%h"
    if "@" in host:
        raise click.UsageError(
            f"--hostname {host}: say the host only, and name the node like this: amqtask multi start {host}"
        )
    if not given:
        raise click.UsageError("name the nodes, or say how many: amqtask multi start w1 w2, amqtask multi start 3")
    prefix = settings.get("--prefix") or ""
    if len(given) == 1 and given[0].isdigit():
        if given[0].strip("0") == "":
            raise click.UsageError("0 nodes: say at least 1")
        prefix = settings.get("--range-prefix") or RANGE_PREFIX
        given = [str(number) for number in range(1, int(given[0]) + 1)]
    here = f"celery@{socket.gethostname()}"
    found = [expand(name if "@" in name else f"{prefix}{name}@{host}", here) for name in given]
    twice = next((name for name in found if found.count(name) > 1), None)
    if twice:
        raise click.UsageError(f"two nodes are called {twice}")
    return found


def _meant(word: Word, names: Sequence[str], shorts: Sequence[str]) -> set[int]:
    """The numbers of the nodes, from 1, that an option is for."""
    found: set[int] = set()
    for part in filter(None, word.nodes.split(",")):
        first, dash, last = part.partition("-")
        if part in names or part in shorts:
            found.update(
                number for number in range(1, len(names) + 1) if part in (names[number - 1], shorts[number - 1])
            )
        elif part.isdigit():
            found.add(int(part))
        elif dash and first.isdigit() and last.isdigit():
            found.update(range(int(first), int(last) + 1))
        else:
            found.add(0)
    wrong = [number for number in found if not 1 <= number <= len(names)]
    if wrong:
        raise click.UsageError(
            f"{word.option}:{word.nodes} is for a node that there is not; there are {', '.join(shorts)}"
        )
    return found


def _chosen(
    options: Sequence[Word], number: int, names: Sequence[str], shorts: Sequence[str], known: Known, top: Known
) -> dict[str, Word]:
    """The options of one node by their names; its own replace everybody's."""
    own = [word for word in options if word.nodes and number in _meant(word, names, shorts)]
    common = [word for word in options if not word.nodes]
    return {_key(word.option, known, top): word for word in (*common, *own)}


def _key(option: str, known: Known, top: Known) -> str:
    return known.names.get(option) or top.names.get(option) or option


def _node(
    name: str,
    chosen: dict[str, Word],
    rest: Sequence[str],
    settings: Mapping[str, str | None],
    top: Known,
    above: Sequence[str],
) -> Node:
    for key, option, default in (("pidfile", "--pidfile", PIDFILE), ("logfile", "--logfile", LOGFILE)):
        given = chosen.get(key)
        path = os.path.abspath(os.path.expanduser((given.value if given else None) or default))
        chosen[key] = Word(option, path, "")
    before = [word for word in chosen.values() if word.option in top.names]
    after = [word for word in chosen.values() if word.option not in top.names]
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
        *rest,
        *([expand_node(append, name)] if append else []),
    )
    pidfile, logfile = (expand(chosen[key].value or "", name) for key in ("pidfile", "logfile"))
    return Node(name, pidfile, logfile, argv)


def _argv(words: Sequence[Word], node: str) -> Iterator[str]:
    for word in words:
        value = None if word.value is None else expand_node(word.value, node)
        yield from word._replace(value=value).argv


def expand_node(text: str, node: str) -> str:
    """The node's %-fields; those of a process (`%i`, `%I`) and `%%` are left to the worker, which expands again."""
    kept = re.sub(r"%[%iI]", lambda found: "%%%%" if found[0] == "%%" else f"%{found[0]}", text)
    return expand(kept, node)

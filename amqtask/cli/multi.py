"""`amqtask multi`: start, stop and restart several workers on this host, as `celery multi` does."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from amqtask.cli import daemon
from amqtask.cli.base import Globals, echo, echo_text, print_json
from amqtask.cli.daemon import expand
from amqtask.cli.worker import command as worker_command
from amqtask.ground.printable import count

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonObject

# -- The arguments after `amqtask multi ACTION` → the workers that are meant, each with its command line (Celery's grammar).
#
# 3 -c 3 -c:1 10              celery1, celery2, celery3 @host; the first with 10 slots
# image video -Q:image a,b    image@host, video@host; options for one by its name, or its number in the list
# 10 -Q:1-3 a -Q:4,5 b -Q c   ranges and lists of nodes; the rest gets what has no node
# foo@%h --logfile=/var/log/%n%I.log
#
# A node's own option replaces everybody's. `--` ends the options; what follows goes to each worker as it is.

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
    keys = {**top.names, **worker_options.names}
    return {keys.get(option.spelling, option.spelling): option for option in (*common, *node_options)}


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


EXAMPLES = """\
  amqtask -A proj multi start 3 -c 3              celery1, celery2, celery3 with 3 slots each
  amqtask -A proj multi start 3 -c 3 -c:1 10      … the first with 10
  amqtask -A proj multi start image video -Q:image images -Q video,default
  amqtask -A proj multi start 10 -l INFO -Q:1-3 images,video -Q:4,5 data -Q default
  amqtask multi stopwait 3 --pidfile=/run/amqtask/%n.pid
  amqtask multi restart image video -A proj -Q:image images -Q video,default
  amqtask multi stop image -QUIT                  with another signal than TERM
  amqtask multi show 3 -A proj -c 3               the commands, without running them
"""
# Seconds that a started worker has to write its pid file, and between two looks.
START_SECONDS = 15.0
LOOK_SECONDS = 0.05
_WITH_SIGNAL = frozenset({"stop", "stopwait", "stop_verify", "restart"})
_OWN_FLAGS = {"--nosplash", "--quiet", "-q", "--verbose", "--no-color", "-j", "--json"}


@dataclass(slots=True)
class Say:
    """Prints for `multi`: less when quiet, the commands too when verbose."""

    quiet: bool = False
    verbose: bool = False
    json: bool = False

    def note(self, text: str, *, nl: bool = True) -> None:
        if not self.quiet:
            echo(text, nl=nl)

    def more(self, text: str) -> None:
        if self.verbose and not self.quiet:
            echo(text)


@click.command(
    "multi",
    context_settings={"allow_interspersed_args": False},
    epilog="\b\n" + EXAMPLES,
)
@click.argument("action", metavar="ACTION")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="NODES [WORKER OPTIONS]")
@click.pass_context
def command(ctx: click.Context, action: str, arguments: tuple[str, ...]) -> int:
    """Start and stop several workers on this host.

    ACTION is start, stop, stopwait, restart, kill, show, names, expand TEMPLATE, get NODE or help. NODES are names, or how many.

    Options go to all workers, or with :NODE (a name, number, 1-3 or 1,2) to some. The process ids are in --pidfile, by default
    %n.pid, the logs in --logfile, by default %n%I.log, both in this folder: say the same to stop as to start. %n is the
    node's name, %h its host, %d its domain, %p both.

    Options of multi itself: --hostname HOST, --range-prefix, --prefix, --suffix, --append, --executable, --quiet, --verbose, and
    --json with show and names.
    """
    if action == "help":
        echo_text(ctx.get_help())
        return 0
    chosen = _ACTIONS.get(action)
    if chosen is None:
        raise click.UsageError(f"no action {action!r}; there are {', '.join(_ACTIONS)} and help")
    settings: Globals = ctx.obj
    own_flags = {argument for argument in arguments if argument in _OWN_FLAGS}
    say = Say(
        bool(own_flags & {"-q", "--quiet"}) or settings.quiet,
        "--verbose" in own_flags,
        bool(own_flags & {"-j", "--json"}),
    )
    remaining = [argument for argument in arguments if argument not in _OWN_FLAGS]
    signum, remaining = _signal(remaining) if action in _WITH_SIGNAL else (signal.SIGTERM, remaining)
    operand = remaining.pop(0) if action in ("expand", "get") and remaining else None
    targets = _nodes(ctx, remaining)
    return chosen(targets, say, signum, operand)


def _signal(arguments: list[str]) -> tuple[signal.Signals, list[str]]:
    """The last argument like -9, -TERM or -SIGTERM, and the arguments without such."""
    signum = signal.SIGTERM
    remaining = []
    for argument in arguments:
        name = argument[1:].upper() if argument.startswith("-") and not argument.startswith("--") else ""
        try:
            signum = signal.Signals(int(name)) if name.isdigit() else signal.Signals[f"SIG{name.removeprefix('SIG')}"]
        except (KeyError, ValueError):
            remaining.append(argument)
    return signum, remaining


def _nodes(ctx: click.Context, arguments: Sequence[str]) -> list[Node]:
    worker_options = options_of(worker_command)
    # -A stands at both places; before `worker` is where every command has it.
    top = options_of(ctx.find_root().command)
    parsed = read(arguments, _both(worker_options, top))
    return nodes(parsed, worker_options, top, above=_above(ctx, parsed))


def _both(worker_options: OptionNames, top: OptionNames) -> OptionNames:
    of_multi = {
        name: name for name in ("-n", "--hostname", "--prefix", "--suffix", "--range-prefix", "--append", "-p", "-L")
    }
    return OptionNames({**of_multi, **top.names, **worker_options.names}, worker_options.flags | top.flags)


def _above(ctx: click.Context, parsed: ParsedArguments) -> list[str]:
    """Options that stood before `multi`, as in `amqtask -A proj multi start 3`; what is said after it wins."""
    parent = ctx.parent
    above: list[str] = []
    if parent is None:
        return above
    for option in parent.command.params:
        value = parent.params.get(str(option.name))
        source = parent.get_parameter_source(str(option.name))
        if not isinstance(option, click.Option) or source is not click.core.ParameterSource.COMMANDLINE:
            continue
        if option.name == "quiet" or any(node_option.spelling in option.opts for node_option in parsed.options):
            continue
        above += [option.opts[-1]] if option.is_flag else [f"{option.opts[-1]}={value}"]
    return above


# -- processes


def running(node: Node) -> int | None:
    """The node's process id by its pid file, if that process lives and is this node's worker."""
    pid = _pid(node)
    if pid is None:
        return None
    command_line = _command_of(pid)
    # None: no /proc here, the pid file has to be believed. Another process may have got the number since.
    return pid if command_line is None or node.name.encode() in command_line.split(b"\0") else None


def _pid(node: Node) -> int | None:
    """The process id in the pid file, if there is such a process."""
    try:
        pid = daemon.read_pidfile(Path(node.pidfile))
    except (ValueError, OSError):
        return None  # the worker says what is wrong with it
    if pid is None:
        return None
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass  # it lives, as another user's; whose it is tells its command
    return pid


def _command_of(pid: int) -> bytes | None:
    """The command line of a process, b"" of a zombie; None where that cannot be known."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b"" if Path("/proc/self").exists() else None
    except OSError:
        return None


def _forget_dead(node: Node) -> None:
    """Remove a pid file that a killed worker left, when its number belongs to no amqtask now: a worker would refuse to start."""
    pid = _pid(node)
    command_line = None if pid is None else _command_of(pid)
    if command_line is not None and b"amqtask" not in command_line:
        Path(node.pidfile).unlink(missing_ok=True)


def _start(node: Node, say: Say) -> bool:
    say.note(f"    > {node.name}: ", nl=False)
    for file in (node.pidfile, node.logfile):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    say.more(shlex.join(node.argv))
    _forget_dead(node)
    was_running = running(node)
    code = subprocess.run(node.argv, check=False).returncode
    is_there = code == 0 and was_running is None and _wait(lambda: running(node) is not None, START_SECONDS)
    say.note("OK" if is_there else f"FAILED (exit code {code}; see {node.logfile})")
    return is_there


def _wait(condition: Callable[[], bool], seconds: float | None = None) -> bool:
    deadline = None if seconds is None else time.monotonic() + seconds
    while not condition():
        if deadline is not None and time.monotonic() > deadline:
            return False
        time.sleep(LOOK_SECONDS)
    return True


def _send(targets: Sequence[Node], say: Say, signum: signal.Signals) -> list[tuple[Node, int]]:
    """Signal the nodes that run; returns them with the process ids that were signalled."""
    sent = []
    for node in targets:
        pid = running(node)
        if pid is None:
            say.note(f"> {node.name}: DOWN")
            continue
        say.note(f"    > {node.name}: {signum.name.removeprefix('SIG')} -> {pid}")
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            say.note(f"> {node.name}: DOWN")
        except PermissionError as error:
            raise click.ClickException(f"{node.name}: may not signal process {pid}: {error.strerror}") from error
        else:
            sent.append((node, pid))
    return sent


# -- actions


def _stopwait(targets: list[Node], say: Say, signum: signal.Signals, operand: str | None) -> int:
    say.note("> Stopping nodes...")
    signalled = _send(targets, say, signum)
    if signalled:
        pids = ", ".join(str(pid) for _, pid in signalled)
        say.note(f"> Waiting for {count(len(signalled), 'node')} -> {pids}...")
    for node, pid in signalled:
        _wait(lambda node=node, pid=pid: running(node) != pid)  # type: ignore[misc]
        say.note(f"    > {node.name}: OK")
    return 0


def _start_all(
    targets: list[Node], say: Say, signum: signal.Signals, operand: str | None, what: str = "Starting"
) -> int:
    say.note(f"> {what} nodes...")
    started = [_start(node, say) for node in targets]
    return 0 if all(started) else 1


def _stop(targets: list[Node], say: Say, signum: signal.Signals, operand: str | None) -> int:
    say.note("> Stopping nodes...")
    _send(targets, say, signum)
    return 0


def _restart(targets: list[Node], say: Say, signum: signal.Signals, operand: str | None) -> int:
    _stopwait(targets, say, signum, operand)
    return _start_all(targets, say, signum, operand, "Restarting")


def _kill(targets: list[Node], say: Say, signum: signal.Signals, operand: str | None) -> int:
    _send(targets, say, signal.SIGKILL)
    return 0


def _show(targets: list[Node], say: Say, signum: signal.Signals, operand: str | None) -> int:
    if say.json:
        print_json([_as_data(node) for node in targets])
        return 0
    for node in targets:
        echo(shlex.join(node.argv))
    return 0


def _list(targets: list[Node], say: Say, signum: signal.Signals, operand: str | None) -> int:
    if say.json:
        print_json([node.name for node in targets])
        return 0
    for node in targets:
        echo(node.name)
    return 0


def _expand(targets: list[Node], say: Say, signum: signal.Signals, operand: str | None) -> int:
    for node in targets:
        echo(expand(operand or "", node.name))
    return 0


def _get(targets: list[Node], say: Say, signum: signal.Signals, operand: str | None) -> int:
    for node in targets:
        if operand in (node.name, node.name.partition("@")[0]):
            echo(shlex.join(node.argv))
            return 0
    raise click.ClickException(f"no node {operand!r} among {', '.join(node.name for node in targets)}")


def _as_data(node: Node) -> JsonObject:
    return {
        "name": node.name,
        "pid": running(node),
        "pidfile": node.pidfile,
        "logfile": node.logfile,
        "command": list(node.argv),
    }


Action = Callable[[list[Node], Say, signal.Signals, "str | None"], int]
_ACTIONS: dict[str, Action] = {
    "start": _start_all,
    "stop": _stop,
    "stopwait": _stopwait,
    "stop_verify": _stopwait,
    "restart": _restart,
    "kill": _kill,
    "show": _show,
    "names": _list,
    "expand": _expand,
    "get": _get,
}

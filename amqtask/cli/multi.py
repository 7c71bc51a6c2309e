"""`amqtask multi`: start, stop and restart several workers on this host, as `celery multi` does."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from amqtask.cli import daemon
from amqtask.cli.base import Globals, echo, echo_text, print_json
from amqtask.cli.daemon import expand
from amqtask.cli.multi_nodes import Node, OptionNames, ParsedArguments, nodes, options_of, read
from amqtask.cli.worker import command as worker_command
from amqtask.ground.printable import count

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonObject

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


def _stop_and_wait(targets: Sequence[Node], say: Say, signum: signal.Signals) -> None:
    say.note("> Stopping nodes...")
    signalled = _send(targets, say, signum)
    if signalled:
        pids = ", ".join(str(pid) for _, pid in signalled)
        say.note(f"> Waiting for {count(len(signalled), 'node')} -> {pids}...")
    for node, pid in signalled:
        _wait(lambda node=node, pid=pid: running(node) != pid)  # type: ignore[misc]
        say.note(f"    > {node.name}: OK")


# -- actions


def _start_all(targets: list[Node], say: Say, signum: signal.Signals, operand: str | None) -> int:
    say.note("> Starting nodes...")
    started = [_start(node, say) for node in targets]
    return 0 if all(started) else 1


def _stop(targets: list[Node], say: Say, signum: signal.Signals, operand: str | None) -> int:
    say.note("> Stopping nodes...")
    _send(targets, say, signum)
    return 0


def _stopwait(targets: list[Node], say: Say, signum: signal.Signals, operand: str | None) -> int:
    _stop_and_wait(targets, say, signum)
    return 0


def _restart(targets: list[Node], say: Say, signum: signal.Signals, operand: str | None) -> int:
    _stop_and_wait(targets, say, signum)
    say.note("> Restarting nodes...")
    started = [_start(node, say) for node in targets]
    return 0 if all(started) else 1


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


def _names(targets: list[Node], say: Say, signum: signal.Signals, operand: str | None) -> int:
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
    "names": _names,
    "expand": _expand,
    "get": _get,
}

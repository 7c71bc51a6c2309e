"""Run in the background: detach, pid file, user, group, umask, and the options that say so; the names of nodes, which pid and
log files carry."""

from __future__ import annotations

import atexit
import contextlib
import errno
import grp
import os
import pwd
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from amqtask.cli.base import Decorator, gathered, signals_to
from amqtask.cli.logs import LEVELS, check_logfile, set_up
from amqtask.ground import systemd
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.serialization import PICKLE, content_types

if TYPE_CHECKING:
    from amqtask.cli.base import Globals

logger = bounded_logger("amqtask.cli")

# Celery's variable: it has always been asked for.
FORCE_ROOT = "C_FORCE_ROOT"
# Says to a command that it is in the background already: the process that started anew.
RESTARTED = "_AMQTASK_RESTARTED"
# Seconds that threads which the program started may keep a process that has done its work from ending; then those that
# functions registered with atexit may take.
LEFT_THREADS = 30
AT_EXIT = 5


def become(
    *,
    pidfile: str | None,
    logfile: str | None = None,
    detach: bool = False,
    uid: str | None = None,
    gid: str | None = None,
    umask: str | None = None,
) -> None:
    """The process a command is to be: in the background, another user, with its pid file. Raises: UsageError, ConfigurationError
    (it may not write to the log file, as that user), before it is in the background."""
    mask, group, user = _mask(umask), _group(gid), _user(uid)
    path = Path(pidfile).absolute() if pidfile else None
    drop_privileges(user, group, mask)
    if logfile:
        check_logfile(logfile)
    if path is not None:
        check_pidfile(path)
    if detach and os.environ.pop(RESTARTED, None) != str(os.getpid()):
        go_to_background()
    if path is not None:
        write_pidfile(path)


# -- options

log_format_option = click.option("--log-format", metavar="FORMAT", help="`json`, or a logging format string.")
detach_option = click.option("-D", "--detach", is_flag=True, help="Run in the background.")
# Of commands that are nodes with names.
NODE: list[Decorator] = [
    click.option("-f", "--logfile", help="Log to this file (%n, %h … as in --hostname)."),
    click.option("--pidfile", help="Write the process id here."),
    click.option("--uid", help="User to run as."),
    click.option("--gid", help="Group to run as."),
    click.option("--umask", help="File mode mask, octal."),
    click.option("--executable", hidden=True),
]


def loglevel_option(default: str) -> Decorator:
    """`-l`, with this default."""
    return click.option(
        "-l", "--loglevel", type=click.Choice(LEVELS, case_sensitive=False), default=default, show_default=True
    )


def of_node(params: Mapping[str, Any]) -> dict[str, Any]:
    """What the options of a node say to `become`; its files have the node's name in them."""
    return {name: params[name] for name in ("detach", "uid", "gid", "umask")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """What a command that runs until Ctrl-C or TERM was told of the process that it is to be."""

    loglevel: str
    log_format: str | None
    logfile: str | None
    detach: bool
    pidfile: str | None

    def run(self, settings: Globals, run: Callable[[], object], stop: Callable[[], None]) -> None:
        """Become it, and `run()` until Ctrl-C or TERM, which call `stop`. Raises: UsageError, before that."""
        become(pidfile=self.pidfile, logfile=self.logfile, detach=self.detach)
        prints = set_up(
            settings.load().conf,
            loglevel=self.loglevel.upper(),
            logfile=self.logfile,
            log_format=self.log_format,
            color=settings.color,
        )
        with prints:
            _until_told(run, stop)


# The options of such a command, which gets them as its argument `process`.
runs_until_told = gathered(
    "process",
    Process,
    [
        loglevel_option("INFO"),
        log_format_option,
        click.option("-f", "--logfile", help="Log to this file."),
        detach_option,
        click.option("--pidfile", type=click.Path(), help="Write the process id here."),
    ],
)


def _until_told(run: Callable[[], object], stop: Callable[[], None]) -> None:
    """`run()` until Ctrl-C or TERM, which call `stop`."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        systemd.notify("STOPPING=1")
        # In a thread: the main one may be in the middle of waiting for this very event.
        threading.Thread(target=stop, name="amqtask stop").start()

    with signals_to(on_signal, signal.SIGTERM, signal.SIGINT):
        systemd.notify("READY=1")
        run()


def go_to_background() -> None:
    """Become a daemon: a new session without a terminal; the caller's process exits 0."""
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)
    sys.stdout.flush()
    sys.stderr.flush()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)


def end_in_time(exit_code: int) -> None:
    """Let this process end with its main thread, or in LEFT_THREADS seconds, or at the next signal: Python waits for threads that
    are no daemons for ever, so that one which a task left behind would keep a stopped worker."""

    def end_now(signum: int, _frame: object) -> None:
        logger.warning("ends at %s, with threads of the program that go on", signal.Signals(signum).name)
        signal.signal(signal.SIGALRM, lambda *_: os._exit(exit_code))
        signal.alarm(AT_EXIT)
        atexit._run_exitfuncs()
        flush_streams()
        os._exit(exit_code)

    # Not `main_thread()`, which under eventlet is none of those that `enumerate` knows.
    this_thread = threading.current_thread()
    if names := [thread.name for thread in threading.enumerate() if thread is not this_thread and not thread.daemon]:
        logger.warning("waits for threads that the program started, at most %d s: %s", LEFT_THREADS, ", ".join(names))
    for signum in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, end_now)
    signal.alarm(LEFT_THREADS)


def flush_streams() -> None:
    """Write what stdout and stderr hold back."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()


def start_anew(folder: Path) -> NoReturn:
    """Be this command once more, in the same process: the same pid, pid file and parent, other code and configuration.
    `folder` is where it was started, which its relative paths (--workdir) are relative to."""
    os.environ[RESTARTED] = str(os.getpid())
    flush_streams()
    with contextlib.suppress(FileNotFoundError):
        os.chdir(folder)
    os.execv(sys.executable, this_command())


def this_command() -> list[str]:
    """The command line of this process, for another that is to be the same."""
    return [sys.executable, *sys.orig_argv[1:]]


def drop_privileges(user: pwd.struct_passwd | None, group: int | None, mask: int | None) -> None:
    """Change umask, group and user, unless they are so already (a worker that has started anew). Raises: UsageError for who may
    not."""
    if mask is not None:
        os.umask(mask)
    try:
        if group is not None and group != os.getegid():
            os.setgid(group)
        if user is not None and user.pw_uid != os.geteuid():
            if group is None:
                os.setgid(user.pw_gid)
            os.initgroups(user.pw_name, os.getgid())
            os.setuid(user.pw_uid)
    except PermissionError as error:
        raise click.UsageError(f"--uid and --gid: {error.strerror}; only root may become another user.") from error


def refuse_pickle_as_root(accept_content: Iterable[str]) -> None:
    """Whoever may publish to a worker that reads pickles runs what they like, as the worker's user. Raises: UsageError."""
    if os.geteuid() != 0 or PICKLE not in content_types(accept_content) or os.environ.get(FORCE_ROOT):
        return
    raise click.UsageError(
        "this worker would read pickles (accept_content) as root: every user who may publish to its queues could run any code "
        "on this machine, as root. Run it as another user (--uid), leave pickle out of accept_content, or set "
        f"{FORCE_ROOT}=1 if you mean it."
    )


def _mask(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        mask = int(text, 8)
    except ValueError:
        mask = -1
    if not 0 <= mask <= 0o777:
        raise click.UsageError(f"--umask wants an octal number from 0 to 777, such as 022, not {text!r}.")
    return mask


def _group(name: str | None) -> int | None:
    if name is None:
        return None
    try:
        return int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
    except KeyError:
        raise click.UsageError(f"--gid: this system has no group {name!r}.") from None


def _user(name: str | None) -> pwd.struct_passwd | None:
    if name is None:
        return None
    try:
        return pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except (KeyError, OverflowError):
        raise click.UsageError(f"--uid: this system has no user {name!r}.") from None


# -- pid files. Their folder may be others' to write in, so none is followed elsewhere or written over.


def read_pidfile(path: Path) -> int | None:
    """The process id in it; None where there is no file. Raises: ValueError for one that holds none, OSError."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    with open(number) as file:
        pid = int(file.read(32))
    if pid <= 0:  # to the kernel these are groups of processes
        raise ValueError(f"{pid} is not a process id")
    return pid


def check_pidfile(path: Path) -> None:
    """Raises UsageError when the file names a process that runs, or is no pid file; a stale file is removed."""
    try:
        pid = read_pidfile(path)
    except ValueError:
        raise click.UsageError(f"the pid file {path} holds no process id; remove it if no worker runs.") from None
    except OSError as error:
        raise _unusable(path, error) from error
    if pid is None:
        return
    if pid != os.getpid():  # a container's processes have the same numbers at each start
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            pass
        except PermissionError:
            raise click.UsageError(f"the pid file {path} names the running process {pid}.") from None
        else:
            raise click.UsageError(
                f"the pid file {path} names the running process {pid}: is this worker running already?"
            )
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise _unusable(path, error) from error


def write_pidfile(path: Path) -> None:
    """Write our pid; the file is removed when this very process ends. Raises: UsageError."""
    try:
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        with open(number, "w") as file:
            file.write(f"{os.getpid()}\n")
    except OSError as error:  # a full disk: an empty file would be in the way when there is room again
        path.unlink(missing_ok=True)
        raise _unusable(path, error) from error
    atexit.register(_remove, path, os.getpid())


def _unusable(path: Path, error: OSError) -> click.UsageError:
    if error.errno == errno.ELOOP:
        return click.UsageError(f"the pid file {path} is a symbolic link, which is not followed; remove it.")
    if error.errno == errno.EEXIST:
        return click.UsageError(f"the pid file {path} is there already: is this worker running already?")
    return click.UsageError(f"the pid file {path} cannot be used: {error.strerror}.")


def _remove(path: Path, pid: int) -> None:
    if os.getpid() == pid:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


# -- Node names (`celery@host`) and the %-fields that names and file paths may carry.

DEFAULT_NAME = "celery"


def node_name(template: str | None) -> str:
    """A full node name: `%h` host name, `%n` the part before @, `%d` domain, `%%`; without @ the host is added.

    The default name is Celery's (`celery@host`), so that tools which look for it find us.
    """
    host = socket.gethostname()
    name = template or f"{DEFAULT_NAME}@%h"
    if "@" not in name:
        name = f"{name}@%h"
    return expand(name, f"{DEFAULT_NAME}@{host}")


def expand(text: str, node: str, index: int = 0) -> str:
    """Replace `%h %n %d %p %i %I %%` in a name or path. As in Celery `%i` is the number of a process in its pool, 0 in the main
    process, and `%I` is that number after a dash, nothing in the main process."""
    name, _, host = node.partition("@")
    _, _, domain = host.partition(".")
    fields = {
        "h": host,
        "n": name,
        "d": domain,
        "p": node,
        "i": str(index),
        "I": f"-{index}" if index else "",
        "%": "%",
    }
    return re.sub("%([hndpiI%])", lambda match: fields[match[1]], text)

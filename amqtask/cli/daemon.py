"""Run in the background: detach, pid file, user, group, umask."""

from __future__ import annotations

import atexit
import contextlib
import grp
import os
import pwd
import sys
from pathlib import Path
from typing import NoReturn

import click

# Says to a command that it is in the background already: the process that started anew.
RESTARTED = "_AMQTASK_RESTARTED"


def become(*, pidfile: str | None, in_background: bool, uid: str | None, gid: str | None, umask: str | None) -> None:
    """The process a command is to be: in the background, another user, with its pid file. Raises: UsageError."""
    path = Path(pidfile).absolute() if pidfile else None
    if path is not None:
        check_pidfile(path)
    if in_background and os.environ.pop(RESTARTED, None) != str(os.getpid()):
        detach()
    drop_privileges(uid, gid, umask)
    if path is not None:
        write_pidfile(path)


def detach() -> None:
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


def start_anew() -> NoReturn:
    """Be this command once more, in the same process: the same pid, pid file and parent, other code and configuration."""
    os.environ[RESTARTED] = str(os.getpid())
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def drop_privileges(uid: str | None, gid: str | None, umask: str | None) -> None:
    """Change umask, group and user, each by name or number."""
    if umask is not None:
        os.umask(int(umask, 8))
    if gid is not None:
        os.setgid(int(gid) if gid.isdigit() else grp.getgrnam(gid).gr_gid)
    if uid is not None:
        entry = pwd.getpwuid(int(uid)) if uid.isdigit() else pwd.getpwnam(uid)
        if gid is None:
            os.setgid(entry.pw_gid)
        os.initgroups(entry.pw_name, os.getgid())
        os.setuid(entry.pw_uid)


def check_pidfile(path: Path) -> None:
    """Raises UsageError when the file names a process that runs; a stale file is removed."""
    try:
        pid = int(path.read_text())
    except FileNotFoundError:
        return
    except ValueError:
        raise click.UsageError(f"the pid file {path} holds no process id; remove it if no worker runs.") from None
    if pid == os.getpid():  # a container's processes have the same numbers at each start
        path.unlink(missing_ok=True)
        return
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        path.unlink(missing_ok=True)
    except PermissionError:
        raise click.UsageError(f"the pid file {path} names the running process {pid}.") from None
    else:
        raise click.UsageError(f"the pid file {path} names the running process {pid}: is this worker running already?")


def write_pidfile(path: Path) -> None:
    """Write our pid; the file is removed when this very process ends."""
    path.write_text(f"{os.getpid()}\n")
    atexit.register(_remove, path, os.getpid())


def _remove(path: Path, pid: int) -> None:
    if os.getpid() == pid:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()

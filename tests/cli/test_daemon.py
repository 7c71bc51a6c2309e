"""What a command refuses before it becomes another process or user: clean errors, and no file but its own is touched."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import pytest

from amqtask import AmqTask
from amqtask.cli import daemon
from amqtask.cli.daemon import drop_privileges
from amqtask.cli.main import run
from amqtask.testing.suites.backend import in_a_child
from tests.conftest import full_disk


@pytest.fixture
def app() -> AmqTask:
    return AmqTask("daemon", broker="memory://", set_as_current=False)


@pytest.mark.parametrize("program", ["worker", "beat"])
@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--uid", "nosuchuser", "no user 'nosuchuser'"),
        ("--uid", "4000000000", "no user"),
        ("--uid", "9" * 30, "no user"),
        ("--gid", "nosuchgroup", "no group 'nosuchgroup'"),
        ("--umask", "99x", "octal"),
        ("--umask", "7777", "octal"),
        ("--umask", "-1", "octal"),
        ("--pidfile", "/nonexistent/folder/pid", "cannot be used"),
        ("--log-format", "%(nosuch", "format of Python's logging"),
    ],
)
def test_a_value_that_cannot_be_is_an_error_and_no_traceback(
    program: str, option: str, value: str, said: str, app: AmqTask, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([program, option, value], app) in (1, 2)

    said_here = capsys.readouterr().err
    assert said in said_here
    assert "Traceback" not in said_here


def test_a_pid_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    victim, link = tmp_path / "victim", tmp_path / "pid"
    victim.write_text("1\n")
    link.symlink_to(victim)

    for use in (daemon.check_pidfile, daemon.write_pidfile):
        with pytest.raises(click.UsageError, match="pid file"):
            use(link)

    assert victim.read_text() == "1\n"


def test_a_pid_file_for_which_the_disk_has_no_room_is_none(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(click.UsageError, match="cannot be used: File too large"):
        daemon.write_pidfile(tmp_path / "pid")

    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_gone_is_said(tmp_path: Path, app: AmqTask, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path.cwd()
    (folder := tmp_path / "release").mkdir()
    os.chdir(folder)
    folder.rmdir()
    try:
        assert run(["report"], app) == 1
        assert "the current folder is gone" in capsys.readouterr().err
        assert run(["--workdir", str(tmp_path), "report"], app) == 0
    finally:
        os.chdir(before)


def test_a_folder_that_is_none_is_said(tmp_path: Path, app: AmqTask, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(fifo := tmp_path / "fifo")

    assert run(["--workdir", str(fifo), "report"], app) == 1

    assert "Not a directory" in capsys.readouterr().err


def test_a_dangling_link_makes_no_file_elsewhere(tmp_path: Path) -> None:
    elsewhere, link = tmp_path / "elsewhere", tmp_path / "pid"
    link.symlink_to(elsewhere)

    with pytest.raises(click.UsageError, match="pid file"):
        daemon.write_pidfile(link)

    assert not elsewhere.exists()


@pytest.mark.parametrize("text", ["0", "-1", "no number", "", "9" * 40])
def test_what_is_no_process_id_is_taken_for_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "pid"
    path.write_text(text)

    if text == "9" * 40:
        daemon.check_pidfile(path)
        assert not path.exists()
    else:
        with pytest.raises(click.UsageError, match="holds no process id"):
            daemon.check_pidfile(path)


@pytest.mark.parametrize(("accept", "refused"), [(["json"], False), (["json", "pickle"], True)])
def test_pickles_are_not_read_as_root(monkeypatch: pytest.MonkeyPatch, accept: list[str], refused: bool) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.delenv(daemon.FORCE_ROOT, raising=False)
    if refused:
        with pytest.raises(click.UsageError, match="C_FORCE_ROOT"):
            daemon.refuse_pickle_as_root(accept)
        monkeypatch.setenv(daemon.FORCE_ROOT, "1")
    daemon.refuse_pickle_as_root(accept)


@pytest.mark.parametrize("patch", ["", "import eventlet; eventlet.monkey_patch()"])
def test_a_program_does_not_say_that_it_waits_for_its_own_thread(patch: str) -> None:
    program = f"""
{patch}
import logging, threading
logging.basicConfig()
from amqtask.cli.daemon import end_in_time
end_in_time(0)
go_on = threading.Event()
left = threading.Thread(target=go_on.wait, name="left")
left.start()
end_in_time(0)
go_on.set()
"""
    command = [sys.executable, "-W", "ignore", "-c", program]

    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)

    assert done.stderr.splitlines() == [
        "WARNING:amqtask.cli:waits for threads that the program started, at most 30 s: left"
    ]


def test_who_is_that_user_already_may_start_anew() -> None:
    user = pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())

    def become_twice() -> None:
        for _ in range(2):  # at the start, and after HUP
            drop_privileges(user, user.pw_gid, 0o022)
        assert (os.geteuid(), os.getegid()) == (user.pw_uid, user.pw_gid)

    assert in_a_child(become_twice) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_the_log_file_is_that_of_the_user_who_writes_it() -> None:
    nobody = pwd.getpwnam("nobody")
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        log, pid = Path(folder) / "w.log", Path(folder) / "w.pid"

        def become() -> None:
            daemon.become(
                pidfile=str(pid), detach=False, uid="nobody", gid=None, umask=None, logfile=str(log)
            )  # fmt: skip

        assert in_a_child(become) == 0
        assert log.stat().st_uid == pid.stat().st_uid == nobody.pw_uid


def test_a_program_starts_anew_where_it_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []

    def execv(*_: object) -> None:
        folders.append(Path.cwd())
        raise SystemExit

    monkeypatch.setenv(daemon.RESTARTED, "")
    monkeypatch.setattr(os, "execv", execv)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")  # as --workdir work has it

    with pytest.raises(SystemExit):
        daemon.start_anew(tmp_path)

    assert folders == [tmp_path]

"""systemd is told when a worker and beat are ready, healthy and stopping."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from amqtask import AmqTask
from amqtask.beat.build import build_beat
from amqtask.beat.contract import BeatOptions
from amqtask.ground import systemd
from amqtask.testing.loop import PlainLoop
from amqtask.testing.worker import start_worker


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket of a service manager, which this process is told of."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@amqtask-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(name.replace("@", "\0", 1))
        listening.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        monkeypatch.setenv("WATCHDOG_USEC", "300000")
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
        yield listening


def waiting(manager: socket.socket) -> list[str]:
    """What was told and not yet read."""
    told = []
    manager.setblocking(False)
    while True:
        try:
            told.append(manager.recv(1000).decode())
        except BlockingIOError:
            return told


def test_a_worker_tells_that_it_is_ready_healthy_and_stopping(manager: socket.socket) -> None:
    app = AmqTask("told", broker="memory://", set_as_current=False)
    with closing(app), start_worker(app):
        # It is healthy for as long as it takes to become ready.
        first = list(iter(lambda: manager.recv(1000), b"READY=1"))
        assert set(first) <= {b"WATCHDOG=1"}
        assert manager.recv(1000) == b"WATCHDOG=1"
        assert manager.recv(1000) == b"WATCHDOG=1"

    told = waiting(manager)
    assert told.count("STOPPING=1") == 1
    assert set(told) <= {"STOPPING=1", "WATCHDOG=1"}


def test_beat_tells_the_same(manager: socket.socket, tmp_path: Path) -> None:
    app = AmqTask("told", broker="memory://", set_as_current=False)
    with closing(app):
        process = build_beat(app, BeatOptions(schedule=str(tmp_path / "schedule"), remote_control=False))
        process.stop()  # as soon as it runs
        process.run(install_signals=False)

    assert "STOPPING=1" in waiting(manager)


def test_what_is_not_healthy_is_silent_and_what_was_told_is_told_once(manager: socket.socket) -> None:
    is_ready = is_healthy = is_stopping = False
    with closing(PlainLoop()) as loop:
        notifier = systemd.Notifier(
            loop,
            is_ready=lambda: is_ready,
            is_healthy=lambda: is_healthy,
            is_stopping=lambda: is_stopping,
        )
        notifier.look()
        assert waiting(manager) == []

        is_ready = is_healthy = True
        notifier.look()
        notifier.look()
        assert waiting(manager) == ["READY=1", "WATCHDOG=1", "WATCHDOG=1"]

        is_healthy, is_stopping = False, True
        notifier.look()
        notifier.stop()
        assert waiting(manager) == ["STOPPING=1"]


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "20000000"}, 20.0),
        ({"WATCHDOG_USEC": "20000000", "WATCHDOG_PID": "1"}, None),
    ],
)
def test_the_watchdogs_time_is_that_of_this_process(environment: dict[str, str], seconds: float | None) -> None:
    assert systemd.watchdog_seconds(environment) == seconds


def test_a_manager_that_is_gone_disturbs_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    systemd.notify("READY=1", {})
    systemd.notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "gone")})

    assert "was not told READY=1" in caplog.text

"""`amqtask dev`: what it refuses. That it works is shown with real processes, in integration/test_dev.py."""

from __future__ import annotations

import socket
import sys

import pytest

from amqtask.cli.main import run
from amqtask.ground.startup import pool_on_command_line


def test_another_broker_is_for_a_worker(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["-b", "amqp://elsewhere", "dev"]) == 2
    assert "worker --reload -B" in capsys.readouterr().err


def test_a_port_that_is_taken_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run(["dev", "--port", str(taken.getsockname()[1]), "--no-console"]) == 1

    assert "-port 5673, and dev://:5673 as broker URL)" in capsys.readouterr().err


def test_without_watchfiles_it_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "watchfiles", None)

    assert run(["dev"]) == 1
    assert "pip install 'amqtask[reload]'" in capsys.readouterr().err


def test_only_the_worker_of_it_is_patched_for_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["-A", "proj", "dev", "-P", "gevent"]
    assert pool_on_command_line(line) is None

    monkeypatch.setenv("_AMQTASK_DEV_PART", "worker")
    assert pool_on_command_line(line) == "gevent"
    monkeypatch.setenv("_AMQTASK_DEV_PART", "console")
    assert pool_on_command_line(line) is None
    assert pool_on_command_line(["worker", "-Q", "dev", "-P", "gevent"]) == "gevent"

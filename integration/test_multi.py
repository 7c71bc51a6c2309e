"""`amqtask multi` starts, signals, restarts and stops real workers in the background."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from integration.conftest import Broker
from integration.workers import ROOT, eventually, run_cli

Multi = Callable[..., tuple[int, str]]
OPTIONS = ("-A", "integration.apps.sample", "-P", "solo", "-l", "INFO")


@pytest.fixture
def multi(rabbit: Broker, tmp_path: Path) -> Iterator[Multi]:
    """Run `amqtask multi ACTION NODES` with files in a folder of the test; whoever is left is killed."""
    files = (f"--pidfile={tmp_path}/run/%n.pid", f"--logfile={tmp_path}/log/%n%I.log")
    environment = {"SAMPLE_QUEUE": rabbit.queue(), "PYTHONPATH": str(ROOT)}

    def ask(action: str, *words: str) -> tuple[int, str]:
        return run_cli("multi", action, *words, *OPTIONS, *files, environment=environment)

    yield ask
    ask("kill", "one", "two")


def is_ready(tmp_path: Path, name: str) -> bool:
    """Whether it says so: its log comes some time after its pid file."""
    log = tmp_path / "log" / f"{name}.log"
    return log.exists() and " ready." in log.read_text()


def states(multi: Multi) -> dict[str, Any]:
    """Short node name → process id."""
    code, said = multi("show", "--json", "one", "two")
    assert code == 0
    return {entry["name"].partition("@")[0]: entry["pid"] for entry in json.loads(said)}


def test_the_life_of_two_workers(multi: Multi, tmp_path: Path) -> None:
    code, said = multi("start", "one", "two")
    assert code == 0, said
    assert said.count(": OK") == 2
    before = states(multi)
    assert all(before.values())
    for name in ("one", "two"):
        eventually(partial(is_ready, tmp_path, name), what=f"{name} not ready")

    code, said = multi("start", "one")
    assert code == 1
    assert "running already" in said

    code, said = multi("restart", "one")
    assert code == 0, said
    after = states(multi)
    assert after["one"] not in (None, before["one"])
    assert after["two"] == before["two"]

    code, said = multi("stopwait", "one", "two")
    assert code == 0
    assert states(multi) == {"one": None, "two": None}
    assert "Warm shutdown" in (tmp_path / "log" / "two.log").read_text()
    assert "DOWN" in multi("stop", "one")[1]


def test_another_signal_and_a_kill(multi: Multi, tmp_path: Path) -> None:
    multi("start", "one", "two")
    eventually(partial(is_ready, tmp_path, "one"), what="one not ready")
    pid = states(multi)["one"]

    code, said = multi("stop", "one", "-QUIT")
    assert code == 0
    assert f"QUIT -> {pid}" in said
    eventually(lambda: states(multi)["one"] is None, every=0.2, what="it did not stop")

    assert multi("kill", "two")[0] == 0
    eventually(lambda: states(multi)["two"] is None, every=0.2, what="it was not killed")
    # Its pid file was left behind, and is in nobody's way.
    assert multi("start", "two")[0] == 0
    assert states(multi)["two"]


def test_a_worker_that_cannot_start_is_said(multi: Multi) -> None:
    code, said = multi("start", "one", "--concurrency=none")

    assert code == 1
    assert "FAILED" in said
    assert "none" in said

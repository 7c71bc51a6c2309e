"""`amqtask list`, `graph`, `shell` and what shells complete."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from amqtask import AmqTask, Broadcast, Exchange, Queue
from amqtask.cli.main import COMMANDS, run
from amqtask.cli.topology import consuming

APP = """
from amqtask import AmqTask, Queue
print("a module that prints")
app = AmqTask("tasks", set_as_current=False)
app.conf.task_queues = [Queue("images"), Queue("reports")]

@app.task(name="images.resize")
def resize(path: str) -> None: ...
"""


@pytest.fixture
def app() -> AmqTask:
    """A topic exchange, a broadcast and a route."""
    made = AmqTask("around", broker="amqp://nowhere//", set_as_current=False)
    media = Exchange("media", type="topic")
    made.conf.task_queues = [Queue("images", exchange=media, routing_key="image.*"), Broadcast("news")]
    made.conf.task_routes = {"around.*": {"queue": "images"}}
    made.conf.task_default_queue = "images"

    @made.task(name="around.resize")
    def resize(path: str) -> str:
        return path

    return made


def test_tasks_and_where_they_go(app: AmqTask, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", "tasks", "--json"], app) == 0

    found = {row["task"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["around.resize"] == {
        "task": "around.resize",
        "queue": "images",
        "exchange": "media",
        "routing_key": "image.*",
    }
    assert not any(name.startswith(("celery.", "amqtask.")) for name in found)
    assert run(["list", "tasks"], app) == 0
    assert "around.resize" in capsys.readouterr().out


def test_planned_bindings_are_said_to_be_planned(app: AmqTask, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", "bindings"], app) == 0

    said = capsys.readouterr()
    rows = [line.split() for line in said.out.splitlines()[1:]]
    assert rows == [["images", "(default)", "images"], ["images", "media", "image.*"], ["bcast.*", "news"]]
    assert "planned" in said.err


def test_the_topology_as_a_drawing(app: AmqTask, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["graph", "topology"], app) == 0

    drawing = capsys.readouterr().out
    assert drawing.startswith("digraph amqtask {")
    assert '"exchange media" -> "queue images" [label="image.*"];' in drawing
    assert '"queue images" -> "queue images.dead" [style=dashed, label=dead];' in drawing
    assert drawing.rstrip().endswith("}")


def test_workers_as_a_drawing() -> None:
    media = {"name": "media", "type": "topic"}
    replies: dict[str, Any] = {
        "w1@a": [{"name": "images", "exchange": media, "routing_key": "image.*"}],
        'w"2@a': [{"name": "images", "exchange": media, "routing_key": "image.*"}, {"name": "plain", "exchange": None}],
    }

    lines = list(consuming(replies))

    assert '"queue images" -> "worker w1@a";' in lines
    assert '"queue plain" -> "worker w\\"2@a";' in lines
    assert lines.count('"exchange media" -> "queue images" [label="image.*"];') == 1


def test_boot_steps_are_refused_with_a_reason(app: AmqTask, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["graph", "bootsteps"], app) == 1
    assert "graph workers" in capsys.readouterr().err


def typed(lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user types into the shell."""
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))


def test_the_shell_knows_app_tasks_and_canvas(
    app: AmqTask, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed("print(app is celery, resize('a.png'), chain.__name__, signature is subtask)\n", monkeypatch)

    assert run(["shell", "--python"], app) == 0
    assert "True a.png chain True" in capsys.readouterr().out


def test_the_shell_without_tasks(
    app: AmqTask, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed("print('resize' in globals(), 'app' in globals())\n", monkeypatch)

    assert run(["shell", "--python", "-T"], app) == 0
    assert "False True" in capsys.readouterr().out


def test_a_shell_that_is_not_installed_is_named(
    app: AmqTask, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "IPython", None)

    assert run(["shell", "--ipython"], app) == 1
    assert "pip install ipython" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, app: AmqTask, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell], app) == 0
    assert f"_AMQTASK_COMPLETE={shell}_complete" in capsys.readouterr().out


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an application."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "tasks.py").write_text(APP)
    return folder


def completed(line: str, folder: Path) -> list[str]:
    """What bash would offer after the line, as its completion asks."""
    words = line.split()
    position = len(words) if line.endswith(" ") else len(words) - 1
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(position), "_AMQTASK_COMPLETE": "bash_complete"}
    done = subprocess.run(
        [sys.executable, "-m", "amqtask"],
        cwd=folder,
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return [offer.partition(",")[2] for offer in done.stdout.split()]


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("amqtask wor", ["worker", "workers"]),
        ("amqtask dead ", ["list", "purge", "retry", "show"]),
        ("amqtask worker -P ev", ["eventlet"]),
        ("amqtask worker -Q ", ["amqtask", "images", "reports"]),
        ("amqtask -A tasks queues -Q images,re", ["images,reports"]),
        ("amqtask call im", ["images.resize"]),
        ("amqtask -A nosuchmodule call im", []),
        ("amqtask queues --inter", ["--interval"]),
    ],
)
def test_what_is_offered(line: str, offers: list[str], project: Path) -> None:
    assert completed(line, project) == offers


def test_all_commands_are_offered_without_importing_them(project: Path) -> None:
    assert completed("amqtask ", project) == list(COMMANDS)

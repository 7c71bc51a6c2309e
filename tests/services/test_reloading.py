"""pool_restart: modules are imported (again) and their tasks are the new ones, or everything stays as it was."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.exceptions import ConfigurationError
from amqtask.services.reloading import import_again
from tests.services.test_panel import Remote

FIRST = "from amqtask import current_app\napp = current_app()\n@app.task(name='reloaded.add')\ndef add(): return {}\n"


@pytest.fixture
def app() -> AmqTask:
    return AmqTask("reloading", broker="memory://")


@pytest.fixture
def module(app: AmqTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module of tasks that is imported."""
    path = tmp_path / "reloaded_tasks.py"
    path.write_text(FIRST.format(1))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    importlib.import_module("reloaded_tasks")
    app.finalize()
    yield path
    sys.modules.pop("reloaded_tasks", None)


def test_a_module_s_tasks_are_the_new_ones(app: AmqTask, module: Path) -> None:
    module.write_text(FIRST.format(2) + "@app.task(name='reloaded.new')\ndef new(): return 3\n")

    assert import_again(app, ["reloaded_tasks"], reload=False) == set()
    assert app.tasks["reloaded.add"]() == 1
    assert import_again(app, ["reloaded_tasks"], reload=True) == {"reloaded.add"}

    assert (app.tasks["reloaded.add"](), app.tasks["reloaded.new"]()) == (2, 3)


@pytest.mark.parametrize(
    "text", ["def broken(:", "raise RuntimeError('no')", "from amqtask import AmqTask\napp = AmqTask('b')"]
)
def test_a_module_that_cannot_be_reloaded_keeps_its_tasks(app: AmqTask, module: Path, text: str) -> None:
    module.write_text(text)

    with pytest.raises(ConfigurationError, match="reloaded_tasks cannot be reloaded"):
        import_again(app, ["reloaded_tasks"], reload=True)

    assert app.tasks["reloaded.add"]() == 1


def test_a_module_that_is_not_there_is_an_error(app: AmqTask) -> None:
    with pytest.raises(ConfigurationError, match=r"module no\.such\.module cannot be imported"):
        import_again(app, ["no.such.module"], reload=False)


class Restarting(Remote):
    """A worker whose pool may have processes."""

    def __init__(self, *, is_allowed: bool = True, has_processes: bool = True) -> None:
        super().__init__()
        self.asked: list[Any] = []
        if is_allowed:
            self.control.reload = self.reload
        self.bench.pool.can_restart = has_processes

    @property
    def restarts(self) -> int:
        return self.bench.pool.restarts

    def reload(self, modules: Any, again: bool) -> set[str]:
        self.asked.append((modules, again))
        return {"t"}


def test_pool_restart_imports_first_and_then_replaces_the_processes() -> None:
    remote = Restarting()
    remote.bench.deliver("a")
    remote.bench.end("a")

    assert remote.ask("pool_restart") == {"ok": "reload started"}
    assert remote.ask("pool_restart", modules=["m"], reload=True) == {"ok": "reload started"}

    assert (remote.asked, remote.restarts) == ([(None, False), (["m"], True)], 2)
    assert remote.ask("stats")["total"] == {"t": 1}
    remote.bench.deliver("b")
    assert remote.bench.started == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "arguments", "said"),
    [
        ({"is_allowed": False}, {}, "Pool restarts not enabled"),
        ({"has_processes": False}, {}, "the hand pool has no processes to replace"),
        ({}, {"reloader": "importlib.reload"}, "cannot be sent"),
    ],
)
def test_pool_restart_says_why_it_does_nothing(options: dict[str, bool], arguments: dict[str, Any], said: str) -> None:
    remote = Restarting(**options)

    assert said in remote.ask("pool_restart", **arguments)["error"]
    assert (remote.asked, remote.restarts) == ([], 0)

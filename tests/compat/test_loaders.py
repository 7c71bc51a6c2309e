"""Loaders that were written for Celery: where an application's settings come from, and what is called as a worker runs."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.compat.loaders.base import BaseLoader
from amqtask.exceptions import ConfigurationError
from amqtask.testing.worker import start_worker


class Own(BaseLoader):
    """Says what is called."""

    said: list[Any]

    def read_configuration(self, env: str = "") -> dict[str, object]:
        return {"broker_url": "memory://", "result_backend": "cache+memory://", "timezone": "Europe/Oslo", "mine": 5}

    def on_worker_init(self) -> None:
        self.said.append("worker")

    def on_worker_shutdown(self) -> None:
        self.said.append("shutdown")

    def on_task_init(self, task_id: str, task: Any) -> None:
        self.said.append((task_id, task.name))

    def on_process_cleanup(self) -> None:
        self.said.append("cleanup")


@pytest.fixture(autouse=True)
def name() -> Iterator[str]:
    """What the loader is found by."""
    module = types.ModuleType("a_loader")
    module.Own = Own  # type: ignore[attr-defined]
    Own.said = []
    sys.modules[module.__name__] = module
    yield "a_loader:Own"
    del sys.modules[module.__name__]


def find(path: str) -> Any:
    return importlib.import_module(f"amqtask.{path}")


def make(**options: Any) -> Any:
    return AmqTask("loaded", set_as_current=False, **options)


def test_settings_come_from_a_loader(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(AmqTask):
        loader_cls = name

    apps: list[Any] = [make(loader=name), make(loader=Own), Mine("loaded", set_as_current=False)]
    for app in apps:
        assert (app.conf.timezone, app.conf.mine, type(app.loader)) == ("Europe/Oslo", 5, Own)
        assert str(app.timezone) == "Europe/Oslo"
    assert make(loader=name, broker="amqp://made//").conf.broker_url == "amqp://made//"
    configured = make(loader=name)
    configured.config_from_object({"task_time_limit": 5})
    assert (configured.conf.broker_url, configured.conf.task_time_limit) == (None, 5)
    monkeypatch.setenv("CELERY_LOADER", name)
    assert make().conf.timezone == "Europe/Oslo"
    assert make(loader="app").conf.timezone is None


def test_a_loader_is_called_as_a_worker_and_its_tasks_run(name: str) -> None:
    with make(loader=name) as app:
        add = app.task(name="add")(lambda x, y: x + y)
        with start_worker(app, pool="threads"):
            result = add.delay(2, 3)
            assert result.get(60) == 5
    assert Own.said == ["worker", (result.id, "add"), "cleanup", "shutdown"]


def test_a_loader_that_cannot_be_imported_is_told() -> None:
    with pytest.raises(ConfigurationError, match="no_such_module"):
        make(loader="no_such_module:Loader")


def test_the_default_loader_reads_celeryconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    assert make(loader="default").conf.broker_url is None
    (tmp_path / "celeryconfig.py").write_text("broker_url = 'amqp://default//'\n")
    try:
        assert make(loader="default").conf.broker_url == "amqp://default//"
    finally:
        sys.modules.pop("celeryconfig", None)


def test_loaders_and_fixups_have_their_places() -> None:
    loaders = find("loaders")

    assert loaders.get_loader_cls("app") is find("loaders.app").AppLoader
    assert loaders.get_loader_cls("default") is find("loaders.default").Loader
    assert loaders.get_loader_cls("a_loader:Own") is Own
    assert find("loaders.base").BaseLoader is BaseLoader
    assert find("loaders.default").DEFAULT_CONFIG_MODULE == "celeryconfig"
    assert issubclass(find("fixups.django").FixupWarning, Warning)

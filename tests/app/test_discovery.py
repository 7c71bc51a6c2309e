"""`autodiscover_tasks`: which modules it imports, and what it says of packages that are not there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from amqtask import AmqTask
from amqtask.exceptions import ConfigurationError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package `found`, with tasks of its own and in `found.sms`."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for folder in ("found", "found/sms"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("")
        name = folder.replace("/", ".")
        (tmp_path / folder / "tasks.py").write_text(
            f"from amqtask import shared_task\n@shared_task(name='{name}')\ndef task(): ...\n"
        )
    yield tmp_path / "found"
    for name in [name for name in sys.modules if name.partition(".")[0] == "found"]:
        del sys.modules[name]


def discovered(*packages: str) -> set[str]:
    app = AmqTask("finds", broker="memory://")
    app.autodiscover_tasks(list(packages))
    app.import_modules()
    return {name for name in app.tasks if name.startswith("found")}


@pytest.mark.usefixtures("package")
def test_a_package_that_is_not_there_is_told_and_keeps_no_worker_from_starting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert "found.sms" in discovered("found.sms", "found.cache")
    assert "autodiscover_tasks names 'found.cache', and there is no such package" in caplog.text


@pytest.mark.usefixtures("package")
def test_the_name_of_an_application_s_configuration_means_its_package() -> None:
    assert "found" in discovered("found.ShopConfig")


def test_a_name_that_leads_nowhere_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="autodiscover_tasks names 'nowhere', and there is no such package"):
        discovered("nowhere")


def test_an_error_inside_a_module_of_tasks_is_shown_as_it_is(package: Path) -> None:
    (package / "sms" / "tasks.py").write_text("import not_installed_anywhere\n")

    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        discovered("found.sms")

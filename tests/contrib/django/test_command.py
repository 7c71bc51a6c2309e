"""`manage.py amqtask …`: the whole command line with the project's application."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.ground import current

PROJECT = """
from amqtask import AmqTask
app = AmqTask("proj", broker="memory://", task_default_queue="found-by-name")
"""


@pytest.fixture(autouse=True)
def nobody(django: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(current, "_default", [])
    monkeypatch.delenv("AMQTASK_APP", raising=False)


def run(*arguments: str) -> None:
    from django.core.management import call_command

    call_command("amqtask", *arguments)


def test_the_application_of_the_process_is_used(capfd: pytest.CaptureFixture[str]) -> None:
    AmqTask("proj", broker="memory://", task_default_queue="the-one")

    run("report")

    assert "the-one" in capfd.readouterr().out


def test_a_setting_may_name_the_application(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from django.conf import settings

    (tmp_path / "named_by_setting.py").write_text(PROJECT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(settings, "DJANGO_AMQTASK_APP", "named_by_setting:app", raising=False)

    run("report")

    assert "found-by-name" in capfd.readouterr().out


def test_the_projects_package_is_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from django.conf import settings

    package = tmp_path / "shop_project"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "celery.py").write_text(PROJECT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(settings, "SETTINGS_MODULE", "shop_project.settings.dev")

    run("report")

    assert "found-by-name" in capfd.readouterr().out


def test_the_exit_code_of_a_command_is_told() -> None:
    from django.core.management import CommandError

    AmqTask("proj", broker="memory://", task_default_queue="the-one")

    with pytest.raises(CommandError, match="exit code 2") as caught:
        run("no-such-command")

    assert caught.value.returncode == 2


def test_djangos_own_options_are_not_for_the_command() -> None:
    from amqtask.contrib.django.management.commands.amqtask import without_djangos

    given = ["worker", "--settings", "proj.settings", "-l", "info", "--pythonpath=.", "-Q", "a"]

    assert without_djangos(given) == ["worker", "-l", "info", "-Q", "a"]


@pytest.mark.parametrize("told", [["-A", "shop"], []])
def test_a_green_pool_gets_a_process_that_it_can_patch(monkeypatch: pytest.MonkeyPatch, told: list[str]) -> None:
    from django.core.management import execute_from_command_line

    started: list[Any] = []

    class Replaced(BaseException): ...

    def replace(*arguments: Any) -> None:
        started.append(arguments)
        raise Replaced

    monkeypatch.setattr(os, "execve", replace)

    with pytest.raises(Replaced):
        execute_from_command_line(["manage.py", "amqtask", *told, "worker", "-P", "gevent"])

    [(program, command, environment)] = started
    found = told or ["-A", "amqtask.contrib.django.project:project_app"]
    assert command == [sys.executable, "-m", "amqtask", *found, "worker", "-P", "gevent"]
    assert program == sys.executable
    assert str(Path(sys.argv[0]).resolve().parent) in environment["PYTHONPATH"].split(os.pathsep)

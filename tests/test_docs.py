"""The documentation: its links lead somewhere, settings are the table's, and nothing of Celery's is left unsaid."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

import amqtask
from amqtask import AmqTask, canvas, exceptions, result, signals
from amqtask.cli.main import cli
from amqtask.compat.attributes import OfResult, OfResults
from amqtask.settings import find_name

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
CELERY = json.loads((DOCS / "celery_5_7.json").read_text())
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("pools/*.md"), *ROOT.glob("benchmarks/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text())

    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def make_settings() -> Any:
    spec = importlib.util.spec_from_file_location("make_settings", DOCS / "make_settings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_of_settings_are_up_to_date() -> None:
    written = make_settings()

    assert (DOCS / "settings.md").read_text() == written.settings_page()
    page = (DOCS / "coming-from-celery.md").read_text()
    assert page == written.coming_page(page)


def test_each_setting_of_celerys_has_a_fate_and_is_taken() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `.*` \| (.+) \|$", make_settings().fates(), re.MULTILINE)

    assert [name for name, _ in rows] == sorted(CELERY["settings"])
    assert [name for name in CELERY["settings"] if find_name(name) is None] == []


@pytest.mark.parametrize("name", sorted(CELERY["options"]))
def test_each_option_of_celerys_is_taken_or_explained(name: str) -> None:
    page = (DOCS / "coming-from-celery.md").read_text()
    words = name.split()
    command: click.Command | None = cli
    taken = options_of(cli)
    for word in words:
        assert isinstance(command, click.Group)
        command = command.get_command(click.Context(command), word)
        if command is None:
            assert f"| `{words[0]}`" in page or f"`{name}`" in page
            return
        taken |= options_of(command)

    missing = [option for option in CELERY["options"][name] if option not in taken]
    assert [option for option in missing if f"`{name} {option}`" not in page] == []


def options_of(command: click.Command) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("place", sorted(CELERY["names"]))
def test_each_public_name_of_celerys_is_there_or_explained(place: str) -> None:
    page = (DOCS / "coming-from-celery.md").read_text()
    is_there, prefix = PLACES[place]

    missing = [name for name in CELERY["names"][place] if not is_there(name)]
    assert [name for name in missing if f"`{prefix}{name}`" not in page] == []


def importable(name: str) -> bool:
    if name.startswith("utils.") and name != "utils.log":
        return True  # said of all of them together
    return importlib.util.find_spec(f"amqtask.{name}") is not None


APP = AmqTask("docs", broker="memory://", backend="cache+memory://", set_as_current=False)
TASK = APP.task(name="docs.task")(lambda: None)
# What instances have, or reach in another way.
OF_RESULTS = frozenset({"app", "ignored", "backend", "id", "task_id", "parent", "results"})
PLACES: dict[str, tuple[Callable[[str], bool], str]] = {
    "celery": (lambda name: hasattr(amqtask, name), ""),
    "app": (lambda name: hasattr(APP, name), "app."),
    "task": (lambda name: hasattr(TASK, name), "task."),
    "AsyncResult": (lambda name: hasattr(OfResult, name) or name in OF_RESULTS, "result."),
    "GroupResult": (
        lambda name: hasattr(amqtask.GroupResult, name) or hasattr(OfResults, name) or name in OF_RESULTS,
        "group_result.",
    ),
    "Signature": (lambda name: hasattr(amqtask.Signature, name), "signature."),
    "canvas": (lambda name: hasattr(canvas, name), ""),
    "exceptions": (lambda name: hasattr(exceptions, name), ""),
    "result": (lambda name: hasattr(result, name), ""),
    "signals": (lambda name: hasattr(signals, name), ""),
    "modules": (importable, ""),
}


# `Celery` is AmqTask; `uuid` is a function of Celery's; what is current has no docstring of its own.
NOT_RENDERED = {"Celery", "__version__", "current_app", "current_task", "uuid"}


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    rendered = set(re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(), re.MULTILINE))
    homes = {name: getattr(amqtask, name).__module__ for name in set(amqtask.__all__) - NOT_RENDERED}

    assert [name for name, home in homes.items() if not {home, f"{home}.{name}"} & rendered] == []

"""A worker of a Django project: tasks find connections, language and time zone as requests do."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from amqtask import AmqTask, signals
from amqtask.assembly import build_worker
from amqtask.testing.worker import start_worker
from amqtask.worker.options import WorkerOptions

SHOP = "integration.apps.django_site.shop.tasks"


@pytest.fixture
def run(project: AmqTask) -> Callable[..., Any]:
    """Calls one of the shop's tasks."""
    return lambda name, *args: project.send_task(f"{SHOP}.{name}", args).get(timeout=60)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Connections that Django keeps for threads end with these, unclosed; Python 3.13 warns of SQLite's."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_tasks_of_installed_applications_are_found(project: AmqTask) -> None:
    project.finalize()

    assert f"{SHOP}.order" in project.tasks


def test_without_a_project_no_worker_looks_at_django(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DJANGO_SETTINGS_MODULE", raising=False)
    app = AmqTask("plain", broker="memory://", backend="cache+memory://", set_as_current=False)

    build_worker(app, WorkerOptions(pool="solo", install_signals=False)).loop.close()

    assert str(app.timezone) == "UTC"
    assert not signals.task_prerun


def test_a_project_without_django_is_told_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "nobody.settings")
    monkeypatch.setitem(sys.modules, "django", None)
    app = AmqTask("plain", broker="memory://", set_as_current=False)

    app.import_modules()

    assert "'nobody.settings', and Django is not installed" in caplog.text


@pytest.mark.parametrize("pool", ["solo", "threads", "asyncio"])
def test_tasks_use_the_database(project: AmqTask, run: Callable[..., Any], pool: str) -> None:
    with start_worker(project, pool=pool):
        run("order", "books")
        run("order_async", "pens")

        assert run("count") == 2


@pytest.mark.parametrize("age", [0, 60])
def test_connections_live_as_long_as_the_settings_say(
    project: AmqTask, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, age: int
) -> None:
    from django.db import connections

    monkeypatch.setitem(connections.settings["default"], "CONN_MAX_AGE", age)
    with start_worker(project, pool="threads"):
        run("connections_at_start")

        assert run("connections_at_start") == bool(age)


@pytest.mark.parametrize("pool", ["threads", "asyncio"])
def test_the_connection_of_a_coroutine_ends_with_it(project: AmqTask, run: Callable[..., Any], pool: str) -> None:
    from integration.apps.django_site.shop.tasks import KEPT

    with start_worker(project, pool=pool):
        assert run("connection_of_coroutine") is False
        assert run("connection_of_coroutine") is False

    assert len(KEPT) >= 2
    assert all(used.connection is None for used in KEPT)


def test_a_task_that_runs_inline_leaves_its_callers_connection_alone(project: AmqTask, run: Callable[..., Any]) -> None:
    with start_worker(project):
        assert run("call_inline") is True


@pytest.mark.parametrize("pool", ["solo", "threads", "asyncio"])
@pytest.mark.parametrize("age", [0, 60])
def test_a_transaction_that_a_task_leaves_open_takes_no_other_tasks_work(
    project: AmqTask,
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    pool: str,
    age: int,
) -> None:
    from django.contrib.auth.models import Group
    from django.db import connections

    monkeypatch.setitem(connections.settings["default"], "CONN_MAX_AGE", age)
    with start_worker(project, pool=pool, concurrency=1):
        run("leave_a_transaction", "never")
        run("order", "books")

        assert [each.name for each in Group.objects.all()] == ["books"]
    assert "leave_a_transaction has left a transaction open on database 'default'" in caplog.text


def test_each_task_begins_with_the_language_and_zone_of_the_settings(project: AmqTask, run: Callable[..., Any]) -> None:
    with start_worker(project):
        first = run("speak", "fr", "Asia/Tokyo")

        assert first == run("speak") == ["en-us", "Europe/Berlin"]


def test_schedules_are_in_the_projects_time_zone_unless_a_setting_says_another(project: AmqTask) -> None:
    assert str(project.timezone) == "Europe/Berlin"
    project.conf.timezone = "Asia/Shanghai"
    assert str(project.timezone) == "Asia/Shanghai"


def test_a_worker_that_ends_lets_go_of_the_process(project: AmqTask, run: Callable[..., Any]) -> None:
    with start_worker(project):
        run("count")

    assert not signals.task_prerun
    assert not signals.worker_process_init

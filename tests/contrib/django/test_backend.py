"""Results in Django's database and cache: the contract of all stores, and the content that django-celery-results has."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from amqtask import AmqTask, states
from amqtask.backends.contract import BackendOptions, ResultBackend, RetryPolicy
from amqtask.backends.registry import open_backend
from amqtask.exceptions import BackendUnreachable, ConfigurationError, EncodeError
from amqtask.protocol.result import ResultMessage, exception_as_dict, now_iso
from amqtask.testing.suites.backend import BackendSuite
from amqtask.testing.worker import start_worker

SHOP = "integration.apps.django_site.shop.tasks"


def opened(url: str, **options: Any) -> ResultBackend:
    made = open_backend(url, BackendOptions(url=url, **options))
    assert made is not None
    return made


class TestDatabase(BackendSuite):
    @pytest.fixture(autouse=True)
    def database(self, committed: None) -> None: ...

    def make(self) -> ResultBackend:
        return opened("django-db")

    def make_expiring(self, seconds: float) -> ResultBackend | None:
        return opened("django-db", expires=seconds)


class TestCache(BackendSuite):
    """On a cache of files: one that threads and processes share, and that needs no server."""

    @pytest.fixture(autouse=True)
    def cache(self, django: None) -> None: ...

    def make(self) -> ResultBackend:
        return opened("django-cache", settings={"cache_backend": "files"})

    def make_expiring(self, seconds: float) -> ResultBackend | None:
        return opened("django-cache", settings={"cache_backend": "files"}, expires=seconds)


@pytest.fixture
def backend(committed: None) -> Any:
    return opened("django-db")


@pytest.fixture
def rows(committed: None) -> Any:
    from amqtask.contrib.django.models import TaskResult

    return TaskResult.objects


def test_a_row_has_what_django_celery_results_writes(backend: Any, rows: Any) -> None:
    extra = {
        "name": "shop.add", "args": [1, 2], "kwargs": {"z": None}, "worker": "celery@host", "retries": 2, "queue": "work",
        "periodic_task_name": "every hour",
    }  # fmt: skip
    backend.store(ResultMessage("1", states.STARTED, {"pid": 7}))
    started = rows.get()
    backend.store(
        ResultMessage("1", states.SUCCESS, {"a": 1}, None, [[["2", None], None]], now_iso(), "group", "parent", extra)
    )

    row = rows.get()
    assert (row.status, json.loads(row.result)) == (states.SUCCESS, {"a": 1})
    assert (row.content_type, row.content_encoding) == ("application/json", "utf-8")
    assert (row.task_name, row.worker, row.periodic_task_name) == ("shop.add", "celery@host", "every hour")
    assert (json.loads(row.task_args), json.loads(row.task_kwargs)) == ([1, 2], {"z": None})
    assert json.loads(row.meta)["children"] == [[["2", None], None]]
    assert row.date_started == started.date_started is not None
    assert row.date_created == started.date_created <= row.date_done


def test_bytes_are_kept_as_text(committed: None, rows: Any) -> None:
    backend = opened("django-db://", serializer="pickle", accept=frozenset({"pickle"}))

    backend.store(ResultMessage("1", states.SUCCESS, {1, 2}))

    found = backend.find("1")
    assert found is not None
    assert found.result == {1, 2}
    assert rows.get().content_encoding == "binary"


def test_a_row_of_django_celery_results_is_read(backend: Any, rows: Any) -> None:
    task_id = str(uuid.uuid4())
    rows.create(
        task_id=task_id,
        status=states.FAILURE,
        task_name="shop.add",
        task_args='"(1, 2)"',
        task_kwargs="{'broken': ",
        content_type="application/json",
        content_encoding="utf-8",
        result=json.dumps(exception_as_dict(KeyError("x"))),
        traceback="Traceback …",
        meta='{"children": [], "of our own": 1}',
    )

    found = backend.find(task_id)

    assert found.result == exception_as_dict(KeyError("x"))
    assert (found.status, found.traceback, found.children) == (states.FAILURE, "Traceback …", [])
    assert (found.extra["args"], found.extra["kwargs"]) == ("(1, 2)", "{'broken': ")
    assert found.extra["of our own"] == 1


def test_a_result_inside_a_transaction_ends_with_it(backend: Any, rows: Any) -> None:
    from django.db import transaction

    backend.store(ResultMessage("1", states.SUCCESS, 1))
    with transaction.atomic():
        backend.store(ResultMessage("1", states.SUCCESS, 2))  # refused by the row that is there, and nothing is broken
        backend.store(ResultMessage("2", "PROGRESS", {"done": 50}))
        transaction.set_rollback(True)

    assert [row.task_id for row in rows.all()] == ["1"]
    assert backend.find("1").result == 1


def test_a_missing_table_says_what_to_do(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from amqtask.contrib.django.models import TaskResult

    monkeypatch.setattr(TaskResult._meta, "db_table", "never_made")
    impatient = opened("django-db", transport_options=(("retry_for", 0.0),))

    with pytest.raises(BackendUnreachable, match=r"manage\.py migrate"):
        impatient.find("1")


def test_what_is_stored_on_the_io_loop_is_given_up_even_with_always_retry(
    committed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from amqtask.contrib.django.models import TaskResult

    monkeypatch.setattr(TaskResult._meta, "db_table", "never_made")
    store = opened("django-db", always_retry=RetryPolicy(seconds=None), transport_options=(("retry_for", 0.1),))

    with pytest.raises(BackendUnreachable):
        store.store_briefly(ResultMessage("it", states.REVOKED, None))


def test_a_project_without_the_application_is_told_what_to_do() -> None:
    program = """
from django.conf import settings
settings.configure(INSTALLED_APPS=[])
from amqtask.contrib.django.backend import find_models
find_models()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert 'ConfigurationError: the Django project has no tables for this: add "amqtask.contrib.django"' in done.stderr


def test_a_worker_stores_what_its_tasks_return(project: AmqTask, rows: Any) -> None:
    project.conf.update(result_backend="django-db", result_extended=True, task_track_started=True)
    with start_worker(project, pool="threads"):
        result = project.send_task(f"{SHOP}.order", ("books",), headers={"periodic_task_name": "every hour"})
        assert isinstance(result.get(timeout=60), int)
        with pytest.raises(ValueError, match="no such customer"):
            project.send_task(f"{SHOP}.fail_in_transaction", ("x",)).get(timeout=60)

    stored = {row.task_name.rpartition(".")[2]: row for row in rows.all()}
    assert stored["order"].periodic_task_name == "every hour"
    assert stored["order"].task_args == '["books"]'
    assert stored["order"].date_started is not None
    assert "no such customer" in stored["fail_in_transaction"].traceback


def test_a_chord_is_joined_without_the_store(project: AmqTask) -> None:
    from amqtask import chord, signature

    project.conf.result_backend = "django-db"

    @project.task(name="site.add")
    def add(x: int, y: int) -> int:
        return x + y

    @project.task(name="site.total")
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    with start_worker(project, pool="threads", concurrency=2):
        members = [signature("site.add", (n, n), app=project) for n in range(4)]
        assert chord(members, app=project)(signature("site.total", app=project)).get(timeout=60) == 12


def test_a_cache_that_nobody_shares_is_warned_of(django: None, caplog: pytest.LogCaptureFixture) -> None:
    opened("django-cache")

    assert "which no other process can read" in caplog.text


def test_a_cache_that_is_not_there_is_named(django: None) -> None:
    with pytest.raises(ConfigurationError, match="'nowhere'"):
        opened("django-cache", settings={"cache_backend": "nowhere"})


@pytest.fixture(params=["Raises", "SaysNothing"])
def picky(django: None, request: pytest.FixtureRequest) -> Iterator[ResultBackend]:
    """A cache that takes no large values."""
    from django.test import override_settings

    with override_settings(CACHES={"default": {"BACKEND": f"tests.contrib.django.picky_cache.{request.param}"}}):
        yield opened("django-cache")


def test_a_result_that_the_cache_does_not_take_is_an_error_of_that_task(picky: ResultBackend) -> None:
    with pytest.raises(EncodeError, match="does not take a result"):
        picky.store(ResultMessage("it", states.SUCCESS, "x" * 10_000))

    picky.store(ResultMessage("it", states.FAILURE, exception_as_dict(ValueError("small"))))
    assert picky.wait("it", timeout=0).status == states.FAILURE


def test_a_cache_that_keeps_nothing_is_away(django: None) -> None:
    from django.test import override_settings

    away = override_settings(CACHES={"default": {"BACKEND": "tests.contrib.django.picky_cache.IsAway"}})
    with away, pytest.raises(BackendUnreachable, match="does not answer"):
        opened("django-cache").store(ResultMessage("it", states.SUCCESS, 1))


def test_a_result_of_celerys_cache_backend_is_read(django: None) -> None:
    from django.core.cache import caches

    backend = opened("django-cache", settings={"cache_backend": "files"})
    meta = {"task_id": "c", "status": "FAILURE", "result": KeyError("x"), "traceback": "…", "children": []}
    caches["files"].set("celery-task-meta-c", meta)

    found = backend.find("c")

    assert found is not None
    assert found.result == exception_as_dict(KeyError("x"))

"""The entries of the settings and their last runs in a file."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from amqtask import AmqTask, crontab
from amqtask.beat.build import find_store
from amqtask.beat.contract import Run, ScheduleStore, StoreOptions
from amqtask.beat.settings_store import FileStore, MemoryStore
from amqtask.exceptions import ConfigurationError
from amqtask.schedules import schedule

NOW = datetime(2026, 5, 4, 12, tzinfo=timezone.utc)


def app_with(**entries: Any) -> AmqTask:
    return AmqTask("tasks", broker="memory://", set_as_current=False, beat_schedule=entries)


def run_of(name: str, count: int, at: datetime = NOW) -> Run:
    return Run(name, at, at + timedelta(seconds=1), f"id-{count}", count)


def test_entries_are_those_of_the_settings() -> None:
    app = app_with(
        a={"task": "tasks.add", "schedule": 30.0, "args": (1, 2), "options": {"queue": "far", "expires": 10}},
        b={"task": "tasks.add", "schedule": crontab(0, 4), "kwargs": {"x": 1}},
        c={"task": "tasks.add", "schedule": timedelta(hours=1), "relative": True, "enabled": False},
    )
    found = {entry.name: entry for entry in MemoryStore(app, StoreOptions()).entries()}
    assert found["a"].schedule == schedule(30)
    assert found["a"].args == (1, 2)
    assert found["a"].options == {"queue": "far", "expires": 10}
    assert found["b"].schedule == crontab(0, 4)
    assert found["b"].kwargs == {"x": 1}
    assert found["c"].relative
    assert not found["c"].enabled


@pytest.mark.parametrize("spelling", ["CELERYBEAT_SCHEDULE", "CELERY_BEAT_SCHEDULE", "beat_schedule", "BEAT_SCHEDULE"])
def test_the_schedule_has_all_of_celerys_names(spelling: str) -> None:
    app = AmqTask("tasks", broker="memory://", set_as_current=False)
    app.config_from_object({spelling: {"a": {"task": "tasks.add", "schedule": 5}}})
    assert [entry.name for entry in MemoryStore(app, StoreOptions()).entries()] == ["a"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"schedule": 5}, "needs a task"),
        ({"task": "tasks.add"}, "needs a task"),
        ({"task": "tasks.add", "schedule": "daily"}, "is not a schedule"),
        ({"task": "tasks.add", "schedule": 0}, "longer than nothing"),
        ({"task": "tasks.add", "schedule": 5, "arg": [1]}, "no field 'arg'"),
        (["tasks.add", 5], "is not a mapping"),
        ({"task": "tasks.add", "schedule": 5, "args": "ab"}, "args is a list or a tuple"),
        ({"task": "tasks.add", "schedule": 5, "kwargs": [1]}, "kwargs is a dictionary"),
        ({"task": "tasks.add", "schedule": 5, "options": "high"}, "options is a dictionary"),
        ({"task": "tasks.add", "schedule": 5, "options": {"priority": 999}}, "priority wants a whole number"),
    ],
)
def test_an_entry_that_is_wrong_is_named(given: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=r"beat_schedule\['wrong'\].*" + says):
        MemoryStore(app_with(wrong=given), StoreOptions()).entries()


def test_a_change_of_the_settings_is_noticed_wherever_it_is() -> None:
    app = app_with(a={"task": "tasks.add", "schedule": 5})
    store = MemoryStore(app, StoreOptions())
    store.entries()
    assert not store.has_changed()
    store.record([run_of("a", 1)])
    assert not store.has_changed()
    app.conf.beat_schedule["a"]["schedule"] = 6
    assert store.has_changed()
    store.entries()
    assert not store.has_changed()
    app.conf.beat_schedule["b"] = {"task": "tasks.add", "schedule": 5}
    assert store.has_changed()
    store.entries()
    app.conf.beat_schedule = {}
    assert store.has_changed()


def test_a_file_remembers_last_runs(tmp_path: Path) -> None:
    app = app_with(a={"task": "tasks.add", "schedule": 5}, b={"task": "tasks.add", "schedule": 5})
    options = StoreOptions(filename=str(tmp_path / "last"))
    store = FileStore(app, options)
    store.entries()
    store.record([run_of("a", 1), run_of("a", 2, NOW + timedelta(hours=1))])
    store.close()

    assert store.path == tmp_path / "last.sqlite3"
    again = FileStore(app, options)
    found = {entry.name: entry for entry in again.entries()}
    assert found["a"].last_due_at == NOW + timedelta(hours=1)
    assert found["a"].last_run_at == NOW + timedelta(hours=1, seconds=1)
    assert found["a"].total_run_count == 2
    assert found["b"].last_due_at is None
    again.close()


def test_looking_creates_no_file(tmp_path: Path) -> None:
    store = FileStore(app_with(), StoreOptions(filename=str(tmp_path / "last"), read_only=True))
    assert list(store.entries()) == []
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_something_else_is_kept_aside(tmp_path: Path) -> None:
    path = tmp_path / "celerybeat-schedule.db"
    path.write_bytes(b"a shelve of Celery's, or anything at all, longer than a header" * 100)
    store = FileStore(app_with(), StoreOptions(filename=str(path)))
    store.record([run_of("a", 1)])
    store.close()
    kept = [each for each in tmp_path.iterdir() if "unreadable" in each.name]
    assert len(kept) == 1
    assert kept[0].read_bytes().startswith(b"a shelve")


def _spoiled(path: Path) -> None:
    """Pages within are no pages, and the header says that all is well."""
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xa5" * (len(content) - 4096)
    path.write_bytes(content)


def _with_a_time_that_is_none(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE entries SET last_due_at = 'yesterday'")
        connection.commit()


@pytest.mark.parametrize("spoil", [_spoiled, _with_a_time_that_is_none])
def test_a_file_whose_rows_cannot_be_read_is_kept_aside(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = tmp_path / "last.sqlite3"
    for number in range(2):
        store = FileStore(app_with(), StoreOptions(filename=str(path)))
        store.record([run_of("a", 1)])
        store.close()
        if not number:
            spoil(path)

    assert sum("unreadable" in each.name for each in tmp_path.iterdir()) == 1


def test_a_file_in_no_folder_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="-s or beat_schedule_filename"):
        FileStore(app_with(), StoreOptions(filename=str(tmp_path / "none" / "last")))


def test_results_that_do_not_expire_are_cleaned_up_daily(tmp_path: Path) -> None:
    app = app_with(a={"task": "tasks.add", "schedule": 5})
    app.conf.result_backend = f"db+sqlite:///{tmp_path}/results"
    found = {entry.name: entry for entry in MemoryStore(app, StoreOptions()).entries()}
    assert found["celery.backend_cleanup"].schedule == crontab(0, 4)
    assert found["celery.backend_cleanup"].options == {"expires": 12 * 3600}
    app.conf.result_expires = None
    assert [entry.name for entry in MemoryStore(app, StoreOptions()).entries()] == ["a"]


def test_results_that_expire_by_themselves_need_no_clean_up() -> None:
    app = app_with()
    app.conf.result_backend = "cache+memory://"
    assert list(MemoryStore(app, StoreOptions()).entries()) == []


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (None, FileStore),
        ("file", FileStore),
        ("memory", MemoryStore),
        ("celery.beat:PersistentScheduler", FileStore),
        ("celery.beat.PersistentScheduler", FileStore),
        ("amqtask.beat.settings_store:MemoryStore", MemoryStore),
        ("amqtask.beat.settings_store.MemoryStore", MemoryStore),
    ],
)
def test_a_store_is_found_by_name_or_path(spec: str | None, expected: Callable[..., ScheduleStore]) -> None:
    assert find_store(spec) is expected


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("nothing", "there are .*file"),
        ("no.such.module:Class", "cannot be loaded"),
        ("amqtask.beat.settings_store:Nothing", "cannot be loaded"),
        ("collections:OrderedDict", "is not a schedule store"),
    ],
)
def test_what_is_no_store_is_an_error_that_says_so(spec: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        find_store(spec)

"""The database scheduler: entries from the tables, changes seen, runs noted, the settings' entries merged."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.beat.contract import Run, StoreOptions
from amqtask.schedules import clocked, crontab, schedule

pytestmark = pytest.mark.usefixtures("database")
NOON = datetime(2026, 6, 1, 12, tzinfo=timezone.utc)


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> AmqTask:
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "integration.apps.django_site.settings")
    made = AmqTask("site", broker="memory://", set_as_current=False)
    made.import_modules()
    return made


@pytest.fixture
def models(database: None) -> Any:
    import amqtask.contrib.django.models

    return amqtask.contrib.django.models


@pytest.fixture
def store(app: AmqTask, models: Any) -> Any:
    from amqtask.contrib.django.schedulers import DatabaseScheduler

    return DatabaseScheduler(app, StoreOptions())


@pytest.fixture
def every(models: Any) -> Any:
    return models.IntervalSchedule.objects.create(every=10, period="seconds")


def names(store: Any) -> list[str]:
    return [entry.name for entry in store.entries()]


def test_each_kind_of_schedule_becomes_an_entry(store: Any, models: Any, every: Any) -> None:
    nightly = models.CrontabSchedule.objects.create(minute="30", hour="4", timezone="Asia/Shanghai")
    once = models.ClockedSchedule.objects.create(clocked_time=NOON)
    models.PeriodicTask.objects.create(
        name="a", task="t.a", interval=every, args="[1, 2]", kwargs='{"x": 3}', queue="q", priority=5, expire_seconds=60,
        headers='{"tenant": "x"}', start_time=NOON,
    )  # fmt: skip
    models.PeriodicTask.objects.create(name="b", task="t.b", crontab=nightly, expires=NOON)
    models.PeriodicTask.objects.create(name="c", task="t.c", clocked=once, one_off=True)

    a, b, c = sorted(store.entries(), key=lambda entry: str(entry.name))

    assert (a.task, a.schedule, a.args, a.kwargs, a.start_time) == ("t.a", schedule(10), [1, 2], {"x": 3}, NOON)
    assert a.options == {
        "queue": "q", "priority": 5, "expires": 60, "headers": {"tenant": "x", "periodic_task_name": "a"},
    }  # fmt: skip
    assert b.schedule == crontab(30, 4, tz="Asia/Shanghai")
    assert b.schedule.next_due(NOON, timezone.utc) == datetime(2026, 6, 1, 20, 30, tzinfo=timezone.utc)
    assert b.expires == NOON
    assert (c.schedule, c.one_off) == (clocked(NOON), True)


def test_a_change_is_seen_and_a_run_is_none(store: Any, models: Any, every: Any) -> None:
    task = models.PeriodicTask.objects.create(name="a", task="t", interval=every)
    assert names(store) == ["a"]
    assert not store.has_changed()

    task.enabled = False
    task.save()
    assert store.has_changed()
    assert names(store) == []

    models.PeriodicTask.objects.create(name="b", task="t", interval=every)
    assert store.has_changed()
    assert names(store) == ["b"]

    store.record([Run("b", NOON, NOON + timedelta(seconds=1), "id", 7)])
    assert not store.has_changed()
    [entry] = store.entries()
    assert (entry.last_due_at, entry.last_run_at, entry.total_run_count) == (NOON, NOON + timedelta(seconds=1), 7)


def test_what_ran_once_is_disabled_and_may_be_enabled_again(store: Any, models: Any, every: Any) -> None:
    task = models.PeriodicTask.objects.create(name="a", task="t", interval=every, one_off=True)
    run = Run("a", NOON, NOON, "id", 1, is_last=True)

    store.record([run])
    store.record([run])

    task.refresh_from_db()
    assert (task.enabled, task.last_run_at) == (False, NOON)
    task.enabled = True
    task.save()
    [entry] = store.entries()
    assert (entry.one_off, entry.total_run_count) == (True, 0)


def test_a_row_that_cannot_be_read_harms_no_other(
    store: Any, models: Any, every: Any, caplog: pytest.LogCaptureFixture
) -> None:
    models.PeriodicTask.objects.create(name="broken", task="t", interval=every, args="[1,")
    wrong = models.CrontabSchedule.objects.create(minute="99")
    models.PeriodicTask.objects.create(name="never", task="t", crontab=wrong)
    models.PeriodicTask.objects.create(name="sound", task="t", interval=every)

    assert names(store) == ["sound"]
    assert "'broken' is left out" in caplog.text
    assert "'never' is left out: crontab: minute" in caplog.text


def test_the_settings_entries_are_written_into_the_tables(app: AmqTask, store: Any, models: Any) -> None:
    app.conf.beat_schedule = {
        "often": {"task": "t.often", "schedule": 30.0, "args": (16, 4), "options": {"queue": "q", "expires": 10}},
        "weekly": {"task": "t.weekly", "schedule": crontab(hour=7, minute=30, day_of_week=1)},
        "half": {"task": "t.half", "schedule": timedelta(milliseconds=500)},
    }

    assert sorted(names(store)) == ["half", "often", "weekly"]

    rows = {row.name: row for row in models.PeriodicTask.objects.all()}
    assert (str(rows["often"].interval), rows["often"].args, rows["often"].queue) == (
        "every 30 seconds",
        "[16, 4]",
        "q",
    )
    assert rows["often"].expire_seconds == 10
    assert str(rows["weekly"].crontab) == "30 7 * * 1 (m/h/dM/MY/d) Europe/Berlin"
    assert str(rows["half"].interval) == "every 500000 microseconds"


def test_the_settings_win_but_for_what_is_enabled(app: AmqTask, models: Any, every: Any) -> None:
    from amqtask.contrib.django.schedulers import DatabaseScheduler

    app.conf.beat_schedule = {"a": {"task": "t.new", "schedule": 60}}
    models.PeriodicTask.objects.create(name="a", task="t.old", interval=every, enabled=False)

    assert names(DatabaseScheduler(app, StoreOptions())) == []

    row = models.PeriodicTask.objects.get()
    assert (row.task, str(row.interval), row.enabled) == ("t.new", "every 60 seconds", False)
    changed = models.PeriodicTasks.last_change()
    names(DatabaseScheduler(app, StoreOptions()))
    assert models.PeriodicTasks.last_change() == changed, "nothing changed, so nobody need read"


def test_an_entry_that_does_not_fit_into_the_tables_is_left_out(
    app: AmqTask, store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    app.conf.beat_schedule = {
        "strange": {"task": "t", "schedule": 60, "args": [object()]},
        "sound": {"task": "t", "schedule": 60, "options": {"shadow": "x"}},
    }

    assert names(store) == ["sound"]
    assert "beat_schedule['strange']: its arguments cannot be written as JSON" in caplog.text
    assert "no place for the options shadow" in caplog.text


def test_rows_and_schedules_are_each_others_images(models: Any, every: Any) -> None:
    line = crontab("*/5", "8-17", "mon-fri", tz="Europe/Berlin")
    row = models.CrontabSchedule.from_schedule(line)
    row.save()

    assert row.schedule == line
    assert models.CrontabSchedule.from_schedule(line) == row
    assert models.IntervalSchedule.from_schedule(every.schedule) == every
    assert models.IntervalSchedule.from_schedule(schedule(7200), period="hours").every == 2
    assert models.ClockedSchedule.from_schedule(clocked(NOON)).schedule == clocked(NOON)


def test_a_project_without_time_zones_keeps_local_times(store: Any, models: Any, every: Any) -> None:
    from django.test import override_settings

    with override_settings(USE_TZ=False):
        local = datetime(2026, 6, 1, 14)  # in Berlin, at noon of UTC
        models.PeriodicTask.objects.create(name="a", task="t", interval=every, start_time=local, expires=local)
        once = models.ClockedSchedule.objects.create(clocked_time=local)
        models.PeriodicTask.objects.create(name="b", task="t", clocked=once, one_off=True)
        store.record([Run("a", NOON, NOON, "id", 1)])

        a, b = sorted(store.entries(), key=lambda entry: str(entry.name))

        assert (a.start_time, a.expires, a.last_due_at, a.options["expires"]) == (NOON, NOON, NOON, NOON)
        assert b.schedule == clocked(NOON)
        assert models.PeriodicTask.objects.get(name="a").last_run_at == local


def test_who_only_looks_changes_nothing(app: AmqTask, models: Any, every: Any) -> None:
    from amqtask.contrib.django.schedulers import DatabaseScheduler

    app.conf.beat_schedule = {"a": {"task": "t.new", "schedule": 60}, "b": {"task": "t.b", "schedule": 60}}
    models.PeriodicTask.objects.create(name="a", task="t.old", interval=every)

    looked = {entry.name: entry.task for entry in DatabaseScheduler(app, StoreOptions(read_only=True)).entries()}

    assert looked == {"a": "t.old", "b": "t.b"}
    assert models.PeriodicTask.objects.count() == 1


def test_the_time_zone_of_the_project_is_that_of_its_schedules(app: AmqTask, store: Any) -> None:
    assert str(app.timezone) == "Europe/Berlin"


def test_rows_that_cannot_be_used_are_left_out_and_named(
    store: Any, models: Any, every: Any, caplog: pytest.LogCaptureFixture
) -> None:
    models.PeriodicTask.objects.create(name="good", task="t.a", interval=every)
    fortnight = models.IntervalSchedule.objects.create(every=1, period="fortnights")
    models.PeriodicTask.objects.create(name="fortnightly", task="t.b", interval=fortnight)
    endless = models.IntervalSchedule.objects.create(every=2_000_000_000, period="days")
    models.PeriodicTask.objects.create(name="endless", task="t.b", interval=endless)
    nightly = models.CrontabSchedule.objects.create(minute="0", hour="4", timezone="UTC")
    models.PeriodicTask.objects.create(name="on mars", task="t.c", crontab=nightly)
    models.CrontabSchedule.objects.filter(pk=nightly.pk).update(hour="4")
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute(f"UPDATE {nightly._meta.db_table} SET timezone = 'Mars/Olympus'")

    assert names(store) == ["good"]
    for name in ("fortnightly", "endless", "on mars"):
        assert f"periodic task '{name}' is left out" in caplog.text
    assert "no time zone 'Mars/Olympus'" in caplog.text

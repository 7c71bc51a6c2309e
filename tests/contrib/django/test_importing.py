"""`manage.py amqtask_import_celery`: the tables of the two Celery packages into ours."""

from __future__ import annotations

import io
from datetime import datetime, timezone
from typing import Any

import pytest

# As their migrations leave them (django_celery_beat 2.9, django_celery_results 2.6).
THEIRS = """
CREATE TABLE django_celery_beat_intervalschedule (id integer PRIMARY KEY, every integer NOT NULL, period varchar(24) NOT NULL);
CREATE TABLE django_celery_beat_crontabschedule (id integer PRIMARY KEY, minute varchar(240) NOT NULL, hour varchar(96) NOT NULL,
  day_of_week varchar(64) NOT NULL, day_of_month varchar(124) NOT NULL, month_of_year varchar(64) NOT NULL,
  timezone varchar(63) NOT NULL);
CREATE TABLE django_celery_beat_solarschedule (id integer PRIMARY KEY, event varchar(24) NOT NULL, latitude decimal NOT NULL,
  longitude decimal NOT NULL);
CREATE TABLE django_celery_beat_clockedschedule (id integer PRIMARY KEY, clocked_time datetime NOT NULL);
CREATE TABLE django_celery_beat_periodictask (id integer PRIMARY KEY,
  name varchar(200) NOT NULL UNIQUE, task varchar(200) NOT NULL,
  args text NOT NULL, kwargs text NOT NULL, queue varchar(200), exchange varchar(200), routing_key varchar(200), expires datetime,
  enabled bool NOT NULL, last_run_at datetime, total_run_count integer NOT NULL, date_changed datetime NOT NULL,
  description text NOT NULL, crontab_id integer, interval_id integer, solar_id integer, one_off bool NOT NULL,
  start_time datetime, priority integer, headers text NOT NULL, clocked_id integer, expire_seconds integer);
CREATE TABLE django_celery_results_taskresult (id integer PRIMARY KEY, task_id varchar(255) NOT NULL UNIQUE,
  status varchar(50) NOT NULL, content_type varchar(128) NOT NULL, content_encoding varchar(64) NOT NULL, result text,
  date_done datetime NOT NULL, traceback text, meta text, task_args text, task_kwargs text, task_name varchar(255),
  worker varchar(100), date_created datetime NOT NULL, periodic_task_name varchar(255));
"""
ROWS = """
INSERT INTO django_celery_beat_intervalschedule VALUES (5, 10, 'seconds'), (6, 10, 'seconds'), (7, 1, 'days');
INSERT INTO django_celery_beat_crontabschedule VALUES (3, '30', '7', '1', '*', '*', 'Asia/Shanghai');
INSERT INTO django_celery_beat_clockedschedule VALUES (1, '2030-01-01 12:00:00');
INSERT INTO django_celery_beat_periodictask VALUES
 (11, 'often', 't.often', '[1]', '{"a": 2}', 'fast', NULL, NULL, NULL, 1, '2026-01-01 10:00:00', 42, '2026-01-01 09:00:00',
  'of mine', NULL, 6, NULL, 0, NULL, 5, '{}', NULL, 60),
 (12, 'weekly', 't.weekly', '[]', '{}', NULL, NULL, NULL, NULL, 0, NULL, 0, '2026-01-01 09:00:00', '', 3, NULL, NULL, 0, NULL,
  NULL, '{}', NULL, NULL),
 (13, 'once', 't.once', '[]', '{}', NULL, NULL, NULL, NULL, 1, NULL, 0, '2026-01-01 09:00:00', '', NULL, NULL, NULL, 1, NULL,
  NULL, '{}', 1, NULL);
INSERT INTO django_celery_results_taskresult VALUES
 (1, 'abc', 'SUCCESS', 'application/json', 'utf-8', '8', '2026-01-01 10:00:00', NULL, '{"children": []}', NULL, NULL, 't.add',
  'celery@h', '2026-01-01 09:59:00', 'often');
"""


@pytest.fixture
def models(database: None) -> Any:
    from django.db import connection

    import amqtask.contrib.django.models

    with connection.cursor() as cursor:
        for statement in (THEIRS + ROWS).split(";"):
            if statement.strip():
                cursor.execute(statement)
    return amqtask.contrib.django.models


def run(*options: str) -> str:
    from django.core.management import call_command

    out = io.StringIO()
    call_command("amqtask_import_celery", *options, stdout=out)
    return out.getvalue()


def test_all_rows_arrive_with_their_schedules(models: Any) -> None:
    said = run()

    often, once, weekly = models.PeriodicTask.objects.order_by("name")
    assert str(often) == "often: every 10 seconds"
    assert (often.args, often.kwargs, often.queue, often.priority) == ("[1]", '{"a": 2}', "fast", 5)
    assert (often.total_run_count, often.expire_seconds, often.description) == (42, 60, "of mine")
    assert often.last_run_at == datetime(2026, 1, 1, 10, tzinfo=timezone.utc)
    assert str(weekly.crontab) == "30 7 * * 1 (m/h/dM/MY/d) Asia/Shanghai"
    assert not weekly.enabled
    assert once.clocked.clocked_time == datetime(2030, 1, 1, 12, tzinfo=timezone.utc)
    assert once.one_off
    result = models.TaskResult.objects.get()
    assert (result.task_id, result.result, result.task_name, result.periodic_task_name) == (
        "abc",
        "8",
        "t.add",
        "often",
    )
    assert result.date_done == datetime(2026, 1, 1, 10, tzinfo=timezone.utc)
    assert models.IntervalSchedule.objects.count() == 2, "two of theirs were the same"
    assert models.PeriodicTasks.last_change() is not None
    assert said.splitlines() == [
        "django_celery_beat_intervalschedule: 2 copied, 1 already here",
        "django_celery_beat_crontabschedule: 1 copied, 0 already here",
        "django_celery_beat_solarschedule: 0 copied, 0 already here",
        "django_celery_beat_clockedschedule: 1 copied, 0 already here",
        "django_celery_beat_periodictask: 3 copied, 0 already here",
        "django_celery_results_taskresult: 1 copied, 0 already here",
        "django_celery_results_groupresult: no such table",
    ]


def test_a_second_import_changes_nothing(models: Any) -> None:
    run()
    models.PeriodicTask.objects.filter(name="often").update(task="mine.now")

    said = run()

    assert "django_celery_beat_periodictask: 0 copied, 3 already here" in said
    assert models.PeriodicTask.objects.get(name="often").task == "mine.now"
    assert models.IntervalSchedule.objects.count() == 2


def test_a_rehearsal_copies_nothing(models: Any) -> None:
    said = run("--dry-run")

    assert "django_celery_beat_periodictask: 3 would be copied" in said
    assert not models.PeriodicTask.objects.exists()


def test_tables_of_an_older_version_get_defaults(models: Any) -> None:
    from django.db import connection

    with connection.cursor() as cursor:
        for column in ("clocked_id", "one_off", "headers", "start_time", "priority", "expire_seconds"):
            cursor.execute(f"ALTER TABLE django_celery_beat_periodictask DROP COLUMN {column}")
        cursor.execute("ALTER TABLE django_celery_beat_crontabschedule DROP COLUMN timezone")
        cursor.execute("DROP TABLE django_celery_beat_clockedschedule")
        cursor.execute("DELETE FROM django_celery_beat_periodictask WHERE name = 'once'")

    run()

    often, weekly = models.PeriodicTask.objects.order_by("name")
    assert (often.one_off, often.headers, str(often.interval)) == (False, "{}", "every 10 seconds")
    assert str(weekly.crontab.timezone) == "UTC"


def test_without_their_tables_it_says_so(database: None) -> None:
    assert "django_celery_beat_periodictask: no such table" in run()

"""Models of periodic tasks: one schedule each, changes noted, time zones kept by name."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any
from zoneinfo import ZoneInfo

import pytest

pytestmark = pytest.mark.usefixtures("database")


@pytest.fixture
def models(django: None) -> Any:
    import amqtask.contrib.django.models

    return amqtask.contrib.django.models


def test_the_migrations_say_what_the_models_say() -> None:
    from django.core.management import call_command

    call_command("makemigrations", "amqtask", check=True, dry_run=True, verbosity=0)


def test_a_task_has_exactly_one_schedule(models: Any) -> None:
    from django.core.exceptions import ValidationError

    every = models.IntervalSchedule.objects.create(every=10, period="seconds")
    nightly = models.CrontabSchedule.objects.create(hour="4", minute="0")

    with pytest.raises(ValidationError, match="Choose an interval"):
        models.PeriodicTask.objects.create(name="none", task="shop.tasks.sync")
    with pytest.raises(ValidationError, match="leave the others empty"):
        models.PeriodicTask.objects.create(name="two", task="shop.tasks.sync", interval=every, crontab=nightly)

    one = models.PeriodicTask.objects.create(name="one", task="shop.tasks.sync", interval=every)
    assert str(one) == "one: every 10 seconds"
    assert one.scheduler == every


def test_a_clocked_task_runs_once(models: Any) -> None:
    from django.core.exceptions import ValidationError

    noon = models.ClockedSchedule.objects.create(clocked_time=datetime(2026, 1, 1, 12, tzinfo=timezone.utc))

    with pytest.raises(ValidationError, match="tick one-off"):
        models.PeriodicTask.objects.create(name="clocked", task="shop.tasks.sync", clocked=noon)

    assert models.PeriodicTask.objects.create(name="clocked", task="t", clocked=noon, one_off=True).pk


def test_every_change_is_noted_whoever_makes_it(models: Any) -> None:
    seen = [models.PeriodicTasks.last_change()]

    def changed() -> bool:
        seen.append(models.PeriodicTasks.last_change())
        return bool(seen[-1] != seen[-2])

    every = models.IntervalSchedule.objects.create(every=1, period="hours")
    assert changed()
    task = models.PeriodicTask.objects.create(name="a", task="t", interval=every)
    assert changed()
    models.PeriodicTask.objects.filter(pk=task.pk).update(enabled=False)
    assert not changed()
    every.every = 2
    every.save()
    assert changed()
    models.IntervalSchedule.objects.all().delete()
    assert changed()
    assert not models.PeriodicTask.objects.exists()


def test_a_disabled_task_begins_anew(models: Any) -> None:
    every = models.IntervalSchedule.objects.create(every=1, period="hours")
    task = models.PeriodicTask.objects.create(
        name="a", task="t", interval=every, last_run_at=datetime(2026, 1, 1, tzinfo=timezone.utc)
    )

    task.enabled = False
    task.save()

    assert models.PeriodicTask.objects.get().last_run_at is None


def test_a_crontab_keeps_its_zone_by_name(models: Any) -> None:
    from django.core.exceptions import ValidationError

    made = models.CrontabSchedule.objects.create(minute="30", hour="7", timezone=ZoneInfo("Asia/Shanghai"))

    found = models.CrontabSchedule.objects.get(timezone="Asia/Shanghai")
    assert found == made
    assert found.timezone == ZoneInfo("Asia/Shanghai")
    assert str(found) == "30 7 * * * (m/h/dM/MY/d) Asia/Shanghai"
    with pytest.raises(ValidationError, match="no time zone 'Mars/Olympus'"):
        models.CrontabSchedule.objects.create(timezone="Mars/Olympus")


def test_a_result_has_the_columns_of_django_celery_results(models: Any) -> None:
    result = models.TaskResult.objects.create(task_id="abc", status="SUCCESS", content_type="application/json")

    assert str(result) == "<Task: abc (SUCCESS)>"
    assert result.as_dict().keys() == {
        "task_id", "task_name", "task_args", "task_kwargs", "status", "result", "date_done", "traceback", "meta", "worker",
    }  # fmt: skip

"""The admin: results to look at, periodic tasks to create, change, enable, disable and run now."""

from __future__ import annotations

import json
from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.protocol.result import exception_as_dict

PERIODIC = "/admin/amqtask/periodictask/"
RESULTS = "/admin/amqtask/taskresult/"
SHOP = "integration.apps.django_site.shop.tasks"


@pytest.fixture
def models(database: None) -> Any:
    import amqtask.contrib.django.models

    return amqtask.contrib.django.models


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The project's application, as the admin finds it."""
    from amqtask.ground import current

    monkeypatch.setattr(current, "_default", [])
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "integration.apps.django_site.settings")
    made = AmqTask("site", broker="memory://", task_default_queue="work")
    made.autodiscover_tasks()
    return made


@pytest.fixture
def browser(models: Any, app: Any) -> Any:
    """A superuser's requests."""
    from django.contrib.auth.models import User
    from django.test import Client

    client = Client()
    client.force_login(User.objects.create_superuser("root"))
    return client


@pytest.fixture
def every(models: Any) -> Any:
    return models.IntervalSchedule.objects.create(every=10, period="seconds")


def form(**fields: Any) -> dict[str, Any]:
    """What a browser sends of a periodic task."""
    blank = dict.fromkeys(
        ("interval", "crontab", "solar", "clocked", "start_time_0", "start_time_1", "expires_0", "expires_1",
         "expire_seconds", "queue", "exchange", "routing_key", "priority", "description"), "",
    )  # fmt: skip
    return {**blank, "name": "a", "task": f"{SHOP}.count", "args": "[]", "kwargs": "{}", "headers": "{}", **fields}


def errors_of(response: Any) -> str:
    return json.dumps(response.context["adminform"].form.errors)


def test_every_page_opens(browser: Any, models: Any, every: Any) -> None:
    models.PeriodicTask.objects.create(name="a", task="t", interval=every)
    models.CrontabSchedule.objects.create(hour="4")
    models.TaskResult.objects.create(task_id="1", content_type="application/json", content_encoding="utf-8")
    models.GroupResult.objects.create(group_id="1", content_type="application/json", content_encoding="utf-8")

    for name in ("periodictask", "intervalschedule", "crontabschedule", "solarschedule", "clockedschedule"):
        assert browser.get(f"/admin/amqtask/{name}/").status_code == 200
        assert browser.get(f"/admin/amqtask/{name}/add/").status_code == 200
    for name in ("taskresult", "groupresult"):
        assert browser.get(f"/admin/amqtask/{name}/").status_code == 200
        assert browser.get(f"/admin/amqtask/{name}/add/").status_code == 403


def test_a_result_is_shown_as_it_is_read(browser: Any, models: Any) -> None:
    from django.utils import timezone

    row = models.TaskResult.objects.create(
        task_id="1", task_name="shop.add", status="FAILURE", content_type="application/json", content_encoding="utf-8",
        task_args='[1, {"name": "J\\u00f6rg"}]', result=json.dumps(exception_as_dict(KeyError("<b>"))),
        traceback="Traceback\n  line 1",
    )  # fmt: skip

    page = browser.get(f"{RESULTS}{row.pk}/change/").content.decode()

    assert "  &quot;exc_type&quot;: &quot;KeyError&quot;" in page
    assert "&lt;b&gt;" in page
    assert "Jörg" in page
    assert "Traceback\n  line 1" in page
    assert f"{timezone.localtime(row.date_created):%Y-%m-%d %H:%M:%S}" in page
    assert 'name="_save"' not in page


@pytest.mark.parametrize("term", ["shop.add", "f00d", "Jörg"])
def test_results_are_found_by_id_name_and_arguments(browser: Any, models: Any, term: str) -> None:
    common = {"content_type": "application/json", "content_encoding": "utf-8"}
    models.TaskResult.objects.create(task_id="f00d", task_name="shop.add", task_args='["Jörg"]', **common)
    models.TaskResult.objects.create(task_id="cafe", task_name="shop.sub", task_args="[]", **common)

    page = browser.get(RESULTS, {"q": term}).content.decode()

    assert "f00d" in page
    assert "cafe" not in page


def test_a_periodic_task_is_created(browser: Any, models: Any, every: Any) -> None:
    page = browser.get(f"{PERIODIC}add/").content.decode()
    assert f'<option value="{SHOP}.count">' in page

    response = browser.post(f"{PERIODIC}add/", form(interval=every.pk, enabled="on"), follow=True)

    assert response.redirect_chain, errors_of(response)
    made = models.PeriodicTask.objects.get()
    assert (made.name, made.task, made.interval, made.enabled) == ("a", f"{SHOP}.count", every, True)
    assert "is registered in this process" not in response.content.decode()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"interval": ""}, "Choose an interval"),
        ({"args": "[1,"}, "This is no JSON"),
        ({"args": "{}"}, "Write it like ["),
        ({"kwargs": "[1]"}, "Write it like {"),
        ({"headers": "[1]"}, "Write it like {"),
        ({"expire_seconds": "5", "expires_0": "2030-01-01", "expires_1": "00:00:00"}, "not both"),
        ({"task": ""}, "This field is required"),
        ({"priority": "300"}, "less than or equal to 255"),
    ],
)
def test_a_periodic_task_that_could_not_be_sent_is_refused(
    browser: Any, models: Any, every: Any, fields: dict[str, str], said: str
) -> None:
    response = browser.post(f"{PERIODIC}add/", form(**{"interval": every.pk, **fields}))

    assert response.status_code == 200
    assert said in errors_of(response)
    assert not models.PeriodicTask.objects.exists()


def test_two_schedules_are_one_too_many(browser: Any, models: Any, every: Any) -> None:
    nightly = models.CrontabSchedule.objects.create(hour="4")

    response = browser.post(f"{PERIODIC}add/", form(interval=every.pk, crontab=nightly.pk))

    assert "leave the others empty" in errors_of(response)


def test_a_task_that_nobody_knows_here_is_warned_of(browser: Any, every: Any) -> None:
    response = browser.post(f"{PERIODIC}add/", form(interval=every.pk, task="elsewhere.sync"), follow=True)

    assert "No task &#x27;elsewhere.sync&#x27; is registered in this process" in response.content.decode()


@pytest.mark.parametrize(
    ("field", "value"), [("minute", "99"), ("hour", "x"), ("day_of_week", "mon-xyz"), ("month_of_year", "13")]
)
def test_a_field_that_is_none_of_a_crontab_is_refused(browser: Any, models: Any, field: str, value: str) -> None:
    fields = dict.fromkeys(("minute", "hour", "day_of_month", "month_of_year", "day_of_week"), "*")
    response = browser.post(
        "/admin/amqtask/crontabschedule/add/",
        {**fields, field: value, "timezone": "Europe/Berlin", "periodictask_set-TOTAL_FORMS": 0,
         "periodictask_set-INITIAL_FORMS": 0},
    )  # fmt: skip

    assert response.status_code == 200
    assert field in response.context["adminform"].form.errors


def test_a_crontab_is_in_the_projects_time_zone_unless_another_is_chosen(browser: Any, models: Any) -> None:
    page = browser.get("/admin/amqtask/crontabschedule/add/").content.decode()

    assert '<option value="Europe/Berlin" selected>' in page


def test_disabled_and_enabled_by_hand(browser: Any, models: Any, every: Any) -> None:
    task = models.PeriodicTask.objects.create(name="a", task="t", interval=every)
    before = models.PeriodicTasks.last_change()

    browser.post(PERIODIC, {"action": "disable", "_selected_action": [task.pk]})
    task.refresh_from_db()
    assert not task.enabled
    assert models.PeriodicTasks.last_change() > before

    browser.post(PERIODIC, {"action": "enable", "_selected_action": [task.pk]})
    task.refresh_from_db()
    assert task.enabled


def test_run_now_publishes_as_the_row_says(browser: Any, app: Any, models: Any, every: Any) -> None:
    sound = models.PeriodicTask.objects.create(
        name="a", task=f"{SHOP}.order", interval=every, args='["x"]', queue="fast"
    )
    broken = models.PeriodicTask.objects.create(name="b", task=f"{SHOP}.order", interval=every, args="[")

    response = browser.post(PERIODIC, {"action": "run_now", "_selected_action": [sound.pk, broken.pk]}, follow=True)

    [(properties, body)] = app.memory_broker.messages("fast")
    assert properties.headers["task"] == f"{SHOP}.order"
    assert properties.headers["periodic_task_name"] == "a"
    assert json.loads(body)[0] == ["x"]
    page = response.content.decode()
    assert "1 periodic task was published" in page
    assert "“b” was not published" in page


def test_run_now_publishes_no_unique_task_whose_key_another_call_has(
    browser: Any, app: Any, models: Any, every: Any
) -> None:
    app.task(name=f"{SHOP}.once", unique=True)(lambda: None)
    row = models.PeriodicTask.objects.create(name="a", task=f"{SHOP}.once", interval=every, queue="fast")

    for _ in range(2):
        response = browser.post(PERIODIC, {"action": "run_now", "_selected_action": [row.pk]}, follow=True)

    [(properties, _body)] = app.memory_broker.messages("fast")
    page = response.content.decode()
    assert ("“a” was not published" in page, properties.headers["id"] in page) == (True, True)


def test_who_may_only_look_has_no_actions(models: Any, app: Any, every: Any) -> None:
    from django.contrib.auth.models import Permission, User
    from django.test import Client

    task = models.PeriodicTask.objects.create(name="a", task="t", interval=every)
    user = User.objects.create_user("looker", is_staff=True)
    user.user_permissions.add(Permission.objects.get(codename="view_periodictask"))
    client = Client()
    client.force_login(user)

    client.post(PERIODIC, {"action": "run_now", "_selected_action": [task.pk]})

    assert app.memory_broker.queue_names() == []


def test_a_row_that_cannot_be_used_is_shown_as_broken_beside_the_others(browser: Any, models: Any, every: Any) -> None:
    from django.db import connection

    models.PeriodicTask.objects.create(name="good", task=f"{SHOP}.session", interval=every)
    nightly = models.CrontabSchedule.objects.create(minute="0", hour="4", timezone="UTC")
    models.PeriodicTask.objects.create(name="on mars", task=f"{SHOP}.session", crontab=nightly)
    fortnight = models.IntervalSchedule.objects.create(every=1, period="fortnights")
    models.PeriodicTask.objects.create(name="fortnightly", task=f"{SHOP}.session", interval=fortnight)
    with connection.cursor() as cursor:
        cursor.execute(f"UPDATE {nightly._meta.db_table} SET timezone = 'Mars/Olympus'")

    page = browser.get(PERIODIC)

    assert page.status_code == 200
    text = page.content.decode()
    assert "⚠" in text
    assert "Mars/Olympus" in text
    assert "there is no period" in text
    assert browser.get("/admin/amqtask/crontabschedule/").status_code == 200
    assert browser.get(f"/admin/amqtask/crontabschedule/{nightly.pk}/change/").status_code == 200


def test_a_slip_in_a_task_s_name_is_refused_unless_it_is_meant(browser: Any, models: Any, every: Any) -> None:
    form = {
        "name": "slip",
        "task": f"{SHOP}.sesion",
        "interval": every.pk,
        "args": "[]",
        "kwargs": "{}",
        "headers": "{}",
    }

    refused = browser.post(f"{PERIODIC}add/", form)
    assert f"{SHOP}.session" in refused.content.decode()
    assert not models.PeriodicTask.objects.exists()

    browser.post(f"{PERIODIC}add/", {**form, "is_elsewhere": "on"})
    assert models.PeriodicTask.objects.get().task == f"{SHOP}.sesion"

"""A call in one of Django's transactions is a row of it; the relay publishes what was committed."""

from __future__ import annotations

import asyncio
import unittest
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from amqtask import AmqTask, chain, group
from amqtask.assembly import build_relay
from amqtask.exceptions import ConfigurationError

TASK = "integration.apps.django_site.shop.tasks.count"


class AsTold(Exception):
    """What goes wrong in a transaction."""


class Site:
    """A Django project with an outbox."""

    def __init__(self, app: AmqTask) -> None:
        self.app = app
        self.task: Any = app.tasks[TASK]

    @property
    def rows(self) -> Any:
        from amqtask.contrib.django.models import OutboxMessage

        return OutboxMessage.objects

    @property
    def sent(self) -> list[str]:
        assert self.app.memory_broker is not None
        if "amqtask" not in self.app.memory_broker.queue_names():
            return []
        return [properties.headers["id"] for properties, _ in self.app.memory_broker.messages("amqtask")]

    def relay(self) -> Any:
        return build_relay(self.app).drain()


@pytest.fixture
def site(project: AmqTask) -> Site:
    project.conf.outbox = True
    project.finalize()
    return Site(project)


def test_a_committed_call_is_sent_by_the_relay_and_not_before(site: Site) -> None:
    from django.db import transaction

    with transaction.atomic():
        first = site.task.delay()
        second = site.task.delay()
    assert site.sent == []
    assert [(row.task_id, row.task) for row in site.rows.all()] == [(first.id, TASK), (second.id, TASK)]

    assert site.relay().sent == 2
    assert site.sent == [first.id, second.id]
    assert site.rows.count() == 0


def test_a_call_that_is_rolled_back_is_never_sent(site: Site) -> None:
    from django.db import transaction

    with suppress(AsTold), transaction.atomic():
        site.task.delay()
        raise AsTold
    with transaction.atomic():
        kept = site.task.delay()
        with suppress(AsTold), transaction.atomic():
            site.task.delay()
            raise AsTold

    site.relay()
    assert site.sent == [kept.id]


def test_outside_of_a_transaction_a_call_is_published_at_once(site: Site) -> None:
    from django.db import transaction

    first = site.task.delay()
    later: list[Any] = []
    with transaction.atomic():
        transaction.on_commit(lambda: later.append(site.task.delay()))

    assert site.sent == [first.id, later[0].id]
    assert site.rows.count() == 0


def test_delay_on_commit_is_a_row_too(site: Site) -> None:
    from django.db import transaction

    with transaction.atomic():
        site.task.delay_on_commit()
        assert site.rows.count() == 1
    assert site.sent == []
    site.task.delay_on_commit()
    assert len(site.sent) == 1


def test_without_autocommit_every_call_waits_for_the_commit(site: Site) -> None:
    from django.db import transaction

    transaction.set_autocommit(False)
    try:
        site.task.delay()
        transaction.rollback()
        kept = site.task.delay()
        transaction.commit()
    finally:
        transaction.set_autocommit(True)

    site.relay()
    assert site.sent == [kept.id]


def test_workflows_and_bursts_are_written(site: Site) -> None:
    from django.db import transaction

    with transaction.atomic():
        chain(site.task.si(), site.task.si())()
        group(site.task.si() for _ in range(3))()
        site.app.publish_many([site.task.s() for _ in range(4)])
    assert (site.rows.count(), site.sent) == (8, [])

    site.relay()
    assert len(site.sent) == 8


def test_a_coroutine_publishes_at_once_and_its_sync_parts_write(site: Site) -> None:
    from asgiref.sync import sync_to_async
    from django.db import connections, transaction

    def write() -> str:
        with transaction.atomic():
            return str(site.task.delay().id)

    async def run() -> tuple[str, str]:
        at_once = await site.task.adelay()
        await site.task.adelay_on_commit()
        kept = await sync_to_async(write)()
        await sync_to_async(connections.close_all)()
        return at_once.id, kept

    at_once, kept = asyncio.run(run())
    assert site.sent[0] == at_once
    assert [row.task_id for row in site.rows.all()] == [kept]


def test_a_transaction_that_is_broken_takes_no_call(site: Site) -> None:
    from django.contrib.auth.models import Group
    from django.db import Error, transaction

    with suppress(AsTold), transaction.atomic():
        Group.objects.create(name="one")
        with suppress(Error):
            Group.objects.create(name="one")
        with pytest.raises(transaction.TransactionManagementError):
            site.task.delay()
        raise AsTold
    assert site.sent == []


def test_what_could_not_be_published_is_shown_and_sent_again(site: Site) -> None:
    from django.db import transaction

    with transaction.atomic():
        lost = site.task.apply_async(exchange="", routing_key="nowhere")
        good = site.task.delay()
    relay = build_relay(site.app)

    assert relay.drain().failed == 1
    assert site.sent == [good.id]
    (failing,) = relay.store.failing(10)
    assert (failing.task_id, failing.attempts) == (lost.id, 1)
    assert failing.error.startswith("Unroutable")
    waiting = relay.store.waiting()
    assert (waiting.rows, waiting.failing, waiting.oldest) == (1, 1, failing.created_at)

    site.app.publisher.declare([site.app.queues["nowhere"]])
    assert relay.drain().rows == 0
    assert relay.store.retry_now() == 1
    assert relay.drain().sent == 1


def test_the_admin_shows_the_row_and_sends_it_again(site: Site) -> None:
    from django.contrib.auth.models import User
    from django.db import transaction
    from django.test import Client

    with transaction.atomic():
        lost = site.task.apply_async(exchange="", routing_key="nowhere", countdown=3600)
    site.rows.update(error="Unroutable: no queue", attempts=3, retry_at="2999-01-01T00:00:00Z")
    client = Client()
    client.force_login(User.objects.create_superuser("boss"))

    for query in ("", "?failed=yes", f"?q={lost.id}"):
        shown = client.get(f"/admin/amqtask/outboxmessage/{query}").content.decode()
        assert "Unroutable: no queue" in shown
    assert "Unroutable: no queue" not in client.get("/admin/amqtask/outboxmessage/?failed=no").content.decode()
    row = site.rows.get()
    page = client.get(f"/admin/amqtask/outboxmessage/{row.pk}/change/").content.decode()
    assert "nowhere" in page
    assert lost.id in page
    assert 'name="_save"' not in page
    assert "[[], {}, " in page

    asked = {"action": "send_again", "_selected_action": [row.pk]}
    answer = client.post("/admin/amqtask/outboxmessage/", asked, follow=True).content.decode()
    assert "1 call is due now." in answer
    assert site.rows.get().retry_at is None


def test_the_wrong_database_and_a_missing_application_are_said(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from django.apps import apps

    site.app.conf.outbox_database = "archive"
    with pytest.raises(ConfigurationError, match=r"'archive' is none of Django's DATABASES"):
        site.task.delay()
    monkeypatch.setattr(apps, "is_installed", lambda name: False)
    with pytest.raises(ConfigurationError, match="add that to INSTALLED_APPS"):
        site.task.delay()


def test_times_are_right_without_time_zones_too(site: Site, settings_without_zones: None) -> None:
    from django.db import transaction

    with transaction.atomic():
        site.task.apply_async(exchange="", routing_key="nowhere")
    relay = build_relay(site.app)

    assert relay.drain().failed == 1
    assert relay.drain().rows == 0
    assert relay.store.failing(1)[0].created_at.tzinfo is not None


@pytest.fixture
def settings_without_zones(site: Site) -> Iterator[None]:
    from django.test import override_settings

    with override_settings(USE_TZ=False):
        yield


def test_the_table_is_the_one_of_sqlalchemy(site: Site) -> None:
    from sqlalchemy import MetaData

    from amqtask.contrib.django.models import OutboxMessage
    from amqtask.contrib.sqlalchemy import outbox_table

    table = outbox_table(MetaData())

    fields = {field.column: field.null for field in OutboxMessage._meta.fields}
    assert fields == {column.name: column.nullable for column in table.columns}
    assert OutboxMessage._meta.db_table == table.name


def test_manage_py_relays(site: Site, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    from django.core.management import call_command
    from django.db import transaction

    from amqtask.ground import current

    monkeypatch.setattr(current, "_default", [site.app])
    with transaction.atomic():
        result = site.task.delay()

    call_command("amqtask", "relay", "--once")

    assert capfd.readouterr().out == "1 message published, 0 failed\n"
    assert site.sent == [result.id]


def test_a_test_cases_transaction_is_the_outboxs_and_a_relay_works_in_it(site: Site) -> None:
    from django.test import TestCase

    class Case(TestCase):
        def runTest(self) -> None:
            site.task.delay()
            assert site.rows.count() == 1
            assert site.relay().sent == 1
            site.task.delay()

    outcome = unittest.TestResult()
    Case.setUpClass()
    Case()(outcome)
    Case.tearDownClass()

    assert outcome.wasSuccessful(), outcome.failures + outcome.errors
    assert len(site.sent) == 1
    assert site.rows.count() == 0

"""A task with inbox=True runs in one of Django's transactions, and a second run of its call does nothing again."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from amqtask import AmqTask, states
from amqtask.exceptions import ConfigurationError
from amqtask.testing.worker import start_worker


def orders(project: AmqTask) -> Any:
    """A task that stores an order and fails when it is told to."""
    from django.contrib.auth.models import Group

    @project.task(name="order", inbox=True, bind=True)
    def order(self: Any, name: str) -> list[str]:
        Group.objects.create(name=f"{name} {self.request.retries}")
        if name == "retried" and not self.request.retries:
            raise self.retry(countdown=0)
        return [name]

    return order


def stored() -> list[str]:
    from django.contrib.auth.models import Group

    return list(Group.objects.order_by("id").values_list("name", flat=True))


def test_a_second_run_of_a_call_does_nothing_and_has_the_firsts_result(project: AmqTask) -> None:
    order = orders(project)
    calls = [order.apply_async((name,), task_id=name) for name in ("apple", "apple", "retried", "retried")]

    with start_worker(project):
        assert [call.get(timeout=60) for call in calls] == [["apple"], ["apple"], ["retried"], ["retried"]]
    assert stored() == ["apple 0", "retried 1"]


def test_an_order_of_a_run_that_failed_is_not_there(project: AmqTask) -> None:
    order = orders(project)
    too_long = order.apply(("x" * 200, object()))
    assert too_long.state == states.FAILURE
    assert stored() == []


def test_calls_that_it_makes_are_rows_of_the_outbox(project: AmqTask) -> None:
    from amqtask.contrib.django.models import InboxCall, OutboxMessage

    project.conf.outbox = True
    order = orders(project)

    @project.task(name="buy", inbox=True)
    def buy() -> None:
        order.delay("pear")

    buy.apply(task_id="one")
    buy.apply(task_id="one")

    assert [row.task for row in OutboxMessage.objects.all()] == ["order"]
    assert [str(row) for row in InboxCall.objects.all()] == ["buy[one]"]


def test_coroutines_are_refused_when_the_worker_starts(project: AmqTask) -> None:
    @project.task(name="buy", inbox=True)
    async def buy() -> None: ...

    with pytest.raises(ConfigurationError, match=r"task buy .* no transactions in coroutines"):
        start_worker(project).__enter__()


def test_another_database_must_be_one(project: AmqTask) -> None:
    project.conf.inbox_database = "elsewhere"
    order = orders(project)
    with pytest.raises(ConfigurationError, match="inbox_database = 'elsewhere'"):
        order.apply(("apple",))


def test_the_nightly_task_deletes_what_ran_long_ago(project: AmqTask) -> None:
    from django.utils import timezone

    from amqtask.contrib.django.models import InboxCall

    order = orders(project)
    order.apply(("apple",), task_id="old")
    InboxCall.objects.update(created_at=timezone.now() - timedelta(days=8))
    order.apply(("pear",), task_id="new")

    project.tasks["celery.backend_cleanup"]()
    assert [row.task_id for row in InboxCall.objects.all()] == ["new"]

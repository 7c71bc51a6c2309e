"""A Django project on PostgreSQL: workers of several pools use its database, results are rows of it."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from amqtask.backends.contract import BackendOptions, ResultBackend
from amqtask.backends.registry import open_backend
from amqtask.ground import current
from amqtask.testing.suites.backend import BackendSuite
from integration.conftest import Broker
from integration.servers import Postgres
from integration.workers import WorkerProcess, eventually

SHOP = "integration.apps.django_site.shop.tasks"
SETTINGS = "integration.apps.django_site.settings"


class Site:
    """The project, seen from a process of its own: its application, its tables, its workers."""

    def __init__(self, database: str, redis_url: str, queue: str) -> None:
        self.environment = {
            "DJANGO_SETTINGS_MODULE": SETTINGS,
            "SITE_DATABASE": database,
            "SITE_REDIS": redis_url,
            "SITE_QUEUE": queue,
        }

    @property
    def app(self) -> Any:
        from integration.apps.django_site.celery import app

        return app

    @property
    def results(self) -> Any:
        from amqtask.contrib.django.models import TaskResult

        return TaskResult.objects

    @property
    def orders(self) -> Any:
        from django.contrib.auth.models import Group

        return Group.objects

    @contextmanager
    def worker(self, pool: str, *options: str, concurrency: int = 2, **environment: str) -> Iterator[WorkerProcess]:
        """A worker that is shut down warmly: all tests have one queue, and what one leaves there the next one gets."""
        with WorkerProcess(
            "integration.apps.django_site.celery", "-P", pool, "-c", str(concurrency), *options,
            environment={**self.environment, **environment},
        ) as worker:  # fmt: skip
            yield worker
            worker.stop()

    def call(self, task: str, *args: Any) -> Any:
        return self.app.send_task(f"{SHOP}.{task}", args)


@pytest.fixture(scope="module")
def site(postgres_server: Postgres, redis_url: str, broker_url: str) -> Iterator[Site]:
    """One database for this module: Django is set up once in a process."""
    made = Site(postgres_server.create_database(), redis_url, f"site-{uuid.uuid4().hex[:12]}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(current, "_default", [])
        patch.setenv("TZ", "UTC")  # which Django sets; put back with the others
        for name, value in made.environment.items():
            patch.setenv(name, value)
        import django
        from django.core.management import call_command
        from django.db import connections

        django.setup()
        made.app.conf.broker_publish_timeout = 60.0
        call_command("migrate", verbosity=0)
        connections.close_all()
        yield made
        made.app.close()
        connections.close_all()
    time.tzset()
    rabbit = Broker(broker_url)
    queue = made.environment["SITE_QUEUE"]
    for name in (queue, f"{queue}.dead", f"amqtask.beat.site.{queue}.django"):
        rabbit.channel().queue_delete(name)
    rabbit.close()


@pytest.fixture(autouse=True)
def closed(site: Site) -> Iterator[None]:
    """Each test begins and ends without a connection, as a request does."""
    from django.db import connections

    connections.close_all()
    yield
    connections.close_all()


class TestResults(BackendSuite):
    def make(self) -> ResultBackend:
        return self.opened()

    def opened(self, **options: Any) -> ResultBackend:
        made = open_backend("django-db", BackendOptions(url="django-db", **options))
        assert made is not None
        return made

    def make_expiring(self, seconds: float) -> ResultBackend | None:
        return self.opened(expires=seconds)

    def test_hundreds_of_results_are_read_one_after_the_other(self, backend: ResultBackend) -> None:
        from django.db import connection

        connection.ensure_connection()  # as within a request: not one connection per result
        super().test_hundreds_of_results_are_read_one_after_the_other(backend)


class TestResultsInACache(BackendSuite):
    """Django's cache, on Redis."""

    def make(self) -> ResultBackend:
        return self.opened()

    def opened(self, **options: Any) -> ResultBackend:
        settings = {"cache_backend": "redis"}
        made = open_backend("django-cache", BackendOptions(url="django-cache", settings=settings, **options))
        assert made is not None
        return made

    def make_expiring(self, seconds: float) -> ResultBackend | None:
        return self.opened(expires=seconds)


def unique() -> str:
    return uuid.uuid4().hex


@pytest.fixture(scope="class", params=["prefork", "threads", "gevent", "eventlet", "asyncio"])
def each_pool(site: Site, request: pytest.FixtureRequest) -> Iterator[None]:
    """A worker for all tests of a class, with one pool after the other."""
    with site.worker(request.param):
        yield


@pytest.mark.usefixtures("each_pool")
class TestEachPool:
    def test_tasks_of_every_pool_use_the_database_and_leave_their_results_there(self, site: Site) -> None:
        names = [unique() for _ in range(10)]
        calls = [site.call("order", name) for name in names]
        numbers = [call.get(timeout=90) for call in calls]
        failed = site.call("fail_in_transaction", unique())
        with pytest.raises(ValueError, match="no such customer"):
            failed.get(timeout=90)

        assert [site.orders.get(name=name).pk for name in names] == numbers
        row = site.results.get(task_id=calls[0].id)
        assert (row.task_name, row.status, row.task_args) == (f"{SHOP}.order", "SUCCESS", f'["{names[0]}"]')
        assert row.date_started <= row.date_done
        assert "no such customer" in site.results.get(task_id=failed.id).traceback

    def test_djangos_own_tasks_run_in_every_pool_and_their_results_are_rows(self, site: Site) -> None:
        jobs = pytest.importorskip("integration.apps.django_site.shop.jobs")
        with current.replaced(site.app):
            added, failed, again = jobs.add.enqueue(2, 3), jobs.fail.enqueue(), jobs.third_time.enqueue()
            eventually(
                lambda: all(jobs.add.get_backend().get_result(one.id).is_finished for one in (added, failed, again))
            )

        for result in (added, failed, again):
            result.refresh()
        assert (added.return_value, added.attempts, again.return_value, again.attempts) == (5, 1, 3, 3)
        assert failed.errors[0].exception_class is ValueError
        assert added.worker_ids[0].count("@") == 1

    def test_coroutines_use_the_database(self, site: Site) -> None:
        names = [unique() for _ in range(10)]
        numbers = [call.get(timeout=90) for call in [site.call("order_async", name) for name in names]]

        assert [site.orders.get(name=name).pk for name in names] == numbers


def test_each_process_has_connections_of_its_own_and_keeps_them_as_long_as_the_settings_say(site: Site) -> None:
    # All are there when the worker comes, or one process might be free again for each that follows.
    calls = [site.call("session") for _ in range(40)]
    with site.worker("prefork", SITE_AGE="600"):
        found = [call.get(timeout=90) for call in calls]

    by_process: dict[int, set[int]] = {}
    for process, session in found:
        by_process.setdefault(process, set()).add(session)
    sessions = [session for each in by_process.values() for session in each]
    assert len(by_process) == 2
    assert len(sessions) == len(set(sessions)) == 2


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_connections_may_come_from_a_pool(site: Site, pool: str) -> None:
    with site.worker(pool, concurrency=4, SITE_POOL="yes"):
        found = [call.get(timeout=90) for call in [site.call("session") for _ in range(40)]]
        numbers = [call.get(timeout=90) for call in [site.call("order_async", unique()) for _ in range(10)]]

    processes: dict[int, set[int]] = {}
    for process, session in found:
        processes.setdefault(process, set()).add(session)
    assert all(len(sessions) <= 2 for sessions in processes.values())
    assert len(set(numbers)) == 10


def test_a_worker_may_be_beat_too(site: Site) -> None:
    from amqtask.contrib.django.models import IntervalSchedule, PeriodicTask

    every, _ = IntervalSchedule.objects.get_or_create(every=1, period=IntervalSchedule.SECONDS)
    with site.worker("prefork", "-B", "--scheduler", "django"):
        made = PeriodicTask.objects.create(
            name="orders",
            task=f"{SHOP}.order",
            kwargs=json.dumps({"name": "by the worker"}),
            interval=every,
            one_off=True,
        )
        eventually(lambda: site.orders.filter(name="by the worker").exists())
        eventually(lambda: not PeriodicTask.objects.get(pk=made.pk).enabled)

    row = site.results.get(periodic_task_name="orders")
    assert row.status == "SUCCESS"


def test_a_database_that_closes_its_connections_costs_no_task(site: Site, postgres_server: Postgres) -> None:
    with site.worker("threads", SITE_AGE="600") as worker:
        first = site.call("session").get(timeout=90)[1]
        database = site.environment["SITE_DATABASE"].rpartition("/")[2]
        postgres_server.execute(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}' AND pid = {first}"
        )
        # Django sees it at the first query: that task may fail, and those after it find a new connection.
        eventually(lambda: site.call("session").get(timeout=90, propagate=False).__class__ is list)

        assert "Traceback" not in worker.log or "terminat" in worker.log

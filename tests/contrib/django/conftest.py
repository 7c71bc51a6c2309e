"""Django on a SQLite file, migrated once; a test runs in a transaction that is rolled back, or is cleaned up after."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from amqtask import AmqTask

SETTINGS = "integration.apps.django_site.settings"


@pytest.fixture(scope="session")
def django(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Django, set up with the test project's settings; other tests do not find it in their environment."""
    import django
    from django.core.management import call_command
    from django.db.backends.signals import connection_created
    from django.test.utils import setup_test_environment

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DJANGO_SETTINGS_MODULE", SETTINGS)
        patch.setenv("TZ", "UTC")  # which Django sets; put back with the others
        patch.setenv("SITE_SQLITE", str(tmp_path_factory.mktemp("django") / "site.sqlite"))
        patch.setenv("SITE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("SITE_DATABASE", raising=False)
        django.setup()
    time.tzset()
    connection_created.connect(_hurry, weak=False)
    setup_test_environment()
    call_command("migrate", verbosity=0)


def _hurry(connection: Any, **_: Any) -> None:
    """Nobody pulls the plug during a test."""
    connection.cursor().execute("PRAGMA synchronous = OFF")


@pytest.fixture
def database(django: None) -> Iterator[None]:
    """Its database; what a test writes is gone after it."""
    from django.db import transaction

    with transaction.atomic():
        yield
        transaction.set_rollback(True)


@pytest.fixture
def committed(django: None) -> Iterator[None]:
    """The same for tests in which several threads look at the database."""
    from django.core.management import call_command
    from django.db import connections

    yield
    call_command("flush", verbosity=0, interactive=False)
    connections.close_all()


@pytest.fixture
def project(committed: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The application of a Django project, on the in-memory broker."""
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", SETTINGS)
    app = AmqTask("site", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.autodiscover_tasks()
    with closing(app):
        app.import_modules()
        yield app

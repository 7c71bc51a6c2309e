"""Django on a SQLite in memory, migrated once; each test runs in a transaction of its own that is rolled back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def django() -> None:
    """Django, set up with the test project's settings; other tests do not find it in their environment."""
    import django
    from django.core.management import call_command

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DJANGO_SETTINGS_MODULE", "integration.apps.django_site.settings")
        patch.delenv("SITE_DATABASE", raising=False)
        django.setup()
    call_command("migrate", verbosity=0)


@pytest.fixture
def database(django: None) -> Iterator[None]:
    """Its database; what a test writes is gone after it."""
    from django.db import transaction

    with transaction.atomic():
        yield
        transaction.set_rollback(True)

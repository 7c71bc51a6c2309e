"""Tasks that use Django: its database (groups of users stand for orders), languages and time zones."""

from __future__ import annotations

import os
from typing import Any

from asgiref.sync import sync_to_async
from django.contrib.auth.models import Group
from django.db import connection, transaction
from django.utils import timezone, translation

from amqtask import shared_task


@shared_task
def order(name: str) -> int:
    """Store an order; its number."""
    return int(Group.objects.create(name=name).pk)


@shared_task
async def order_async(name: str) -> int:
    """The same, as a coroutine."""
    made = await Group.objects.acreate(name=name)
    return int(made.pk)


@shared_task
def count() -> int:
    """How many orders there are."""
    found: int = Group.objects.count()
    return found


@shared_task
def session() -> tuple[int, int]:
    """This process, and the one that serves its database connection."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return os.getpid(), int(cursor.fetchone()[0])


@shared_task
def fail_in_transaction(name: str) -> None:
    """Store an order in a transaction that fails."""
    with transaction.atomic():
        Group.objects.create(name=name)
        raise ValueError("no such customer")


@shared_task
def leave_a_transaction(name: str) -> None:
    """Store an order in a transaction that nobody ends, as where a time limit strikes while it begins."""
    transaction.atomic().__enter__()
    Group.objects.create(name=name)


@shared_task
def speak(language: str | None = None, zone: str | None = None) -> tuple[str, str]:
    """The language and time zone at the start; then activate others."""
    found = (translation.get_language(), timezone.get_current_timezone_name())
    if language:
        translation.activate(language)
    if zone:
        timezone.activate(zone)
    return found


@shared_task
def connections_at_start() -> Any:
    """Whether an earlier task's connection is still open; leaves one open."""
    was_open = connection.connection is not None
    Group.objects.count()
    return was_open


@shared_task
async def connection_of_coroutine() -> bool:
    """Whether a coroutine finds a connection that an earlier one has left."""

    def look() -> bool:
        was_open = connection.connection is not None
        Group.objects.count()
        KEPT.append(connection)
        return was_open

    return await sync_to_async(look)()


# What coroutines have used in this process, for tests in the same one.
KEPT: list[Any] = []


@shared_task(bind=True)
def call_inline(self: Any) -> bool:
    """Whether the connection survives a task that runs inline."""
    Group.objects.count()
    before = connection.connection
    self.app.tasks[f"{__name__}.count"].apply().get()
    return before is not None and connection.connection is before

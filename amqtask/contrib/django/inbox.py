"""The inbox for Django's ORM: a task with `inbox=True` runs in `transaction.atomic()` of one database (`inbox_database`), which
has the row of its call, too. Calls that it makes are rows of the same transaction where the outbox follows that database."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

from django import db
from django.apps import apps
from django.db import transaction

from amqtask.contrib.django.outbox import check_database, stored
from amqtask.exceptions import ConfigurationError
from amqtask.execution.inbox import Kept


class _HasRun(Exception):
    """The call's row has been committed."""


class DjangoInbox:
    """See amqtask.execution.inbox.Inbox. Raises: ConfigurationError (the application is not installed, no such database)."""

    def __init__(self, database: str = db.DEFAULT_DB_ALIAS) -> None:
        check_database("inbox", database)
        if not db.connections.settings[database].get("AUTOCOMMIT", True):
            raise ConfigurationError(
                f"tasks with inbox=True are committed by transaction.atomic(), and the database {database!r} has AUTOCOMMIT off: "
                "name another one (inbox_database)"
            )
        self._database = database

    def check(self, task: str, *, is_async: bool) -> None:
        """Django has no transactions in coroutines."""
        if is_async:
            raise ConfigurationError(
                f"task {task} has inbox=True and is `async def`, and Django has no transactions in coroutines: make it `def`"
            )

    def once(self, task_id: str, task: str, work: Callable[[], Kept]) -> Kept | None:
        """See the contract."""
        rows = self._rows
        try:
            with transaction.atomic(using=self._database):
                try:
                    rows.model(task_id=task_id, task=task).save(using=self._database, force_insert=True)
                except db.IntegrityError as error:
                    raise _HasRun from error
                kept = work()
                if kept.content_type is not None:
                    rows.filter(task_id=task_id).update(**kept._asdict())
        except _HasRun:
            row = rows.get(task_id=task_id)
            return Kept(row.content_type, row.content_encoding, bytes(row.body))
        return None

    async def aonce(self, task_id: str, task: str, work: Callable[[], Awaitable[Kept]]) -> Kept | None:
        """Never called: `check` refuses such tasks."""
        raise AssertionError(f"{task} is async")

    def cleanup(self, before: datetime) -> int:
        """See the contract."""
        count: int = self._rows.filter(created_at__lt=stored(before)).delete()[0]
        return count

    @property
    def _rows(self) -> Any:
        return apps.get_model("amqtask", "InboxCall")._default_manager.using(self._database)

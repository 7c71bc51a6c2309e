"""The transactional outbox for Django's ORM: `task.delay()` in `transaction.atomic()` becomes a row of that transaction.

`outbox = True` (CELERY_OUTBOX, AMQTASK_OUTBOX in Django's settings) makes `app.outbox` a DjangoOutbox. It follows the
transactions of one database, which is also where its rows are: `outbox_database`, Django's alias.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from django import db
from django.apps import apps
from django.db import transaction
from django.db.models import Count, Min

from amqtask.client.registry import prepare_django
from amqtask.contrib.django.zones import aware, stored
from amqtask.exceptions import ConfigurationError
from amqtask.execution.inbox import Kept
from amqtask.outbox.contract import Failing, NewRow, OutboxUnreachable, Send, StoredRow, Verdict, Waiting

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

APPLICATION = "amqtask.contrib.django"
# A relay's host may vanish without a word: PostgreSQL gives the rows back after so long.
GIVE_UP_ROWS = "SET LOCAL idle_in_transaction_session_timeout = '60s'"


class DjangoOutbox:
    """See amqtask.outbox.contract.Outbox. Raises: ConfigurationError (the application is not installed, no such database)."""

    def __init__(self, database: str = db.DEFAULT_DB_ALIAS) -> None:
        check_database("outbox", database)
        self._database = database

    def transaction(self) -> _Rows | None:
        """The transaction of this thread's connection; None in its `on_commit` callbacks, which come after it."""
        connection = db.connections[self._database]
        if connection.in_atomic_block or _never_commits_by_itself(connection):
            return _Rows(self._database)
        return None

    def store(self) -> DjangoStore:
        """The store for a relay, in the thread where that runs."""
        return DjangoStore(self._database)


def check_database(name: str, database: str) -> None:
    """Raises: ConfigurationError where the table of the inbox or outbox cannot be in that database."""
    prepare_django()
    if not apps.is_installed(APPLICATION):
        raise ConfigurationError(
            f"the {name}'s table belongs to {APPLICATION!r}: add that to INSTALLED_APPS, and run manage.py migrate"
        )
    if database not in db.connections.settings:
        raise ConfigurationError(f"{name}_database = {database!r} is none of Django's DATABASES")


def _never_commits_by_itself(connection: BaseDatabaseWrapper) -> bool:
    """Whether AUTOCOMMIT is off, in the settings or since (`transaction.set_autocommit`)."""
    if connection.connection is None:
        return not connection.settings_dict["AUTOCOMMIT"]
    return not connection.autocommit


class _Rows:
    """See amqtask.outbox.contract.Transaction."""

    def __init__(self, database: str) -> None:
        self._database = database

    def write(self, rows: Sequence[NewRow]) -> None:
        """Raises: django.db.Error, TransactionManagementError."""
        rows_of = _messages(self._database)
        rows_of.bulk_create([rows_of.model(**row._asdict()) for row in rows])

    async def awrite(self, rows: Sequence[NewRow]) -> None:
        """Django has no transactions in coroutines: this says so (SynchronousOnlyOperation)."""
        self.write(rows)


class DjangoStore:
    """See amqtask.outbox.contract.Store. Its connection is that of the thread it is used in."""

    def __init__(self, database: str) -> None:
        self._database = database

    @property
    def name(self) -> str:
        """Table and database, for logs and reports."""
        connection = db.connections[self._database]
        table = _messages(self._database).model._meta.db_table
        return f"{table} of {connection.settings_dict['NAME']} ({connection.display_name})"

    def relay(self, limit: int, now: datetime, send: Send) -> int:
        """See the contract. Without row locks (SQLite) the rows are read first, so that nobody has to wait for the broker."""
        with self._reaching() as connection:
            if connection.features.has_select_for_update_skip_locked:
                return self._relay_locked(connection, limit, now, send)
            rows = self._due(_messages(self._database), limit, now)
            if rows:
                verdict = send(rows)
                with transaction.atomic(using=self._database):
                    self._settle(verdict)
            return len(rows)

    def _relay_locked(self, connection: BaseDatabaseWrapper, limit: int, now: datetime, send: Send) -> int:
        with transaction.atomic(using=self._database):
            if connection.vendor == "postgresql":
                with connection.cursor() as cursor:
                    cursor.execute(GIVE_UP_ROWS)
            rows = self._due(_messages(self._database).select_for_update(skip_locked=True), limit, now)
            if rows:
                self._settle(send(rows))
            return len(rows)

    def _due(self, rows_of: Any, limit: int, now: datetime) -> list[StoredRow]:
        due = db.models.Q(retry_at=None) | db.models.Q(retry_at__lte=stored(now))
        rows = rows_of.filter(due).order_by("id").values_list("id", "message", "body", "attempts")[:limit]
        return [StoredRow(number, message, bytes(body), attempts) for number, message, body, attempts in rows]

    def _settle(self, verdict: Verdict) -> None:
        rows_of = _messages(self._database)
        if verdict.sent:
            rows_of.filter(id__in=verdict.sent).delete()
        for row in verdict.failed:
            rows_of.filter(id=row.id).update(error=row.error, attempts=row.attempts, retry_at=stored(row.retry_at))

    def waiting(self) -> Waiting:
        """Raises: OutboxUnreachable."""
        with self._reaching():
            totals = _messages(self._database).aggregate(
                rows=Count("id"), oldest=Min("created_at"), failing=Count("error")
            )
        return Waiting(totals["rows"], _aware(totals["oldest"]), totals["failing"])

    def failing(self, limit: int) -> list[Failing]:
        """Raises: OutboxUnreachable."""
        with self._reaching():
            values = _messages(self._database).exclude(error=None).order_by("id").values_list(*Failing._fields)[:limit]
            rows = [Failing(*row) for row in values]
        return [row._replace(created_at=_aware(row.created_at) or row.created_at) for row in rows]

    def retry_now(self) -> int:
        """Raises: OutboxUnreachable."""
        with self._reaching():
            return int(_messages(self._database).exclude(retry_at=None).update(retry_at=None))

    def close(self) -> None:
        """Close this thread's connection, unless it is in a transaction of somebody else's."""
        connection = db.connections[self._database]
        if not connection.in_atomic_block:
            connection.close()

    @contextmanager
    def _reaching(self) -> Iterator[Any]:
        connection = db.connections[self._database]
        was_outside = not connection.in_atomic_block
        try:
            yield connection
        except db.Error as error:
            if was_outside:
                connection.close()
            raise OutboxUnreachable(f"{type(error).__name__}: {error}".strip()) from error


def _messages(database: str) -> Any:
    """The manager of the outbox's rows; the model exists once Django's applications are loaded."""
    return apps.get_model("amqtask", "OutboxMessage")._default_manager.using(database)


def _aware(moment: datetime | None) -> datetime | None:
    return None if moment is None else aware(moment).astimezone(timezone.utc)


# -- The inbox for Django's ORM: a task with `inbox=True` runs in `transaction.atomic()` of one database (`inbox_database`), which
# has the row of its call, too. Calls that it makes are rows of the same transaction where the outbox follows that database.


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

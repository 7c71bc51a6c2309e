"""`django-db`: results in Django's database, as django-celery-results keeps them (django_celery_results/backends/database.py).

`result` and `meta` are written with `result_serializer`, in base64 where that gives bytes; each row says how it was written.
An UPDATE leaves out rows with SUCCESS; who finds no row to update inserts one, and who loses that race updates again.

The connection is Django's own of the thread that asks, and counts as a query like any other: it is part of a transaction that
is open. Where none was open and CONN_MAX_AGE is 0, it is closed again, since outside of requests and tasks nobody else would.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, TypeVar

from django import db
from django.core.exceptions import ImproperlyConfigured
from django.db import router, transaction

from amqtask import states
from amqtask.backends.contract import BackendOptions, Codec, RetryPolicy, unreadable
from amqtask.backends.polling import PatientBackend
from amqtask.beat.sender import NAME_HEADER
from amqtask.client.registry import prepare_django
from amqtask.contrib.django.zones import aware, stored
from amqtask.exceptions import BackendUnreachable, ConfigurationError, EncodeError, MessageError
from amqtask.ground.printable import clause
from amqtask.protocol.result import ResultMessage
from amqtask.protocol.serialization import content_type, content_types, is_text, loads

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

    from amqtask.ground.shapes import JsonObject

T = TypeVar("T")
GONE = (db.OperationalError, db.InterfaceError)
# Columns of their own; what else is known of a call goes into `meta`.
_COLUMNS = {"name": "task_name", "args": "task_args", "kwargs": "task_kwargs", "worker": "worker"}


class DatabaseBackend(PatientBackend):
    """See amqtask.backends.contract.ResultBackend; for `transport_options` `PatientBackend` and `PollingBackend`.

    Raises: ConfigurationError without Django's settings, or without the application.
    """

    errors = (db.Error,)

    def __init__(self, options: BackendOptions) -> None:
        super().__init__(options)
        models = find_models()
        self._results, self._groups = models.TaskResult, models.GroupResult
        self._alias = router.db_for_write(self._results)
        self._options = options
        self._codec = Codec(options)
        self._type = content_type(options.serializer)
        self._encoding = "utf-8" if is_text(self._type) else "binary"
        self._accept = content_types(options.accept) | {self._type}

    # -- the worker's end

    def keep(self, result: ResultMessage, policy: RetryPolicy | None) -> None:
        """One UPDATE, and an INSERT if there is no such row."""
        fields = self._fields(result)
        self._run(lambda: self._write(result.task_id, fields), policy)

    def _write(self, task_id: str, fields: Mapping[str, object]) -> None:
        rows = self._results.objects.using(self._alias)
        for _ in range(2):
            if rows.filter(task_id=task_id).exclude(status=states.SUCCESS).update(**fields):
                return
            try:
                with self._unharmed():
                    self._results(task_id=task_id, **fields).save(using=self._alias, force_insert=True)
                return
            except db.IntegrityError:
                pass  # it is there: as SUCCESS, which stays, or since a moment ago

    def _unharmed(self) -> Any:
        """A savepoint where a transaction is open, which an INSERT that fails must not end; else no transaction."""
        return transaction.atomic(using=self._alias) if self._connection.in_atomic_block else nullcontext()

    def _fields(self, result: ResultMessage) -> JsonObject:
        extra = dict(result.extra)
        now = stored(datetime.now(timezone.utc))
        meta: JsonObject = {"children": result.children}
        if result.group_id:
            meta["group_id"] = result.group_id
        if result.parent_id:
            meta["parent_id"] = result.parent_id
        fields: dict[str, Any] = {
            "status": result.status,
            "result": self._encode(result.result, f"the result of task {result.task_id}"),
            "content_type": self._type,
            "content_encoding": self._encoding,
            "traceback": self._codec.text(result.traceback),
            "date_done": stored(datetime.fromisoformat(result.date_done)) if result.date_done else now,
        }
        if result.status == states.STARTED:
            fields["date_started"] = now
        if extra:
            fields["task_name"] = (extra.pop("name", None) or "")[:255]
            fields["worker"] = (extra.pop("worker", None) or "")[:100]
            periodic = extra.pop(NAME_HEADER, None)
            if periodic is not None:
                fields["periodic_task_name"] = str(periodic)[:255]
            for name in ("args", "kwargs"):
                fields[_COLUMNS[name]] = self._encode(extra.pop(name, None), f"{name} of task {result.task_id}")
            meta |= extra
        fields["meta"] = self._encode(meta, f"what is known of task {result.task_id}")
        return fields

    # -- the caller's end

    def read_some(self, task_ids: Sequence[str]) -> Iterable[ResultMessage]:
        """One SELECT."""
        rows = self._results.objects.using(self._alias).filter(task_id__in=task_ids)
        return map(self._result, self._run(lambda: list(rows)))

    def _result(self, row: Any) -> ResultMessage:
        try:
            meta = self._decode(row, row.meta) or {}
            extra: JsonObject = {}
            if row.task_name is not None:
                extra = {"name": row.task_name, "worker": row.worker}
                extra |= {name: self._call_part(row, getattr(row, _COLUMNS[name])) for name in ("args", "kwargs")}
            if row.periodic_task_name is not None:
                extra[NAME_HEADER] = row.periodic_task_name
            return ResultMessage(
                row.task_id,
                row.status,
                self._decode(row, row.result),
                self._codec.read_text(row.traceback),
                meta.pop("children", None) or [],
                aware(row.date_done).astimezone(timezone.utc).isoformat()
                if row.status in states.READY_STATES
                else None,
                meta.pop("group_id", None),
                meta.pop("parent_id", None),
                {**extra, **meta},
            )
        except MessageError as error:
            return unreadable(row.task_id, error)

    def _call_part(self, row: object, value: str | None) -> Any:
        """Arguments; django-celery-results wrote text of some versions' own making there, which stays text."""
        try:
            return self._decode(row, value)
        except MessageError:
            return value

    def _ready(self, *arguments: Any) -> Iterator[tuple[str, ResultMessage]]:
        # One connection for the whole wait.
        with self._visit():
            yield from super()._ready(*arguments)

    def read_alone(self, task_ids: Sequence[str]) -> Iterable[ResultMessage]:
        """`read` on the polling thread, which closes its connection: no request would."""
        try:
            return self.read(task_ids)
        finally:
            self._connection.close()

    def forget(self, task_id: str) -> None:
        """DELETE. Raises: BackendUnreachable."""
        self._run(lambda: self._results.objects.using(self._alias).filter(task_id=task_id).delete())

    def cleanup(self) -> None:
        """DELETE what is older than `result_expires`, tasks and groups. Raises: BackendUnreachable."""
        if not self._options.expires:
            return
        oldest = stored(datetime.now(timezone.utc) - timedelta(seconds=self._options.expires))
        for model in (self._results, self._groups):
            rows = model.objects.using(self._alias).filter(date_done__lt=oldest)
            self._run(rows.delete)

    # -- groups

    def save_group(self, group_id: str, members: object) -> None:
        """Keep a group's results (their ids). Raises: EncodeError, BackendUnreachable."""
        fields = {
            "result": self._encode(members, f"group {group_id}"),
            "content_type": self._type,
            "content_encoding": self._encoding,
        }
        rows = self._groups.objects.using(self._alias)
        self._run(lambda: rows.update_or_create(group_id=group_id, defaults=fields))

    def restore_group(self, group_id: str) -> object:
        """What `save_group`, ours or django-celery-results', kept; None when there is nothing. Raises: BackendUnreachable."""
        rows = self._groups.objects.using(self._alias)
        row = self._run(lambda: rows.filter(group_id=group_id).first())
        return None if row is None else self._decode(row, row.result)

    def delete_group(self, group_id: str) -> None:
        """Delete the group. Raises: BackendUnreachable."""
        self._run(lambda: self._groups.objects.using(self._alias).filter(group_id=group_id).delete())

    # -- values and their text

    def _encode(self, value: object, label: str) -> str:
        body = self._codec.value(value, label)
        return base64.b64encode(body).decode() if self._encoding == "binary" else body.decode()

    def _decode(self, row: Any, value: str | None) -> Any:
        if not value:
            return None
        body = base64.b64decode(value) if row.content_encoding == "binary" else value.encode()
        return loads(body, row.content_type, row.content_encoding, self._accept)

    # -- the database

    @property
    def _connection(self) -> BaseDatabaseWrapper:
        return db.connections[self._alias]

    @contextmanager
    def _visit(self) -> Iterator[None]:
        connection = self._connection
        is_guest = connection.connection is None and connection.settings_dict["CONN_MAX_AGE"] == 0
        try:
            yield
        finally:
            if is_guest and connection.connection is not None and not connection.in_atomic_block:
                connection.close()

    def _run(self, work: Callable[[], T], policy: RetryPolicy | None = None) -> T:
        if _on_event_loop():
            # Django refuses to block a loop, as `update_state` in a coroutine does, whatever the store.
            with ThreadPoolExecutor(1, "amqtask results") as thread:
                return thread.submit(self._run_and_close, work, policy).result()
        with self._visit():
            return self.retrying(work, policy)

    def _run_and_close(self, work: Callable[[], T], policy: RetryPolicy | None) -> T:
        try:
            return self._run(work, policy)
        finally:
            self._connection.close()

    def is_transient(self, error: Exception) -> bool:
        """Whether the connection is gone, and no transaction with it."""
        if not isinstance(error, GONE) or self._connection.in_atomic_block:
            return False  # a transaction that lost its connection is lost as a whole
        self._connection.close()
        return True

    def explain(self, error: Exception) -> Exception:
        """Our error for one of Django's."""
        store_name = f"Django's database {self._alias!r}"
        if isinstance(error, db.DataError):
            return EncodeError(f"{store_name} does not take a result: {error}")
        if isinstance(error, db.ProgrammingError) or "no such table" in str(error):
            return BackendUnreachable(f"{store_name} refused: {clause(error)}. Was `manage.py migrate` run?")
        return BackendUnreachable(f"{store_name} does not answer: {error}")


def _on_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def find_models() -> Any:
    """The models of results, in a project that has the application. Raises: ConfigurationError."""
    try:
        prepare_django()
        from amqtask.contrib.django import models
    except ImproperlyConfigured as error:
        raise ConfigurationError(
            f"Django's database can be used with Django's settings only: set DJANGO_SETTINGS_MODULE ({error})"
        ) from error
    except RuntimeError as error:
        # Django's own words for a model whose application is not installed.
        if "INSTALLED_APPS" not in str(error):
            raise
        raise ConfigurationError(
            'the Django project has no tables for this: add "amqtask.contrib.django" to INSTALLED_APPS and run '
            "`manage.py migrate`"
        ) from error
    return models

"""`amqtask beat -S django`: the periodic tasks of Django's tables, as their admin changes them.

Every two seconds beat asks for the time of the last change (PeriodicTasks, one row), and reads the tasks again when it is
another one; and once a minute in any case, for changes that were made without Django's signals. The entries of the settings
(`beat_schedule`, `add_periodic_task`) are written into the tables when beat starts, as django-celery-beat does: the
settings' task, schedule and arguments win, whether it is enabled is the tables' own.

Its connection stays open: beat asks too often for one of its own each time.

A row that cannot be read (arguments that are no JSON, a solar event without the library) is logged and left out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar

from django import db

from amqtask.beat.contract import Entry, Run, StoreOptions
from amqtask.beat.sender import NAME_HEADER
from amqtask.beat.settings_store import entries_of
from amqtask.contrib.django.around import close_broken_connections
from amqtask.contrib.django.backend import find_models
from amqtask.contrib.django.zones import aware, stored
from amqtask.exceptions import ConfigurationError
from amqtask.ground.printable import bounded_logger, described
from amqtask.schedules import clocked, crontab, schedule, solar

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.contrib.django.models import PeriodicTask
    from amqtask.ground.shapes import OptionDict

logger = bounded_logger("amqtask.beat")
# Seconds after which the tasks are read again although nothing was said to have changed.
READ_AGAIN = 60.0
# Of a periodic task, what an entry of the settings says.
_OPTIONS = ("queue", "exchange", "routing_key", "priority")


class DatabaseScheduler:
    """See amqtask.beat.contract.ScheduleStore. Raises: ConfigurationError without Django's settings or the application."""

    poll_seconds: ClassVar[float] = 2.0

    def __init__(self, app: AmqTask, options: StoreOptions) -> None:
        self._app = app
        self._models = find_models()
        self._read_at = float("-inf")
        self._last_change: Any = None
        self._is_merged = self._read_only = options.read_only
        # Which entries of the settings are `relative`: the tables have no column for it.
        self._relative: frozenset[str] = frozenset()
        logger.info("periodic tasks come from Django's table %s", self._models.PeriodicTask._meta.db_table)

    def entries(self) -> Iterable[Entry]:
        """The enabled periodic tasks."""
        close_broken_connections()
        if not self._is_merged:
            self._merge_settings()
            self._is_merged = True
        # First, so that what changes while they are read is seen as a change.
        self._last_change = self._models.PeriodicTasks.last_change()
        self._read_at = time.monotonic()
        rows = (self._entry(row) for row in self._models.PeriodicTask.objects.enabled())
        entries = [entry for entry in rows if entry is not None]
        if self._read_only:
            # As they will be once beat has written them down.
            names = set(self._models.PeriodicTask.objects.values_list("name", flat=True))
            entries += [entry for entry in entries_of(self._app) if entry.name not in names]
        return entries

    def has_changed(self) -> bool:
        """Whether PeriodicTasks has another time than at the last look, or the last look is too old."""
        close_broken_connections()
        if time.monotonic() - self._read_at > READ_AGAIN:
            return True
        return bool(self._models.PeriodicTasks.last_change() != self._last_change)

    def record(self, runs: Sequence[Run]) -> None:
        """Note when each task ran, and disable one-off tasks; these writes are no changes for `has_changed`."""
        close_broken_connections()
        rows = self._models.PeriodicTask.objects
        for run in runs:
            fields: dict[str, Any] = {
                "last_due_at": stored(run.due_at),
                "last_run_at": stored(run.sent_at),
                "total_run_count": run.total_run_count,
            }
            if run.is_last:
                # Enabled again it runs once more.
                fields |= {"enabled": False, "total_run_count": 0}
            rows.filter(name=run.name).update(**fields)

    def close(self) -> None:
        """Close this thread's connections."""
        db.connections.close_all()

    # -- from the tables

    def _entry(self, row: Any) -> Entry | None:
        try:
            args, kwargs = json.loads(row.args or "[]"), json.loads(row.kwargs or "{}")
            if not isinstance(args, list) or not isinstance(kwargs, dict):
                raise ValueError("args must be a JSON list, and kwargs a JSON object")
            timing, options = row.schedule, options_of(row)
        except Exception as error:  # noqa: BLE001 - rows are written by many; whatever one holds, the others go on
            logger.error("periodic task %r is left out: %s", row.name, error or type(error).__name__)
            return None
        if row.name in self._relative and isinstance(timing, schedule):
            timing.relative = True
        return Entry(
            name=row.name,
            task=row.task,
            schedule=timing,
            args=args,
            kwargs=kwargs,
            options=options,
            start_time=_moment(row.start_time),
            expires=_moment(row.expires),
            one_off=row.one_off,
            last_due_at=_moment(row.last_due_at or row.last_run_at),
            last_run_at=_moment(row.last_run_at),
            total_run_count=row.total_run_count,
        )

    # -- from the settings

    def _merge_settings(self) -> None:
        relative = set()
        for entry in entries_of(self._app):
            try:
                self._merge(entry)
            except ConfigurationError as error:
                logger.error("%s; it is not sent", error)
                continue
            if entry.relative:
                relative.add(entry.name)
        self._relative = frozenset(relative)

    def _merge(self, entry: Entry) -> None:
        schedule_type, timing = self._timing(entry)
        fields: dict[str, Any] = {f"{name}_id": None for name in ("interval", "crontab", "solar", "clocked")}
        fields |= {
            f"{schedule_type}_id": timing.pk,
            "task": entry.task,
            "args": _json(entry.name, list(entry.args)),
            "kwargs": _json(entry.name, dict(entry.kwargs)),
            **_option_fields(entry),
        }
        if schedule_type == "clocked":
            fields["one_off"] = True
        rows = self._models.PeriodicTask.objects
        row = rows.filter(name=entry.name).first()
        if row is None:
            rows.create(name=entry.name, enabled=entry.enabled, **fields)
        elif any(getattr(row, name) != value for name, value in fields.items()):
            for name, value in fields.items():
                setattr(row, name, value)
            row.save()

    def _timing(self, entry: Entry) -> tuple[str, Any]:
        """The row of a schedule, saved. Raises: ConfigurationError for one that has no table."""
        for schedule_class, name, model in (
            (crontab, "crontab", self._models.CrontabSchedule),
            (solar, "solar", self._models.SolarSchedule),
            (clocked, "clocked", self._models.ClockedSchedule),
            (schedule, "interval", self._models.IntervalSchedule),
        ):
            if isinstance(entry.schedule, schedule_class):
                if entry.schedule.app is None:
                    entry.schedule.app = self._app  # whose time zone it has, unless it has its own
                row = model.from_schedule(entry.schedule)
                if row.pk is None:
                    row.save()
                return name, row
        raise ConfigurationError(
            f"beat_schedule[{entry.name!r}]: {described(entry.schedule)} cannot be kept in Django's tables; "
            "they have intervals, crontabs, solar events and clocked times"
        )


def _option_fields(entry: Entry) -> OptionDict:
    """Columns for an entry's options. Raises: ConfigurationError for options without one."""
    options = dict(entry.options)
    fields: dict[str, Any] = {name: options.pop(name, None) for name in _OPTIONS}
    headers = dict(options.pop("headers", None) or {})
    headers.pop(NAME_HEADER, None)
    fields["headers"] = _json(entry.name, headers)
    expires = options.pop("expire_seconds", None) or options.pop("expires", None)
    if expires is not None and not isinstance(expires, (int, float)):
        raise ConfigurationError(f"beat_schedule[{entry.name!r}]: expires must be seconds, not {expires!r}")
    fields["expire_seconds"] = None if expires is None else max(1, int(expires))
    if options:
        logger.warning(
            "periodic task %r: Django's tables have no place for the options %s", entry.name, ", ".join(sorted(options))
        )
    return fields


def _json(name: str, value: list[object] | Mapping[str, object]) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"beat_schedule[{name!r}]: its arguments cannot be written as JSON for Django's tables: {error}"
        ) from error


def _moment(value: Any) -> Any:
    return None if value is None else aware(value)


def options_of(periodic: PeriodicTask) -> OptionDict:
    """The options of `apply_async` for a row. Raises: ValueError for headers that are no JSON object."""
    options: OptionDict = {
        name: value
        for name in ("queue", "exchange", "routing_key", "priority")
        if (value := getattr(periodic, name)) is not None
    }
    expires = periodic.expires_
    if expires is not None:
        options["expires"] = aware(expires) if isinstance(expires, datetime) else expires
    headers = json.loads(periodic.headers or "{}")
    if not isinstance(headers, dict):
        raise ValueError(f"the headers of periodic task {periodic.name!r} are no JSON object: {periodic.headers}")
    options["headers"] = {**headers, NAME_HEADER: periodic.name}
    return options

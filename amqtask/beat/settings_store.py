"""The entries of the settings (`beat_schedule`, `add_periodic_task`), and their last runs in a SQLite file or in memory."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from amqtask.beat.contract import Entry, Run, StoreOptions
from amqtask.exceptions import ConfigurationError
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.option_types import arguments, of_call, shown
from amqtask.schedules import crontab, maybe_schedule

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.ground.shapes import SettingDict

logger = bounded_logger("amqtask.beat")

DEFAULT_FILENAME = "amqtaskbeat-schedule"
EXTENSION = ".sqlite3"
CLEANUP = "celery.backend_cleanup"
_FIELDS = frozenset({"task", "schedule", "args", "kwargs", "options", "relative", "enabled"})
# What Celery's ScheduleEntry takes too; the state is kept elsewhere here.
_IGNORED = frozenset({"name", "app", "last_run_at", "total_run_count"})
_TABLE = """
CREATE TABLE IF NOT EXISTS entries (
    name TEXT PRIMARY KEY,
    last_due_at TEXT NOT NULL,
    last_run_at TEXT NOT NULL,
    total_run_count INTEGER NOT NULL
)"""


class LastRun(NamedTuple):
    """The last run of an entry."""

    due_at: datetime
    sent_at: datetime
    runs: int


class MemoryStore:
    """The settings' entries; last runs are forgotten with the process (the broker knows where each entry stands)."""

    poll_seconds: ClassVar[float] = 1.0

    def __init__(self, app: AmqTask, options: StoreOptions) -> None:
        self._app = app
        self._last: dict[str, LastRun] = {}
        self._last_snapshot: SettingDict | None = None

    def entries(self) -> Iterable[Entry]:
        """The entries as the settings are now. Raises: ConfigurationError naming the entry that is wrong."""
        self._last_snapshot = _snapshot(self._app)
        return [self._with_last_run(entry) for entry in entries_of(self._app)]

    def has_changed(self) -> bool:
        """Whether the application's beat_schedule was changed since."""
        return _snapshot(self._app) != self._last_snapshot

    def record(self, runs: Sequence[Run]) -> None:
        """Keep the last run of each entry."""
        for run in runs:
            self._last[run.name] = LastRun(run.due_at, run.sent_at, run.total_run_count)

    def close(self) -> None:
        """Nothing to close."""

    def _with_last_run(self, entry: Entry) -> Entry:
        last = self._last.get(entry.name)
        if last is None:
            return entry
        return replace(entry, last_due_at=last.due_at, last_run_at=last.sent_at, total_run_count=last.runs)


class FileStore(MemoryStore):
    """The settings' entries, and their last runs in a SQLite file: `-s`, `beat_schedule_filename`.

    The file gets the extension `.sqlite3` unless its name has one. One that is something else (Celery's shelve) is kept aside.
    """

    def __init__(self, app: AmqTask, options: StoreOptions) -> None:
        super().__init__(app, options)
        self._connection: sqlite3.Connection | None = None
        self.path = schedule_path(options.filename or app.conf.beat_schedule_filename)
        if options.read_only and not self.path.exists():
            return
        self._connection, self._last = self._open()

    def record(self, runs: Sequence[Run]) -> None:
        """Write the runs to the file before the next one is sent."""
        super().record(runs)
        if self._connection is None:
            return
        with self._connection:
            self._connection.executemany(
                "INSERT INTO entries VALUES (?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET last_due_at = "
                "excluded.last_due_at, last_run_at = excluded.last_run_at, total_run_count = excluded.total_run_count",
                [(run.name, run.due_at.isoformat(), run.sent_at.isoformat(), run.total_run_count) for run in runs],
            )

    def close(self) -> None:
        """Close the file."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _open(self) -> tuple[sqlite3.Connection, dict[str, LastRun]]:
        try:
            return _connect(self.path)
        except (sqlite3.DatabaseError, ValueError, TypeError) as error:
            if isinstance(error, sqlite3.OperationalError):
                raise self._unusable(error) from error
            self._put_aside(error)
        try:
            return _connect(self.path)
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _unusable(self, error: sqlite3.Error) -> ConfigurationError:
        return ConfigurationError(
            f"the schedule file {self.path} cannot be used ({error}): name one in a folder of yours with -s or "
            "beat_schedule_filename"
        )

    def _put_aside(self, error: Exception) -> None:
        aside = self.path.with_name(f"{self.path.name}.unreadable-{time.time_ns()}")
        self.path.replace(aside)
        logger.warning(
            "beat: the schedule file %s is not one of ours (%s): it is kept as %s, and a new one is begun",
            self.path,
            error,
            aside,
        )


def _connect(path: Path) -> tuple[sqlite3.Connection, dict[str, LastRun]]:
    """The file, and what is in it."""
    connection = sqlite3.connect(path, timeout=10.0)
    try:
        # A kill of the process loses nothing; a power cut may lose the last runs, which the broker knows too.
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        with connection:
            connection.execute(_TABLE)
        rows = connection.execute("SELECT name, last_due_at, last_run_at, total_run_count FROM entries")
        last = {
            name: LastRun(datetime.fromisoformat(due), datetime.fromisoformat(sent), runs)
            for name, due, sent, runs in rows
        }
    except BaseException:  # also when it is interrupted: nobody else knows the connection
        connection.close()
        raise
    return connection, last


def schedule_path(filename: str | None) -> Path:
    """The file of that name: with `.sqlite3` unless it has an extension."""
    path = Path(filename or DEFAULT_FILENAME).absolute()
    return path if path.suffix else path.with_name(path.name + EXTENSION)


def entries_of(app: AmqTask) -> Iterable[Entry]:
    """The entries of an application's settings, and the daily clean-up of results where the store needs one.

    Raises: ConfigurationError naming the entry that is wrong.
    """
    entries = dict(app.conf.beat_schedule or {})
    if CLEANUP not in entries and _needs_cleanup(app):
        # Celery's hour and expiry (celery/beat.py, install_default_entries).
        entries[CLEANUP] = {"task": CLEANUP, "schedule": crontab(0, 4), "options": {"expires": 12 * 3600}}
    return [entry_of(app, name, fields) for name, fields in entries.items()]


def _needs_cleanup(app: AmqTask) -> bool:
    """Whether results, or what the inbox knows, stay until somebody deletes them."""
    if app.conf.inbox_expires and any(task.inbox for task in app.tasks.values()):
        return True
    backend = app.backend
    return backend is not None and bool(app.conf.result_expires) and not backend.supports_autoexpire


def _snapshot(app: AmqTask) -> SettingDict:
    """A copy of beat_schedule to compare with later, deep enough to see changes inside an entry."""
    entries = dict(app.conf.beat_schedule or {})
    return {name: dict(fields) if isinstance(fields, Mapping) else fields for name, fields in entries.items()}


def entry_of(app: AmqTask, name: str, fields: object) -> Entry:
    """One entry of beat_schedule. Raises: ConfigurationError."""
    if not isinstance(fields, Mapping):
        raise ConfigurationError(f"beat_schedule[{name!r}] is not a mapping with task and schedule, but {fields!r}")
    unknown = sorted(set(map(str, fields)) - _FIELDS - _IGNORED)
    if unknown:
        raise ConfigurationError(
            f"beat_schedule[{name!r}] has no field {', '.join(map(repr, unknown))}; there are {', '.join(sorted(_FIELDS))}"
        )
    task = fields.get("task")
    task = getattr(task, "name", task)
    if not isinstance(task, str) or fields.get("schedule") is None:
        raise ConfigurationError(f"beat_schedule[{name!r}] needs a task (its name) and a schedule")
    try:
        schedule = maybe_schedule(fields["schedule"], bool(fields.get("relative", False)))
        args, kwargs = arguments(task, fields.get("args"), fields.get("kwargs"))
        options = fields.get("options") or {}
        if not isinstance(options, Mapping):
            raise ConfigurationError(f"options is a dictionary of options by name, not {shown(options)}")
        options = dict(of_call(task, options))
    except (ConfigurationError, TypeError) as error:
        raise ConfigurationError(f"beat_schedule[{name!r}]: {error}") from error
    return Entry(
        name=str(name),
        task=task,
        schedule=schedule,
        args=args,
        kwargs=kwargs,
        options=options,
        enabled=bool(fields.get("enabled", True)),
    )

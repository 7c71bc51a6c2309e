"""`manage.py amqtask_import_celery`: periodic tasks and results of django-celery-beat and django-celery-results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from django.core.management.base import BaseCommand, CommandParser
from django.db import DEFAULT_DB_ALIAS, connections, transaction
from django.utils import timezone

from amqtask.contrib.django.models import PeriodicTasks

# -- Rows of django-celery-beat and django-celery-results into our tables, copied by the database itself.
#
# The tables are known by their names, so that neither package has to be installed. What is there already (a schedule with the
# same fields, a periodic task of the same name, a result of the same task id) is left as it is: importing twice copies nothing
# twice. Columns that an older version of these packages did not have get their defaults.

BEAT, RESULTS = "django_celery_beat", "django_celery_results"


class Table(NamedTuple):
    """A table of those packages and the columns to copy; `key` says which rows are the same, `defaults` what old versions lack
    (SQL)."""

    source: str
    target: str
    key: Sequence[str]
    columns: Sequence[str]
    defaults: Mapping[str, str] = {}


SCHEDULES = {
    schedule_type: Table(f"{BEAT}_{name}", f"amqtask_{name}", fields, fields, defaults)
    for schedule_type, name, fields, defaults in (
        ("interval", "intervalschedule", ("every", "period"), {}),
        (
            "crontab",
            "crontabschedule",
            ("minute", "hour", "day_of_month", "month_of_year", "day_of_week", "timezone"),
            {"timezone": "'UTC'"},
        ),
        ("solar", "solarschedule", ("event", "latitude", "longitude"), {}),
        ("clocked", "clockedschedule", ("clocked_time",), {}),
    )
}
PERIODIC = Table(
    f"{BEAT}_periodictask",
    "amqtask_periodictask",
    ("name",),
    (
        "name", "task", "args", "kwargs", "queue", "exchange", "routing_key", "headers", "priority", "expires",
        "expire_seconds", "one_off", "start_time", "enabled", "last_run_at", "total_run_count", "date_changed", "description",
    ),
    {"headers": "'{}'", "one_off": "FALSE", "description": "''"},
)  # fmt: skip
TASK_RESULTS = Table(
    f"{RESULTS}_taskresult",
    "amqtask_taskresult",
    ("task_id",),
    (
        "task_id", "periodic_task_name", "task_name", "task_args", "task_kwargs", "status", "worker", "content_type",
        "content_encoding", "result", "date_created", "date_started", "date_done", "traceback", "meta",
    ),
    {"date_created": "o.date_done"},
)  # fmt: skip
GROUP_RESULTS = Table(
    f"{RESULTS}_groupresult",
    "amqtask_groupresult",
    ("group_id",),
    ("group_id", "date_created", "date_done", "content_type", "content_encoding", "result"),
)


class Copied(NamedTuple):
    """Rows that were copied from a table, and rows that were present already; both None: there is no such table."""

    table: str
    rows: int | None
    present: int | None


class Import:
    """One import from and into the database `alias`, in one transaction. `is_rehearsal` undoes it at the end."""

    def __init__(self, alias: str = "default", *, is_rehearsal: bool = False) -> None:
        self._alias = alias
        self._is_rehearsal = is_rehearsal
        self._connection = connections[alias]

    def run(self) -> list[Copied]:
        """Copy all tables that exist; returns what was copied of each."""
        with transaction.atomic(using=self._alias), self._connection.cursor() as cursor:
            tables = set(self._connection.introspection.table_names(cursor))
            done = [self._copy(cursor, table, tables) for table in SCHEDULES.values()]
            done.append(self._copy(cursor, PERIODIC, tables, self._schedule_columns(cursor, tables)))
            done += [self._copy(cursor, table, tables) for table in (TASK_RESULTS, GROUP_RESULTS)]
            PeriodicTasks.objects.using(self._alias).update_or_create(ident=1, defaults={"last_update": timezone.now()})
            if self._is_rehearsal:
                transaction.set_rollback(True, using=self._alias)
        return done

    def _copy(
        self, cursor: Any, table: Table, tables: set[str], extra_values: Mapping[str, str] | None = None
    ) -> Copied:
        if table.source not in tables:
            return Copied(table.source, None, None)
        source_columns = self._columns(cursor, table.source)
        values = {
            name: f"o.{name}" if name in source_columns else table.defaults.get(name, "NULL") for name in table.columns
        }
        # A column that may be NULL in the source and must not be NULL in our table.
        values |= {
            name: f"COALESCE(o.{name}, {default})" for name, default in table.defaults.items() if name in source_columns
        }
        values |= extra_values or {}
        condition = " AND ".join(f"n.{name} = {values[name]}" for name in table.key)
        cursor.execute(f"SELECT COUNT(*) FROM {table.source}")
        total = cursor.fetchone()[0]
        # Those packages may have the same schedule twice.
        distinct = "DISTINCT " if table.key == table.columns else ""
        cursor.execute(
            f"INSERT INTO {table.target} ({', '.join(values)}) SELECT {distinct}{', '.join(values.values())} "
            f"FROM {table.source} o WHERE NOT EXISTS (SELECT 1 FROM {table.target} n WHERE {condition})"
        )
        return Copied(table.source, cursor.rowcount, total - cursor.rowcount)

    def _schedule_columns(self, cursor: object, tables: set[str]) -> dict[str, str]:
        """For each type of schedule the SQL that finds our row with the fields of theirs."""
        if PERIODIC.source not in tables:
            return {}
        source_columns = self._columns(cursor, PERIODIC.source)
        expressions = {}
        for schedule_type, table in SCHEDULES.items():
            if f"{schedule_type}_id" not in source_columns or table.source not in tables:
                continue
            schedule_columns = self._columns(cursor, table.source)
            condition = " AND ".join(
                f"n.{name} = {f's.{name}' if name in schedule_columns else table.defaults[name]}" for name in table.key
            )
            expressions[f"{schedule_type}_id"] = (
                f"(SELECT MIN(n.id) FROM {table.target} n JOIN {table.source} s ON {condition} WHERE s.id = o.{schedule_type}_id)"
            )
        return expressions

    def _columns(self, cursor: Any, table: str) -> set[str]:
        return {column.name for column in self._connection.introspection.get_table_description(cursor, table)}


class Command(BaseCommand):
    """Copies rows, as often as it is asked to; nothing is deleted or overwritten."""

    help = (
        "Copy the tables of django-celery-beat and django-celery-results into amqtask's; run it as often as you like."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        """Which database, and whether to copy at all."""
        parser.add_argument("--database", default=DEFAULT_DB_ALIAS, help="The database that has both (default).")
        parser.add_argument("--dry-run", action="store_true", help="Only say what would be copied.")

    def handle(self, *args: object, **options: Any) -> None:
        """Say what came of each table."""
        verb = "would be copied" if options["dry_run"] else "copied"
        for table, rows, present in Import(options["database"], is_rehearsal=options["dry_run"]).run():
            if rows is None:
                self.stdout.write(f"{table}: no such table")
            else:
                self.stdout.write(f"{table}: {rows} {verb}, {present} already here")

"""The tables of results, column by column as Celery declares them (celery/backends/database/models.py).

Two systems on the same tables read each other's rows: `result`, `args`, `kwargs`, `children` and `stamps` hold what the result
serializer wrote, `date_done` is naive UTC.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import sqlalchemy as sa

from amqtask.ground.printable import bounded_logger

logger = bounded_logger("amqtask.backends")
# What the columns take.
NAME_LENGTH, STATUS_LENGTH = 155, 50
_KEY = sa.Integer().with_variant(sa.BigInteger, "mssql")


class Tables(NamedTuple):
    """The tables of tasks and of groups."""

    tasks: sa.Table
    groups: sa.Table


def tables(names: Mapping[str, str], schemas: Mapping[str, str]) -> Tables:
    """`database_table_names` and `database_table_schemas` have the keys `task` and `group`."""
    metadata = sa.MetaData()
    tasks = sa.Table(
        names.get("task") or "celery_taskmeta",
        metadata,
        _id("task_id_sequence", schemas.get("task")),
        sa.Column("task_id", sa.String(NAME_LENGTH), unique=True),
        sa.Column("status", sa.String(STATUS_LENGTH)),
        sa.Column("result", sa.LargeBinary),
        sa.Column("date_done", sa.DateTime, index=True),
        sa.Column("traceback", sa.Text),
        sa.Column("children", sa.LargeBinary),
        sa.Column("name", sa.String(NAME_LENGTH)),
        sa.Column("args", sa.LargeBinary),
        sa.Column("kwargs", sa.LargeBinary),
        sa.Column("worker", sa.String(NAME_LENGTH)),
        sa.Column("retries", sa.Integer),
        sa.Column("queue", sa.String(NAME_LENGTH)),
        sa.Column("stamps", sa.LargeBinary),
        schema=schemas.get("task"),
        sqlite_autoincrement=True,
    )
    groups = sa.Table(
        names.get("group") or "celery_tasksetmeta",
        metadata,
        _id("taskset_id_sequence", schemas.get("group")),
        sa.Column("taskset_id", sa.String(NAME_LENGTH), unique=True),
        sa.Column("result", sa.LargeBinary),
        sa.Column("date_done", sa.DateTime, index=True),
        schema=schemas.get("group"),
        sqlite_autoincrement=True,
    )
    return Tables(tasks, groups)


def _id(sequence: str, schema: str | None) -> sa.Column[int]:
    return sa.Column("id", _KEY, sa.Sequence(sequence, schema=schema), primary_key=True, autoincrement=True)


def create(engine: sa.Engine, tables: Tables) -> None:
    """Make the tables that are missing; another process may be doing the same."""
    for attempt in range(10):
        try:
            tables.tasks.metadata.create_all(engine)
            return
        except sa.exc.DBAPIError:
            # Somebody made one between our look and our statement; the next look sees it.
            if attempt == 9:
                raise


def known_columns(engine: sa.Engine, table: sa.Table) -> frozenset[str]:
    """Those of our columns that the table in the database has: an older Celery made it without some of them."""
    existing = {column["name"] for column in sa.inspect(engine).get_columns(table.name, schema=table.schema)}
    missing = [column.name for column in table.columns if column.name not in existing]
    if missing:
        logger.warning(
            "table %s has no columns %s: what belongs there is not kept (ALTER TABLE … ADD COLUMN adds them)",
            table.name, ", ".join(missing),
        )  # fmt: skip
    return frozenset(existing)

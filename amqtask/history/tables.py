"""The index's tables, in SQLite or PostgreSQL (SQLAlchemy): the connection to them, and what the two do in different ways."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.sqlite.base import SQLiteCompiler
from sqlalchemy.engine import make_url

from amqtask.exceptions import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import DBAPIConnection

    from amqtask.ground.shapes import JsonObject

METADATA = sa.MetaData()
# Of SQLite: connections, and the KiB of pages that each may have in memory.
CONNECTIONS, CACHE_KIB = 5, 2_000
# Steps of SQLite between two looks at the clock.
_STEPS = 10_000
_NAME, _TIME = sa.String(255), sa.Float(53)
# Above 2**32: no database counts them up.
_KEY = sa.BigInteger().with_variant(sa.Integer, "sqlite")

TASKS = sa.Table(
    "amqtask_history",
    METADATA,
    sa.Column("key", _KEY, primary_key=True, autoincrement=False),
    sa.Column("id", _NAME, nullable=False, unique=True),
    sa.Column("name", _NAME),
    sa.Column("state", sa.String(20), nullable=False),
    sa.Column("state_at", _TIME, nullable=False),
    sa.Column("state_rank", sa.Integer, nullable=False),
    sa.Column("queue", _NAME),
    sa.Column("worker", _NAME),
    sa.Column("root_id", _NAME),
    sa.Column("parent_id", _NAME),
    sa.Column("rerun_of", _NAME),
    sa.Column("group_id", _NAME),
    sa.Column("group_index", sa.Integer),
    sa.Column("joins", _NAME),
    sa.Column("periodic", _NAME),
    sa.Column("follows", sa.Text),
    sa.Column("args", sa.Text),
    sa.Column("kwargs", sa.Text),
    sa.Column("retries", sa.Integer, nullable=False),
    sa.Column("eta", _NAME),
    sa.Column("expires", _NAME),
    sa.Column("sent_at", _TIME),
    sa.Column("received_at", _TIME),
    sa.Column("started_at", _TIME),
    sa.Column("ended_at", _TIME),
    sa.Column("runtime", _TIME),
    sa.Column("result", sa.Text),
    sa.Column("exception", sa.Text),
    sa.Column("error", _NAME),
    sa.Column("traceback", sa.Text),
    sa.Column("stamps", sa.Text),
    sa.Column("message", sa.Text),
    sa.Column("steps", sa.Text, nullable=False),
)
# A search walks one of these backwards from the newest. What else it asks for, and the state, is looked at in the index: rows
# that do not fit are not read.
_INDEXES: dict[str, tuple[sa.Column[Any], ...]] = {
    "of_name": (TASKS.c.name, TASKS.c.key, TASKS.c.state, TASKS.c.queue),
    "of_worker": (TASKS.c.worker, TASKS.c.key, TASKS.c.state, TASKS.c.name, TASKS.c.queue),
    "by_queue": (TASKS.c.queue, TASKS.c.key, TASKS.c.state),
    "by_state": (TASKS.c.state, TASKS.c.key),
}
for _name, _columns in _INDEXES.items():
    sa.Index(f"amqtask_history_{_name}", *_columns)
# Failures are few, and what is looked for most: whatever else is asked, no more than some of them are read. (SQLite uses an index
# of a part of the rows where the question has its condition to the letter.)
FAILED = TASKS.c.state == sa.literal_column("'FAILURE'")
# What SQLite is told where it shall find tasks by their keys, or by their state.
NO_INDEX, OF_STATE = "NOT INDEXED", "INDEXED BY amqtask_history_by_state"
_KNOWN_ERROR = TASKS.c.error.is_not(None)
# Most tasks are the root of a workflow that has no other.
HAS_ROOT = TASKS.c.root_id != TASKS.c.id
for _name, _columns, _where in (
    # Groups of failures, and those of a group since it was seen, are counted in the index. That needs the state, too: SQLite
    # looks at it again.
    ("failures", (TASKS.c.name, TASKS.c.error, TASKS.c.key, TASKS.c.state_at, TASKS.c.state), FAILED),
    ("failures_by_time", (TASKS.c.state, TASKS.c.key, TASKS.c.name, TASKS.c.error), FAILED),
    ("failures_by_name", (TASKS.c.name, TASKS.c.key), FAILED),
    ("failures_by_queue", (TASKS.c.queue, TASKS.c.key), FAILED),
    ("failures_by_worker", (TASKS.c.worker, TASKS.c.key), FAILED),
    ("errors", (TASKS.c.error, TASKS.c.key), _KNOWN_ERROR),
    ("roots", (TASKS.c.root_id, TASKS.c.key), HAS_ROOT),
    # Of most tasks there is none.
    *(
        (name, (column, TASKS.c.key), column.is_not(None))
        for name, column in (
            ("parents", TASKS.c.parent_id),
            ("reruns", TASKS.c.rerun_of),
            ("groups", TASKS.c.group_id),
            ("joins", TASKS.c.joins),
            ("periodic", TASKS.c.periodic),
        )
    ),
):
    sa.Index(f"amqtask_history_{_name}", *_columns, sqlite_where=_where, postgresql_where=_where)
# Those of older versions that others have replaced.
_FORMER = {
    *(f"amqtask_history_by_{_name}" for _name in ("name", "name_and_state", "worker")),
    "ix_amqtask_history_root_id",
}

STAMPS = sa.Table(
    "amqtask_history_stamps",
    METADATA,
    sa.Column("name", _NAME, primary_key=True),
    sa.Column("value", _NAME, primary_key=True),
    sa.Column("key", _KEY, primary_key=True, autoincrement=False),
    # By which those of old tasks are deleted.
    sa.Index("amqtask_history_stamps_by_key", "key"),
)

WORKERS = sa.Table(
    "amqtask_history_workers",
    METADATA,
    sa.Column("hostname", _NAME, primary_key=True),
    sa.Column("online", sa.Boolean, nullable=False),
    sa.Column("first_at", _TIME, nullable=False),
    sa.Column("last_at", _TIME, nullable=False),
    sa.Column("software", _NAME),
    sa.Column("processed", sa.Integer),
    sa.Column("active", sa.Integer),
    sa.Column("frequency", _TIME),
    sa.Column("heard_at", _TIME, nullable=False, server_default="0"),
)

COUNTED = ("sent", "succeeded", "failed", "retried", "revoked", "runtime", "started", "waited")
MINUTES = sa.Table(
    "amqtask_history_minutes",
    METADATA,
    sa.Column("minute", sa.Integer, primary_key=True, autoincrement=False),
    *(sa.Column(name, sa.BigInteger, nullable=False, server_default="0") for name in COUNTED),
)

# How many messages were ready in queues, about once a minute: what the console saw.
DEPTHS = sa.Table(
    "amqtask_history_depths",
    METADATA,
    sa.Column("minute", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("queue", _NAME, primary_key=True),
    sa.Column("ready", sa.BigInteger, nullable=False),
)

# What operators did in the console.
ACTIONS = sa.Table(
    "amqtask_history_actions",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("at", _TIME, nullable=False),
    sa.Column("who", _NAME, nullable=False),
    sa.Column("action", _NAME, nullable=False),
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("outcome", sa.Text),
)

# Groups of failures that somebody has marked as seen; `until` is when the last of them failed.
SEEN = sa.Table(
    "amqtask_history_seen",
    METADATA,
    sa.Column("name", _NAME, primary_key=True),
    sa.Column("error", _NAME, primary_key=True),
    sa.Column("until", _TIME, nullable=False),
    sa.Column("at", _TIME, nullable=False),
    sa.Column("who", _NAME, nullable=False),
)

# What the console's rules found: an alert is open until `ended_at`, and open once.
ALERTS = sa.Table(
    "amqtask_history_alerts",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("rule", _NAME, nullable=False),
    sa.Column("subject", _NAME, nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("began_at", _TIME, nullable=False),
    sa.Column("ended_at", _TIME),
)
_OPEN = ALERTS.c.ended_at.is_(None)
sa.Index(
    "amqtask_history_alerts_open",
    ALERTS.c.rule,
    ALERTS.c.subject,
    unique=True,
    sqlite_where=_OPEN,
    postgresql_where=_OPEN,
)

# Who is to be told of them; a notice is under way, or tried again, until `due_at`.
NOTICES = sa.Table(
    "amqtask_history_notices",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("alert", sa.Integer, nullable=False, index=True),
    sa.Column("destination", _NAME, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("made_at", _TIME, nullable=False),
    sa.Column("due_at", _TIME, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("error", sa.Text),
    sa.Column("done_at", _TIME),
)

# One row: the last message of the stream that is in the index (-1: none), and how often news of tasks were taken in.
POSITION = sa.Table(
    "amqtask_history_position",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("position", sa.BigInteger, nullable=False),
    sa.Column("changes", sa.BigInteger, nullable=False, server_default="0"),
)

# What could not be taken in: an event, or a message that cannot be read (as text), with the reason.
ASIDE = sa.Table(
    "amqtask_history_aside",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("at", _TIME, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
)

# What searches for text look in: SQLite's FTS5, in PostgreSQL a column with an index of its words. The rowid is the task's key.
TEXTS = sa.Table(
    "amqtask_history_texts",
    sa.MetaData(),
    sa.Column("rowid", _KEY, primary_key=True, autoincrement=False),
    sa.Column("body", sa.Text, nullable=False),
)
_TEXTS_DDL = {
    "sqlite": ("CREATE VIRTUAL TABLE IF NOT EXISTS amqtask_history_texts USING fts5(body, columnsize = 0)",),
    "postgresql": (
        "CREATE TABLE IF NOT EXISTS amqtask_history_texts (rowid BIGINT PRIMARY KEY, body TEXT NOT NULL)",
        "CREATE INDEX IF NOT EXISTS amqtask_history_texts_words ON amqtask_history_texts "
        "USING gin (to_tsvector('simple', body))",
    ),
}


def connect(url: str) -> sa.Engine:
    """The database, with its tables. Raises: ConfigurationError for a URL that cannot be used."""
    engine = _engine(url)
    _create(engine)
    return engine


def check(url: str) -> None:
    """Look whether the database is there; nothing is made in it. Raises: ConfigurationError, SQLAlchemyError."""
    engine = _engine(url)
    file = Path(engine.url.database or "") if engine.dialect.name == "sqlite" else None
    if file is not None and not file.exists():
        if not os.access(file.absolute().parent, os.W_OK):
            raise ConfigurationError(f"history_url cannot be used: {file} cannot be made in that folder")
        return
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def _engine(url: str) -> sa.Engine:
    try:
        parsed = make_url(url)
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        if parsed.get_backend_name() not in _TEXTS_DDL:
            raise ConfigurationError(f"history_url can be sqlite:/// or postgresql://, not {parsed.drivername}://")
        is_sqlite = parsed.get_backend_name() == "sqlite"
        options: dict[str, Any] = {"pool_size": CONNECTIONS, "max_overflow": 0} if is_sqlite else {}
        engine = sa.create_engine(parsed, pool_pre_ping=True, **options)
    except (sa.exc.ArgumentError, ImportError) as error:
        raise ConfigurationError(f"history_url cannot be used: {error}") from error
    if engine.dialect.name == "sqlite":
        engine.dialect.statement_compiler = _WithHints
        event.listen(engine, "connect", _set_up_sqlite)
    return engine


class _WithHints(SQLiteCompiler):
    """Writes `with_hint` for SQLite, too."""

    def get_from_hint_text(self, table: sa.FromClause, text: str | None) -> str | None:
        """What stands behind the table's name."""
        return text


def index_for(equal: Mapping[str, str]) -> str:
    """Which index SQLite shall walk for tasks with these values in these columns: that of which a value has the fewest rows.
    Nothing: the tasks themselves."""
    has_failed = equal.get("state") == "FAILURE"
    for column, index, of_failures in (
        ("id", "", ""),
        ("root_id", "roots", "roots"),
        ("error", "errors", "errors"),
        ("periodic", "periodic", "periodic"),
        ("worker", "of_worker", "failures_by_worker"),
        ("name", "of_name", "failures_by_name"),
        ("queue", "by_queue", "failures_by_queue"),
        ("state", "by_state", "failures_by_time"),
    ):
        if column in equal:
            walked = of_failures if has_failed else index
            return f"INDEXED BY amqtask_history_{walked}" if walked else ""
    return ""


def _create(engine: sa.Engine) -> None:
    """Make what is missing; another process may be doing the same."""
    for attempt in range(10):
        try:
            _add_what_is_new(engine)
            METADATA.create_all(engine)
            with engine.begin() as connection:
                for statement in _TEXTS_DDL[engine.dialect.name]:
                    connection.execute(sa.text(statement))
                if connection.execute(sa.select(POSITION.c.id)).first() is None:
                    connection.execute(sa.insert(POSITION).values(id=1, position=-1))
            return
        except sa.exc.DBAPIError:
            # Somebody made one between our look and our statement; the next look sees it.
            if attempt == 9:
                raise


def _add_what_is_new(engine: sa.Engine) -> None:
    """Give an index of an older version the columns and indexes of this one."""
    inspector = sa.inspect(engine)
    for table in (TASKS, STAMPS, WORKERS, MINUTES, POSITION):
        if not inspector.has_table(table.name):
            continue
        column_names = {column["name"] for column in inspector.get_columns(table.name)}
        index_names = {index["name"] for index in inspector.get_indexes(table.name)}
        with engine.begin() as connection:
            for column in table.columns:
                if column.name not in column_names:
                    kind = column.type.compile(engine.dialect) + ("" if column.nullable else " NOT NULL DEFAULT 0")
                    connection.execute(sa.text(f"ALTER TABLE {table.name} ADD COLUMN {column.name} {kind}"))
            for name in index_names & _FORMER:
                connection.execute(sa.text(f"DROP INDEX {name}"))
            for index in table.indexes:
                if index.name not in index_names:
                    index.create(connection)


def _set_up_sqlite(connection: DBAPIConnection, record: Any) -> None:
    """Readers beside the one writer, whose journal is cut back to 64 MB; a commit is on the disk.

    A connection has little in memory: what it reads again and again the system has in its own."""
    assert isinstance(connection, sqlite3.Connection)
    for statement in (
        "PRAGMA journal_mode = WAL",
        "PRAGMA synchronous = FULL",
        "PRAGMA busy_timeout = 30000",
        f"PRAGMA cache_size = -{CACHE_KIB}",
        "PRAGMA journal_size_limit = 64000000",
        "PRAGMA temp_store = MEMORY",
    ):
        connection.execute(statement)


@contextmanager
def in_time(connection: sa.Connection, seconds: float) -> Iterator[None]:
    """What is asked meanwhile ends with an error (`is_too_slow`) after so long; in PostgreSQL each statement."""
    if connection.dialect.name != "sqlite":
        connection.execute(sa.text(f"SET LOCAL statement_timeout = {max(1, int(seconds * 1000))}"))
        yield
        return
    driver, until = connection.connection.driver_connection, time.monotonic() + seconds
    assert isinstance(driver, sqlite3.Connection)
    driver.set_progress_handler(lambda: time.monotonic() > until, _STEPS)
    try:
        yield
    finally:
        driver.set_progress_handler(None, 0)


def is_too_slow(error: sa.exc.SQLAlchemyError) -> bool:
    """Whether `in_time` ended it."""
    cause = error.__cause__
    return str(cause) == "interrupted" or getattr(cause, "sqlstate", None) == "57014"


def is_about_values(error: sa.exc.SQLAlchemyError) -> bool:
    """Whether the database is there, and refuses what it shall take: an integer or a text that it has no room for."""
    kinds = {kind.__name__ for kind in (*type(error).__mro__, *type(getattr(error, "orig", None)).__mro__)}
    return bool(kinds & {"DataError", "IntegrityError"})


def among(connection: sa.Connection, column: sa.Column[Any], values: Sequence[object]) -> sa.ColumnElement[bool]:
    """Whether a column has one of these values. In PostgreSQL they are one parameter of one statement, however many they are."""
    if connection.dialect.name == "sqlite":
        return column.in_(values)
    return column == sa.any_(sa.literal(list(values), postgresql.ARRAY(column.type)))


def delete(connection: sa.Connection, table: sa.Table, key: str, values: Sequence[object]) -> None:
    """Delete the rows with these keys."""
    if values and connection.dialect.name == "sqlite":
        connection.exec_driver_sql(f'DELETE FROM {table.name} WHERE "{key}" = ?', [(value,) for value in values])
    elif values:
        connection.execute(sa.delete(table).where(among(connection, table.c[key], values)))


def insert(connection: sa.Connection, table: sa.Table, rows: Sequence[JsonObject]) -> None:
    """Add rows, all with the same columns. PostgreSQL takes them as one stream: no statement is planned and run for each."""
    if not rows:
        return
    into = f"{table.name} ({', '.join(_quoted(rows[0]))})"
    if connection.dialect.name == "sqlite":
        statement = f"INSERT INTO {into} VALUES ({', '.join('?' * len(rows[0]))})"
        connection.exec_driver_sql(statement, [tuple(row.values()) for row in rows])
        return
    driver: Any = connection.connection.driver_connection
    try:
        with driver.cursor() as cursor, cursor.copy(f"COPY {into} FROM STDIN") as copy:
            for row in rows:
                copy.write_row(tuple(row.values()))
    except connection.dialect.loaded_dbapi.Error as error:
        raise sa.exc.DBAPIError(f"COPY {into}", None, error) from error


def change(connection: sa.Connection, table: sa.Table, key: str, rows: Sequence[JsonObject]) -> None:
    """Give the rows with these keys these values, of all columns. (PostgreSQL's UPDATE, too, makes a row anew.)"""
    if rows and connection.dialect.name == "sqlite":
        # What is set is written into its indexes again, also where it is the same.
        names = [name for name in rows[0] if not table.c[name].primary_key and not table.c[name].unique]
        statement = f'UPDATE {table.name} SET {", ".join(f"{name} = ?" for name in _quoted(names))} WHERE "{key}" = ?'
        connection.exec_driver_sql(statement, [tuple(row[name] for name in (*names, key)) for row in rows])
    else:
        delete(connection, table, key, [row[key] for row in rows])
        insert(connection, table, rows)


def _quoted(names: Iterable[str]) -> list[str]:
    return [f'"{name}"' for name in names]


def insertion_of_new(connection: sa.Connection, table: sa.Table) -> sa.Insert:
    """An INSERT that leaves out rows that are there."""
    if connection.dialect.name == "sqlite":
        return sa.insert(table).prefix_with("OR IGNORE")
    return postgresql.insert(table).on_conflict_do_nothing()

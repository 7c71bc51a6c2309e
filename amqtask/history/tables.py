"""The index's tables, in SQLite or PostgreSQL, and the connection to them (SQLAlchemy)."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import make_url

from amqtask.exceptions import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import DBAPIConnection

METADATA = sa.MetaData()
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
    sa.Column("root_id", _NAME, index=True),
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
# Each search is one of these, read backwards from the newest. With the state in it, it is counted without its rows.
for _column in ("name", "state"):
    sa.Index(f"amqtask_history_by_{_column}", TASKS.c[_column], TASKS.c.key)
for _column in ("queue", "worker"):
    sa.Index(f"amqtask_history_by_{_column}", TASKS.c[_column], TASKS.c.key, TASKS.c.state)
sa.Index("amqtask_history_by_name_and_state", TASKS.c.name, TASKS.c.state, TASKS.c.key)
# Failures are few, and what is looked for most: whatever else is asked, no more than some of them are read. (SQLite uses an index
# of a part of the rows where the question has its condition to the letter.)
FAILED = TASKS.c.state == sa.literal_column("'FAILURE'")
_KNOWN_ERROR = TASKS.c.error.is_not(None)
for _name, _columns, _where in (
    # Groups of failures, and those of a group since it was seen, are counted in the index. That needs the state, too: SQLite
    # looks at it again.
    ("failures", (TASKS.c.name, TASKS.c.error, TASKS.c.key, TASKS.c.state_at, TASKS.c.state), FAILED),
    ("failures_by_time", (TASKS.c.state, TASKS.c.key, TASKS.c.name, TASKS.c.error), FAILED),
    ("failures_by_queue", (TASKS.c.queue, TASKS.c.key), FAILED),
    ("failures_by_worker", (TASKS.c.worker, TASKS.c.key), FAILED),
    ("errors", (TASKS.c.error, TASKS.c.key), _KNOWN_ERROR),
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

STAMPS = sa.Table(
    "amqtask_history_stamps",
    METADATA,
    sa.Column("name", _NAME, primary_key=True),
    sa.Column("value", _NAME, primary_key=True),
    sa.Column("key", _KEY, primary_key=True, autoincrement=False),
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

# One row: the last message of the stream that is in the index (-1: none).
POSITION = sa.Table(
    "amqtask_history_position",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("position", sa.BigInteger, nullable=False),
)

# What searches for text look in: SQLite's FTS5, in PostgreSQL a column with an index of its words. The rowid is the task's key.
TEXTS = sa.Table(
    "amqtask_history_texts",
    sa.MetaData(),
    sa.Column("rowid", _KEY, primary_key=True, autoincrement=False),
    sa.Column("body", sa.Text, nullable=False),
)
_TEXTS_DDL = {
    "sqlite": ("CREATE VIRTUAL TABLE IF NOT EXISTS amqtask_history_texts USING fts5(body)",),
    "postgresql": (
        "CREATE TABLE IF NOT EXISTS amqtask_history_texts (rowid BIGINT PRIMARY KEY, body TEXT NOT NULL)",
        "CREATE INDEX IF NOT EXISTS amqtask_history_texts_words ON amqtask_history_texts "
        "USING gin (to_tsvector('simple', body))",
    ),
}


def connect(url: str) -> sa.Engine:
    """The database, with its tables. Raises: ConfigurationError for a URL that cannot be used."""
    try:
        parsed = make_url(url)
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        if parsed.get_backend_name() not in _TEXTS_DDL:
            raise ConfigurationError(f"history_url can be sqlite:/// or postgresql://, not {parsed.drivername}://")
        engine = sa.create_engine(parsed, pool_pre_ping=True)
    except (sa.exc.ArgumentError, ImportError) as error:
        raise ConfigurationError(f"history_url cannot be used: {error}") from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _set_up_sqlite)
    _create(engine)
    return engine


def _create(engine: sa.Engine) -> None:
    """Make what is missing; another process may be doing the same."""
    for attempt in range(10):
        try:
            _add_columns(engine)
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


def _add_columns(engine: sa.Engine) -> None:
    """Give an index of an older version the columns that it has not."""
    inspector = sa.inspect(engine)
    for table in (TASKS, MINUTES):
        if not inspector.has_table(table.name):
            continue
        column_names = {column["name"] for column in inspector.get_columns(table.name)}
        missing = [column for column in table.columns if column.name not in column_names]
        with engine.begin() as connection:
            for column in missing:
                column_type = column.type.compile(engine.dialect) + ("" if column.nullable else " NOT NULL DEFAULT 0")
                connection.execute(sa.text(f"ALTER TABLE {table.name} ADD COLUMN {column.name} {column_type}"))
            for index in table.indexes if missing else ():
                index.create(connection, checkfirst=True)


def _set_up_sqlite(connection: DBAPIConnection, record: Any) -> None:
    """Readers beside the one writer; a commit is on the disk; 64 MB of pages in memory at most."""
    assert isinstance(connection, sqlite3.Connection)
    for statement in (
        "PRAGMA journal_mode = WAL",
        "PRAGMA synchronous = FULL",
        "PRAGMA busy_timeout = 30000",
        "PRAGMA cache_size = -64000",
        "PRAGMA temp_store = MEMORY",
    ):
        connection.execute(statement)

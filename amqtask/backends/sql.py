"""`db+…://`: results in a SQL database through SQLAlchemy, in Celery's tables (celery/backends/database/__init__.py).

Each statement is a transaction of its own, so what is written is there for others when the statement returns, and no row stays
locked. An UPDATE leaves out rows with SUCCESS; who finds no row to update inserts one, and who loses that race updates again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from amqtask import states
from amqtask.backends.contract import BackendOptions, Codec, RetryPolicy, unreadable
from amqtask.backends.polling import PatientBackend
from amqtask.exceptions import BackendUnreachable, ConfigurationError, EncodeError, MessageError, Undecodable
from amqtask.ground.lazy import ByProcess
from amqtask.ground.plugins import load_path
from amqtask.ground.printable import bounded_logger, clause
from amqtask.protocol.result import ResultMessage

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonFields, JsonObject, OptionDict


# -- The tables of results, column by column as Celery declares them (celery/backends/database/models.py).
#
# Two systems on the same tables read each other's rows: `result`, `args`, `kwargs`, `children` and `stamps` hold what the
# result serializer wrote, `date_done` is naive UTC.

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


T = TypeVar("T")
# Drivers for a URL that names none, in the order in which they are looked for.
DRIVERS = {"postgresql": ("psycopg", "psycopg2", "pg8000"), "mysql": ("mysqldb", "pymysql", "mysqlconnector")}
# Those that take the seconds to open a connection under this name.
_CONNECT_TIMEOUT = frozenset({"psycopg", "psycopg2", "mysqldb", "pymysql"})
# Celery's (celery/app/defaults.py): a connection that the server closed is replaced, an old one too.
ENGINE_OPTIONS = {"pool_pre_ping": True, "pool_recycle": 3600}
# How each pickle of protocol 2 and later begins.
_PICKLED = b"\x80"
_EXTENDED = ("name", "worker", "retries", "queue")
_GONE = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError)


class _Database:
    """One process's connections, and the columns that its database has."""

    def __init__(self, engine: sa.Engine, columns: frozenset[str]) -> None:
        self.engine = engine
        self.columns = columns


class SqlBackend(PatientBackend):
    """See amqtask.backends.contract.ResultBackend.

    Settings: `database_engine_options` (of create_engine), `database_engine_callback` (called with each engine, or its
    dotted name), `database_short_lived_sessions` (a connection per statement instead of a pool), `database_table_names`,
    `database_table_schemas`, `database_create_tables_at_setup`. `transport_options`: see `PatientBackend` and `PollingBackend`.
    """

    errors = (sa.exc.SQLAlchemyError,)

    def __init__(self, options: BackendOptions) -> None:
        super().__init__(options)
        self._options = options
        self._settings = options.settings
        self._codec = Codec(options)
        self._url = database_url(options.url)
        self._tables = tables(
            self._settings.get("database_table_names") or {}, self._settings.get("database_table_schemas") or {}
        )
        self._databases = ByProcess(self._connect, surplus=lambda database: database.engine.dispose())

    # -- the worker's end

    def keep(self, result: ResultMessage, policy: RetryPolicy | None) -> None:
        """One UPDATE, and an INSERT if there is no such row."""
        row, table = self._row(result), self._tables.tasks
        is_open = sa.and_(table.c.task_id == result.task_id, table.c.status != states.SUCCESS)

        def write(database: _Database) -> None:
            values = {name: value for name, value in row.items() if name in database.columns}
            self._write(database, table, is_open, values)

        self._run(write, policy)

    def _write(self, database: _Database, table: sa.Table, is_open: Any, values: JsonFields) -> None:
        with database.engine.connect() as connection:
            for _ in range(2):
                if connection.execute(sa.update(table).where(is_open).values(values)).rowcount:
                    return
                try:
                    connection.execute(sa.insert(table).values(values))
                    return
                except sa.exc.IntegrityError:
                    pass  # it is there: as SUCCESS, which stays, or since a moment ago

    def _row(self, result: ResultMessage) -> JsonObject:
        extra, codec = result.extra, self._codec
        row: JsonObject = {
            "task_id": result.task_id,
            "status": result.status,
            "result": codec.value(result.result, f"the result of task {result.task_id}"),
            # Also for states on the way, so that clean-up finds what never ended.
            "date_done": _naive(result.date_done),
            "traceback": codec.text(result.traceback),
            "children": codec.value(result.children, "the list of children") if result.children else None,
        }
        if extra:
            row |= {name: _short(extra.get(name)) for name in _EXTENDED}
            row |= {
                name: codec.value(extra.get(name), f"{name} of task {result.task_id}") for name in ("args", "kwargs")
            }
            names = extra.get("stamped_headers")
            if names:
                stamps = {"stamped_headers": list(names), "stamps": {name: extra.get(name) for name in names}}
                row["stamps"] = codec.value(stamps, f"the stamps of task {result.task_id}")
        return row

    # -- the caller's end

    def read_some(self, task_ids: Sequence[str]) -> Iterable[ResultMessage]:
        """One SELECT."""
        return map(self._result, self._run(lambda database: self._select(database, task_ids)))

    def _select(self, database: _Database, task_ids: Sequence[str]) -> Sequence[Mapping[Any, object]]:
        table = self._tables.tasks
        columns = [column for column in table.columns if column.name in database.columns]
        with database.engine.connect() as connection:
            return connection.execute(sa.select(*columns).where(table.c.task_id.in_(task_ids))).mappings().all()

    def _result(self, row: Mapping[Any, Any]) -> ResultMessage:
        codec = self._codec
        try:
            result = ResultMessage(
                row["task_id"],
                row["status"],
                None if row["result"] is None else codec.read(row["result"]),
                codec.read_text(row["traceback"]),
                codec.read(row["children"]) if row.get("children") else [],
                _aware(row["date_done"]) if row["status"] in states.READY_STATES else None,
            )
            if row.get("name") is not None:
                result.extra = {name: row.get(name) for name in _EXTENDED}
                result.extra |= {
                    name: None if row.get(name) is None else codec.read(row[name]) for name in ("args", "kwargs")
                }
            if row.get("stamps"):
                stamps = codec.read(row["stamps"])
                result.extra |= {"stamped_headers": stamps["stamped_headers"], **stamps["stamps"]}
            return result
        except MessageError as unread:
            error: Exception = unread
            if (row["result"] or b"").startswith(_PICKLED):
                error = Undecodable(
                    f"the result of task {row['task_id']} is pickled: by a Celery before 5.7, whatever its result_serializer "
                    "(with 'pickle' here it would be read, if everybody who can write to this database is trusted)"
                )
            return unreadable(row["task_id"], error)

    def forget(self, task_id: str) -> None:
        """DELETE. Raises: BackendUnreachable."""
        table = self._tables.tasks
        self._execute(sa.delete(table).where(table.c.task_id == task_id))

    def cleanup(self) -> None:
        """DELETE what is older than `result_expires`, tasks and groups. Raises: BackendUnreachable."""
        if not self._options.expires:
            return
        oldest = datetime.now(timezone.utc).replace(tzinfo=None) - timedelta(seconds=self._options.expires)
        for table in self._tables:
            self._execute(sa.delete(table).where(table.c.date_done < oldest))

    def close(self) -> None:
        """Close connections; they open again when they are needed."""
        super().close()
        self._databases.end(lambda database: database.engine.dispose())

    # -- groups

    def save_group(self, group_id: str, members: object) -> None:
        """Keep a group's results (their ids). Raises: EncodeError, BackendUnreachable."""
        table = self._tables.groups
        values = {
            "taskset_id": group_id,
            "result": self._codec.value(members, f"group {group_id}"),
            "date_done": datetime.now(timezone.utc).replace(tzinfo=None),
        }
        self._run(lambda database: self._write(database, table, table.c.taskset_id == group_id, values))

    def restore_group(self, group_id: str) -> object:
        """What `save_group`, ours or Celery's, kept; None when there is nothing. Raises: BackendUnreachable."""
        table = self._tables.groups

        def select(database: _Database) -> Any:
            with database.engine.connect() as connection:
                return connection.execute(sa.select(table.c.result).where(table.c.taskset_id == group_id)).scalar()

        body = self._run(select)
        return None if body is None else self._codec.read(body)

    def delete_group(self, group_id: str) -> None:
        """Delete the group. Raises: BackendUnreachable."""
        table = self._tables.groups
        self._execute(sa.delete(table).where(table.c.taskset_id == group_id))

    # -- the database

    def _execute(self, statement: Any) -> None:
        def work(database: _Database) -> None:
            with database.engine.connect() as connection:
                connection.execute(statement)

        self._run(work)

    def _run(self, work: Callable[[_Database], T], policy: RetryPolicy | None = None) -> T:
        return self.retrying(lambda: work(self._databases.get()), policy)

    def is_transient(self, error: Exception) -> bool:
        """Whether the server is away, or has closed the connection."""
        return isinstance(error, _GONE) or (isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated)

    def explain(self, error: Exception) -> Exception:
        """Our error for one of SQLAlchemy's, with the database's URL."""
        safe_url = self._url.render_as_string(hide_password=True)
        cause = (error.orig if isinstance(error, sa.exc.StatementError) else None) or error
        if isinstance(error, sa.exc.DataError):
            return EncodeError(f"{safe_url} does not take a result: {cause}")
        if isinstance(error, _GONE):
            return BackendUnreachable(
                f"{safe_url} does not answer: {clause(cause)}. Is it running there, and is result_backend right?"
            )
        return BackendUnreachable(f"{safe_url} refused: {cause}")

    def _connect(self) -> _Database:
        settings = self._settings
        custom_options = settings.get("database_engine_options") or {}
        options: OptionDict = {"hide_parameters": True, **ENGINE_OPTIONS, **custom_options}
        if self._url.get_driver_name() in _CONNECT_TIMEOUT:
            arguments = {"connect_timeout": max(1, int(self._options.connect_timeout))}
            options["connect_args"] = {**arguments, **options.get("connect_args", {})}
        if settings.get("database_short_lived_sessions"):
            options = {name: value for name, value in options.items() if not name.startswith(("pool", "max_overflow"))}
            options["poolclass"] = NullPool
        engine = sa.create_engine(self._url, **options)
        callback = settings.get("database_engine_callback")
        if callback is not None:
            (_named(callback) if isinstance(callback, str) else callback)(engine)
        try:
            if settings.get("database_create_tables_at_setup", True) is not False:
                create(engine, self._tables)
            columns = known_columns(engine, self._tables.tasks)
        except BaseException:  # also when it is interrupted: nobody else knows the engine
            engine.dispose()
            raise
        return _Database(engine.execution_options(isolation_level="AUTOCOMMIT"), columns)


def database_url(url: str) -> sa.URL:
    """SQLAlchemy's URL of a `db+…://`, with a driver that is installed. Raises: ConfigurationError."""
    try:
        parsed = sa.make_url(url.partition("+")[2] if url.startswith("db+") else url)
    except sa.exc.ArgumentError as error:
        raise ConfigurationError(
            "result_backend db+… is not a database URL; it looks like db+postgresql://user:password@host/name or "
            "db+sqlite:///results.db"
        ) from error
    backend, _, driver = parsed.drivername.partition("+")
    if backend == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigurationError(
            "a SQLite database in memory is for one connection only: name a file (db+sqlite:///results.db), "
            "or use cache+memory://"
        )
    if not driver and backend in DRIVERS:
        names = [name for name in DRIVERS[backend] if _is_installed(parsed.set(drivername=f"{backend}+{name}"))]
        if not names:
            raise ConfigurationError(
                f"result_backend db+{backend}:// needs a driver of that database, and none is installed: "
                f"pip install one of {', '.join(DRIVERS[backend])}"
            )
        return parsed.set(drivername=f"{backend}+{names[0]}")
    if _is_async(parsed):
        raise ConfigurationError(
            f"result_backend db+{parsed.drivername}://: {driver} is for asyncio only, and a worker's slots are not; "
            f"write db+{backend}:// for a driver that is installed"
        )
    if not _is_installed(parsed):
        raise ConfigurationError(f"result_backend db+{parsed.drivername}:// needs a driver that is not installed")
    return parsed


def _is_async(url: sa.URL) -> bool:
    try:
        return bool(url.get_dialect().is_async)
    except sa.exc.NoSuchModuleError:
        return False


def _is_installed(url: sa.URL) -> bool:
    try:
        url.get_dialect().import_dbapi()
    except (ImportError, sa.exc.NoSuchModuleError):
        return False
    return True


def _named(path: str) -> Any:
    try:
        return load_path(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"database_engine_callback {path!r} cannot be imported: {error}") from error


def _naive(when: str | None) -> datetime:
    moment = datetime.now(timezone.utc) if when is None else datetime.fromisoformat(when)
    return moment.astimezone(timezone.utc).replace(tzinfo=None)


def _aware(when: datetime | None) -> str | None:
    return None if when is None else when.replace(tzinfo=timezone.utc).isoformat()


def _short(value: object) -> object:
    return value[:NAME_LENGTH] if isinstance(value, str) else value

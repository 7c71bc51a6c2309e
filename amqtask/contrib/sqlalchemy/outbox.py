"""The transactional outbox for SQLAlchemy sessions (extra `sqlalchemy`): `task.delay()` in a transaction is a row of it.

    outbox_rows = outbox_table(Base.metadata)
    outbox = SqlAlchemyOutbox(app, outbox_rows, sessions=Session)

    with Session.begin() as session:
        session.add(order)
        ship.delay(str(order.id))       # published if, and only if, this transaction is committed

Which session a call belongs to is decided when it is made, in this order: the one of a `with outbox.using(session)` around
it; for a `scoped_session` the current one, while it is in a transaction; for a `sessionmaker` the session that last began
or used a transaction in this thread or asyncio task, while that lasts. None of them: the call is published at once.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    DateTime,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    bindparam,
    create_engine,
    delete,
    event,
    func,
    insert,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.util import greenlet_spawn

from amqtask.exceptions import ConfigurationError
from amqtask.ground.lazy import lazy
from amqtask.ground.printable import bounded_logger
from amqtask.outbox.contract import Failing, NewRow, OutboxUnreachable, Send, StoredRow, Waiting

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session, async_sessionmaker
    from sqlalchemy.orm import ORMExecuteState, SessionTransaction

    from amqtask.app import AmqTask

logger = bounded_logger("amqtask.outbox")

# Databases whose rows a relay can lock and others pass over.
LOCKING = frozenset({"postgresql", "mysql", "mariadb", "oracle"})
# A relay's host may vanish without a word: PostgreSQL gives the rows back after so long.
GIVE_UP_ROWS = "SET LOCAL idle_in_transaction_session_timeout = '60s'"

Sessions: TypeAlias = "sessionmaker[Any] | async_sessionmaker[Any] | scoped_session[Any] | async_scoped_session[Any]"
Bound: TypeAlias = (
    "Session | scoped_session[Any] | AsyncSession | async_scoped_session[Any] | Connection | AsyncConnection"
)

_EMPTY: tuple[Any, ...] = ()
# (outbox, what its rows are written with) of the `using` blocks around here, the innermost last.
_using: ContextVar[tuple[tuple[Any, Any], ...]] = ContextVar("amqtask_outbox_using", default=_EMPTY)
# Sessions in a transaction here, the last used last.
_begun: ContextVar[tuple[weakref.ref[Session], ...]] = ContextVar("amqtask_outbox_begun", default=_EMPTY)
# When a call was last published at once here, as no session was in a transaction.
_at_once: ContextVar[float] = ContextVar("amqtask_outbox_at_once", default=0.0)
# Names in `session.info`.
_OWNER, _BEGAN = "amqtask_outbox", "amqtask_outbox_began"
_WRITTEN, _COMMITTED = "amqtask_outbox_written", "amqtask_outbox_committed"


def outbox_table(metadata: MetaData, name: str = "amqtask_outbox", *, schema: str | None = None) -> Table:
    """The outbox's table, for `create_all` and for Alembic; one per database is enough."""
    long_text = Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")
    return Table(
        name,
        metadata,
        # SQLite counts up by itself only in an INTEGER.
        Column("id", BigInteger().with_variant(Integer(), "sqlite"), primary_key=True, autoincrement=True),
        Column("task_id", String(255), nullable=False),
        Column("task", String(255), nullable=False),
        Column("message", long_text, nullable=False),
        Column("body", LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb"), nullable=False),
        Column("created_at", DateTime(timezone=True), nullable=False),
        Column("attempts", Integer, nullable=False, default=0, server_default=text("0")),
        Column("error", long_text),
        Column("retry_at", DateTime(timezone=True)),
        schema=schema,
    )


class SqlAlchemyOutbox:
    """Installs itself as `app.outbox`; see amqtask.outbox.contract.Outbox.

    `sessions` is the `sessionmaker` or `scoped_session` (also the async ones) whose transactions calls belong to by
    themselves; without it only `with outbox.using(session)` counts. `engine` is what relays connect with (an Engine, a URL, or a
    function that gives an Engine); default the sessions' own, which must not be an async one.
    """

    def __init__(
        self,
        app: AmqTask,
        table: Table,
        *,
        sessions: Sessions | None = None,
        engine: Engine | str | Callable[[], Engine] | None = None,
    ) -> None:
        self.table = table
        self._sessions = sessions
        self._engine = engine
        if sessions is not None:
            _Watch(self).follow(sessions)
        app.install_outbox(self)

    @contextmanager
    def using(self, session: Bound) -> Iterator[None]:
        """Calls in this block are rows of that session's (or connection's) transaction, whoever began it, and wherever."""
        token = _using.set((*_using.get(), (self, session)))
        try:
            yield
        finally:
            _using.reset(token)

    def transaction(self) -> _Rows | None:
        """The transaction that a call made here belongs to."""
        bound = next((session for outbox, session in reversed(_using.get()) if outbox is self), None)
        if bound is None:
            bound = self._current()
        if bound is None:
            return None
        writer = _sync(bound)
        if isinstance(writer, Session) and _is_over(writer):
            return None
        return _Rows(self.table, writer)

    def _current(self) -> Session | None:
        sessions = self._sessions
        if sessions is None:
            return None
        if is_scoped(sessions):
            return _scoped(sessions)
        for reference in reversed(_begun.get()):
            session = reference()
            if session is not None and session.info.get(_OWNER) is self and session.in_transaction():
                return session
        _at_once.set(time.monotonic())
        return None

    def store(self) -> SqlAlchemyStore:
        """Raises: ConfigurationError (no engine is known)."""
        return SqlAlchemyStore(self._relay_engine, self.table)

    @lazy
    def _relay_engine(self) -> Engine:
        engine = engine_of(self._engine, self._sessions)
        if is_async_kind(engine, "AsyncEngine"):
            raise ConfigurationError(
                f"the outbox's sessions use the async engine {engine.url!r}, and a relay needs an ordinary one: "
                "SqlAlchemyOutbox(…, engine='postgresql+psycopg://…')"
            )
        if not isinstance(engine, Engine):
            raise ConfigurationError("the outbox knows no engine for its relay: SqlAlchemyOutbox(…, engine=engine)")
        return engine


class _Rows:
    """Writes rows with what a session or connection has open; see amqtask.outbox.contract.Transaction."""

    def __init__(self, table: Table, writer: Session | Connection) -> None:
        self._table = table
        self._writer = writer

    def write(self, rows: Sequence[NewRow]) -> None:
        """Raises: SQLAlchemyError, RuntimeError (in a coroutine `adelay` is to be awaited)."""
        if self._is_async and not _sqlalchemy_awaits():
            raise RuntimeError(
                f"{rows[0].task}: this transaction belongs to an async session, so the call must be awaited: "
                "`await task.adelay(…)` instead of `task.delay(…)`"
            )
        self._insert(rows)

    async def awrite(self, rows: Sequence[NewRow]) -> None:
        """Raises: SQLAlchemyError."""
        if self._is_async:
            await greenlet_spawn(self._insert, rows)
        else:
            self._insert(rows)

    @property
    def _is_async(self) -> bool:
        writer = self._writer
        bind = writer.get_bind(clause=self._table) if isinstance(writer, Session) else writer
        return bool(bind.dialect.is_async)

    def _insert(self, rows: Sequence[NewRow]) -> None:
        now = datetime.now(timezone.utc)
        values = [{**row._asdict(), "created_at": now, "attempts": 0} for row in rows]
        self._writer.execute(insert(self._table), values)
        if isinstance(self._writer, Session):
            self._writer.info[_WRITTEN] = self._writer.info.get(_WRITTEN, 0) + len(rows)


class _Watch:
    """Notes which sessions are in a transaction here, and says when one of them ended by mistake."""

    def __init__(self, outbox: SqlAlchemyOutbox) -> None:
        self._outbox = outbox

    def follow(self, sessions: Sessions) -> None:
        target: Any = sessions
        if is_async_kind(sessions, "async_scoped_session"):
            target = target.session_factory
        if is_async_kind(target, "async_sessionmaker"):
            # Async sessions have no events, the ordinary ones inside them have: these get a class of their own.
            session_class = target.kw.get("sync_session_class") or target.class_.sync_session_class
            target.configure(sync_session_class=type("OutboxSession", (session_class,), {}))
            target = target.kw["sync_session_class"]
        # Before the user's own listeners, which may publish what follows a commit.
        event.listen(target, "after_commit", self._committed, insert=True)
        event.listen(target, "after_rollback", self._rolled_back)
        event.listen(target, "after_transaction_end", self._ended)
        if not is_scoped(sessions):
            event.listen(target, "after_transaction_create", self._began)
            event.listen(target, "before_commit", self._commits)
            event.listen(target, "after_attach", self._attached)
            event.listen(target, "do_orm_execute", self._executes)

    def _began(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is None:
            session.info[_BEGAN] = time.monotonic()
            self._note(session)

    def _commits(self, session: Session) -> None:
        began = session.info.get(_BEGAN)
        is_known = any(reference() is session for reference in _begun.get())
        if not is_known and began is not None and _at_once.get() > began:
            logger.warning(
                "a call that was made before this commit was published at once: the session began its transaction in another "
                "thread or context. Put `with outbox.using(session):` around such calls"
            )

    def _attached(self, session: Session, instance: object) -> None:
        self._note(session)

    def _executes(self, state: ORMExecuteState) -> None:
        self._note(state.session)

    def _note(self, session: Session) -> None:
        begun = _begun.get()
        if begun and begun[-1]() is session:
            return
        session.info[_OWNER] = self._outbox
        _begun.set((*_other_sessions(session), weakref.ref(session)))

    def _committed(self, session: Session) -> None:
        transaction = session.get_transaction()
        if transaction is not None and not session.in_nested_transaction():
            session.info[_COMMITTED] = transaction
            session.info.pop(_WRITTEN, None)

    def _rolled_back(self, session: Session) -> None:
        if not session.in_nested_transaction():
            session.info.pop(_WRITTEN, None)

    def _ended(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is not None:
            return
        session.info.pop(_COMMITTED, None)
        count = session.info.pop(_WRITTEN, 0)
        if count and sys.exc_info()[0] is None:
            logger.warning(
                "not sent: %d of the calls that were made, as their session was closed without commit()",
                count,
            )
        _begun.set(_other_sessions(session))


def _other_sessions(session: Session) -> tuple[weakref.ref[Session], ...]:
    """The other sessions that are in a transaction here."""
    pairs = ((reference, reference()) for reference in _begun.get())
    return tuple(
        reference
        for reference, begun_session in pairs
        if begun_session is not None and begun_session is not session and begun_session.in_transaction()
    )


def _is_over(session: Session) -> bool:
    """Whether this is what a session does after its commit, which must not wait for another one."""
    committed = session.info.get(_COMMITTED)
    return committed is not None and committed is session.get_transaction()


def _sync(bound: Any) -> Session | Connection:
    if is_scoped(bound):
        bound = bound()
    if is_async_kind(bound, "AsyncSession"):
        bound = bound.sync_session
    elif is_async_kind(bound, "AsyncConnection"):
        bound = bound.sync_connection
    if not isinstance(bound, (Session, Connection)):
        raise TypeError(f"outbox.using() takes a session or a connection, not {bound!r}")
    return bound


def is_async_kind(candidate: object, name: str) -> bool:
    """Whether it is an instance of that asyncio class of SQLAlchemy's. Importing those needs greenlet: no import, no instance."""
    module = sys.modules.get("sqlalchemy.ext.asyncio")
    return module is not None and isinstance(candidate, getattr(module, name))


def is_scoped(sessions: object) -> bool:
    return isinstance(sessions, scoped_session) or is_async_kind(sessions, "async_scoped_session")


def _sqlalchemy_awaits() -> bool:
    """Whether this runs in a greenlet in which SQLAlchemy can await (AsyncSession.run_sync)."""
    from greenlet import getcurrent

    return type(getcurrent()).__name__ == "_AsyncIoGreenlet"


def _scoped(sessions: Any) -> Session | None:
    try:
        if not sessions.registry.has():
            return None
    except RuntimeError:  # Flask-SQLAlchemy's, where there is no application context: there is no session either
        return None
    session_or_async = sessions()
    session: Session = (
        session_or_async.sync_session if is_async_kind(session_or_async, "AsyncSession") else session_or_async
    )
    return session if session.in_transaction() else None


def engine_of(configured: object, sessions: Sessions | None) -> Any:
    """The configured one, an engine, its URL or a function that returns it, or that of the sessions, which may be no Engine."""
    if isinstance(configured, str):
        return create_engine(configured)
    if configured is not None:
        return configured() if callable(configured) else configured
    factory: Any = sessions
    return getattr(factory.session_factory if is_scoped(sessions) else factory, "kw", {}).get("bind")


class SqlAlchemyStore:
    """The table as its relays see it; see amqtask.outbox.contract.Store. For one thread."""

    def __init__(self, engine: Engine, table: Table) -> None:
        self._engine = engine
        self._table = table
        self._connection: Connection | None = None
        self._locks = engine.dialect.name in LOCKING

    @property
    def name(self) -> str:
        """Table and database, for logs and reports."""
        url = make_url(self._engine.url)
        return f"{self._table.fullname} of {url.render_as_string(hide_password=True)}"

    def relay(self, limit: int, now: datetime, send: Send) -> int:
        """See the contract. Without row locks (SQLite) the rows are read first, so that nobody has to wait for the broker."""
        with self._reaching() as connection:
            if self._locks:
                with connection.begin():
                    if connection.dialect.name == "postgresql":
                        connection.execute(text(GIVE_UP_ROWS))
                    rows = self._due(connection, limit, now)
                    if rows:
                        self._settle(connection, send(rows))
                return len(rows)
            with connection.begin():
                rows = self._due(connection, limit, now)
            if rows:
                verdict = send(rows)
                with connection.begin():
                    self._settle(connection, verdict)
            return len(rows)

    def _due(self, connection: Connection, limit: int, now: datetime) -> list[StoredRow]:
        columns = self._table.c
        due = or_(columns.retry_at.is_(None), columns.retry_at <= now)
        query = select(columns.id, columns.message, columns.body, columns.attempts).where(due)
        query = query.order_by(columns.id).limit(limit)
        if self._locks:
            query = query.with_for_update(skip_locked=True)
        return [StoredRow(*row) for row in connection.execute(query)]

    def _settle(self, connection: Connection, verdict: Any) -> None:
        table = self._table
        if verdict.sent:
            connection.execute(delete(table).where(table.c.id.in_(verdict.sent)))
        if verdict.failed:
            change = update(table).where(table.c.id == bindparam("row"))
            values = [{"row": row.id, "error": row.error, "attempts": row.attempts, "retry_at": row.retry_at}
                      for row in verdict.failed]  # fmt: skip
            connection.execute(change, values)

    def waiting(self) -> Waiting:
        """Raises: OutboxUnreachable."""
        columns = self._table.c
        counted = select(func.count(), func.min(columns.created_at), func.count(columns.error))
        with self._reaching() as connection, connection.begin():
            count, oldest, failing = connection.execute(counted.select_from(self._table)).one()
        return Waiting(count, _aware(oldest), failing)

    def failing(self, limit: int) -> list[Failing]:
        """Raises: OutboxUnreachable."""
        columns = self._table.c
        names = [getattr(columns, name) for name in Failing._fields]
        query = select(*names).where(columns.error.is_not(None)).order_by(columns.id).limit(limit)
        with self._reaching() as connection, connection.begin():
            rows = [Failing(*row) for row in connection.execute(query)]
        return [row._replace(created_at=_aware(row.created_at) or row.created_at) for row in rows]

    def retry_now(self) -> int:
        """Raises: OutboxUnreachable."""
        with self._reaching() as connection, connection.begin():
            done = connection.execute(
                update(self._table).where(self._table.c.retry_at.is_not(None)).values(retry_at=None)
            )
            return int(done.rowcount)

    def close(self) -> None:
        """Close connections; may be called twice."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    @contextmanager
    def _reaching(self) -> Iterator[Connection]:
        try:
            if self._connection is None:
                self._connection = self._connect()
            yield self._connection
        except SQLAlchemyError as error:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.invalidate()
                connection.close()
            raise OutboxUnreachable(f"{type(error).__name__}: {error}") from error

    def _connect(self) -> Connection:
        connection = self._engine.connect()
        if self._locks:
            # MySQL's own level would lock the gap that new rows are to go into.
            connection = connection.execution_options(isolation_level="READ COMMITTED")
        # Ours alone: a pool child that is forked meanwhile must not find it in the engine's pool.
        connection.detach()
        return connection


def _aware(moment: datetime | None) -> datetime | None:
    """A moment from the database as aware: SQLite keeps no time zone, what we write is UTC."""
    return moment.replace(tzinfo=timezone.utc) if moment is not None and moment.tzinfo is None else moment

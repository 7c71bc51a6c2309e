"""The inbox for SQLAlchemy sessions (extra `sqlalchemy`): a task with `inbox=True` runs in a transaction with its call's row.

    inbox = SqlAlchemyInbox(app, inbox_table(Base.metadata), sessions=Session)

    @app.task(inbox=True)
    def bill(order_id: int) -> None:
        inbox.session.add(Invoice(order_id=order_id))       # committed when the task returns, once

Calls that the task makes are rows of the same transaction where a SqlAlchemyOutbox has the same `sessions`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    Column,
    DateTime,
    Engine,
    LargeBinary,
    MetaData,
    String,
    Table,
    delete,
    insert,
    select,
    update,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from amqtask.contrib.sqlalchemy.outbox import Sessions, engine_of, is_async_kind, is_scoped
from amqtask.exceptions import ConfigurationError
from amqtask.execution.inbox import Kept

if TYPE_CHECKING:
    from amqtask.app import AmqTask

_NONE: tuple[tuple[Any, Any], ...] = ()
# (inbox, session) of the tasks with inbox=True that run here, the innermost last: an inline one may run within another.
_running: ContextVar[tuple[tuple[Any, Any], ...]] = ContextVar("amqtask_inbox_running", default=_NONE)
# A name in `session.info`.
_BEGAN = "amqtask_inbox_transaction"


def inbox_table(metadata: MetaData, name: str = "amqtask_inbox", *, schema: str | None = None) -> Table:
    """The inbox's table, for `create_all` and for Alembic; it is in the database that the tasks write to."""
    return Table(
        name,
        metadata,
        Column("task_id", String(255), primary_key=True),
        Column("task", String(255), nullable=False),
        Column("created_at", DateTime(timezone=True), nullable=False, index=True),
        Column("content_type", String(128)),
        Column("content_encoding", String(64)),
        Column("body", LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb"), nullable=False),
        schema=schema,
    )


class SqlAlchemyInbox:
    """Installs itself as `app.inbox`; see amqtask.execution.inbox.Inbox.

    `sessions` makes the session of each run, `inbox.session` in the task: a `sessionmaker` or `scoped_session`, for `async def`
    tasks also the async ones. `engine` (an Engine, or a URL) is what deletes old rows where the sessions' own is an async one.
    """

    def __init__(self, app: AmqTask, table: Table, *, sessions: Sessions, engine: Engine | str | None = None) -> None:
        self.table = table
        self._sessions: Any = sessions
        self._engine = engine
        self._is_async = is_async_kind(sessions, "async_sessionmaker") or is_async_kind(
            sessions, "async_scoped_session"
        )
        app.install_inbox(self)

    @property
    def session(self) -> Any:
        """The session of the task that runs here, in its transaction, which is committed when the task returns.

        Raises: RuntimeError outside of tasks with inbox=True."""
        for inbox, session in reversed(_running.get()):
            if inbox is self:
                return session
        raise RuntimeError("inbox.session is there while a task with inbox=True runs, in a worker or by task.apply()")

    def check(self, task: str, *, is_async: bool) -> None:
        """Async sessions are for `async def` tasks."""
        if self._is_async and not is_async:
            raise ConfigurationError(
                f"task {task} has inbox=True and is no `async def`, and the inbox has async sessions: make it one, or give the "
                "inbox a sessionmaker"
            )

    def once(self, task_id: str, task: str, work: Callable[[], Kept]) -> Kept | None:
        """See the contract."""
        with self._opened() as session:
            kept = self._begin(session, task_id, task)
            if kept is None:
                with self._given(session):
                    result = work()
                self._commit(session, task_id, result)
            return kept

    async def aonce(self, task_id: str, task: str, work: Callable[[], Awaitable[Kept]]) -> Kept | None:
        """See the contract. An ordinary session blocks the loop, as it does in the task."""
        if not self._is_async:
            with self._opened() as session:
                kept = self._begin(session, task_id, task)
                if kept is None:
                    with self._given(session):
                        result = await work()
                    self._commit(session, task_id, result)
                return kept
        session = self._new_session()
        try:
            seen: Kept | None = await session.run_sync(self._begin, task_id, task)
            if seen is None:
                with self._given(session):
                    result = await work()
                await session.run_sync(self._commit, task_id, result)
            return seen
        finally:
            await (self._sessions.remove() if is_scoped(self._sessions) else session.close())

    def cleanup(self, before: datetime) -> int:
        """See the contract."""
        engine = engine_of(self._engine, self._sessions)
        if not isinstance(engine, Engine):
            raise ConfigurationError(
                "the inbox knows no ordinary engine to delete old rows with: SqlAlchemyInbox(…, engine='postgresql+psycopg://…')"
            )
        with engine.begin() as connection:
            return int(connection.execute(delete(self.table).where(self.table.c.created_at < before)).rowcount)

    @contextmanager
    def _opened(self) -> Iterator[Session]:
        """What is not committed at the end is rolled back."""
        session: Session = self._new_session()
        try:
            yield session
        finally:
            if is_scoped(self._sessions):
                self._sessions.remove()
            else:
                session.close()

    def _new_session(self) -> Any:
        session = self._sessions()
        if session.in_transaction():
            raise RuntimeError(
                "a task with inbox=True begins, and the scoped session is in a transaction: an earlier task in this thread has "
                "left it open (call sessions.remove() at its end), or this one is called inline within it"
            )
        return session

    @contextmanager
    def _given(self, session: object) -> Iterator[None]:
        token = _running.set((*_running.get(), (self, session)))
        try:
            yield
        finally:
            _running.reset(token)

    def _begin(self, session: Session, task_id: str, task: str) -> Kept | None:
        """Begin the transaction with the call's row. A row that is there already: what it keeps."""
        columns = self.table.c
        row = {"task_id": task_id, "task": task, "created_at": datetime.now(timezone.utc), "body": b""}
        try:
            session.begin()
            session.execute(insert(self.table), row)
        except IntegrityError:
            session.rollback()
            query = select(columns.content_type, columns.content_encoding, columns.body)
            return Kept(*session.execute(query.where(columns.task_id == task_id)).one())
        session.info[_BEGAN] = session.get_transaction()
        return None

    def _commit(self, session: Session, task_id: str, kept: Kept) -> None:
        if session.info.pop(_BEGAN, None) is not session.get_transaction():
            raise RuntimeError(
                "a task with inbox=True has ended the transaction of inbox.session by itself: leave the commit to the inbox, so "
                "that what the task did and that it did it are committed together"
            )
        if kept.content_type is not None:
            session.execute(update(self.table).where(self.table.c.task_id == task_id).values(kept._asdict()))
        session.commit()

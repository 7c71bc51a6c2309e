"""HistoryIndex: takes events in, in batches; searches; forgets what is too old or too much.

A batch and the position in the stream up to which it goes are one transaction, whose first statement moves the position from
where this process believes it to be. So a process that is killed loses nothing and doubles nothing, and of two that read the same
stream one is told that it was overtaken. The statement also locks the row: one batch at a time reads rows and changes them.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence, Set
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from amqtask.exceptions import OperationalError
from amqtask.ground.lazy import ByProcess
from amqtask.history.records import COLUMNS, KEY_BITS, Batch, TaskRow, WorkerRow, as_columns, key_at, searchable
from amqtask.history.tables import (
    ACTIONS,
    COUNTED,
    FAILED,
    MINUTES,
    POSITION,
    SEEN,
    STAMPS,
    TASKS,
    TEXTS,
    WORKERS,
    connect,
)
from amqtask.states import PENDING

if TYPE_CHECKING:
    from amqtask.ground.shapes import EventFields, JsonObject

T = TypeVar("T")
# Ids per SELECT, and rows per DELETE.
AT_ONCE, DELETED_AT_ONCE = 500, 5_000
# Tasks of a queue among which the oldest one that waits is looked for.
MOST_WAITING = 20_000
# After a deletion for size the index has so much of the size that it may have.
_KEEPS = 0.95
# Of PostgreSQL: rows by which a row's size is told, and what each has beside its columns (bytes).
MEASURED, _ROW_BYTES = 1_000, 28


class IndexUnreachable(OperationalError):
    """The index's database is away, or refuses."""


class Overtaken(OperationalError):
    """Another process has taken this part of the stream in."""


class Seen(NamedTuple):
    """Who marked a group of failures as seen and when, up to the failures of which moment (Unix times)."""

    who: str
    at: float
    until: float


class HistoryIndex:
    """See the module. Safe to share between threads; after a fork a process has connections of its own.

    Each method raises IndexUnreachable, and ConfigurationError for a URL that cannot be used."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._engines = ByProcess(lambda: connect(self._url), surplus=lambda engine: engine.dispose())

    @property
    def _engine(self) -> sa.Engine:
        try:
            return self._engines.get()
        except sa.exc.SQLAlchemyError as error:
            raise IndexUnreachable(f"the index of history cannot be opened: {_short(error)}") from error

    def close(self) -> None:
        """Close the connections; they open again when they are used again."""
        self._engines.get().dispose()

    def _read(self, look: Callable[[sa.Connection], T]) -> T:
        try:
            with self._engine.connect() as connection:
                return look(connection)
        except sa.exc.SQLAlchemyError as error:
            raise IndexUnreachable(f"the index of history cannot be read: {_short(error)}") from error

    def _write(self, change: Callable[[sa.Connection], T]) -> T:
        try:
            with self._engine.begin() as connection:
                return change(connection)
        except sa.exc.SQLAlchemyError as error:
            raise IndexUnreachable(f"the index of history cannot be written: {_short(error)}") from error

    def transact(self, change: Callable[[sa.Connection], T]) -> T:
        """Do something with tables of one's own that are in the index, too, in one transaction."""
        return self._write(change)

    # -- taking in

    def position(self) -> int | None:
        """The offset of the last message that is in the index; None: there is none."""
        value: int = self._read(lambda connection: connection.execute(sa.select(POSITION.c.position)).scalar_one())
        return None if value < 0 else value

    def take(self, events: Sequence[EventFields], *, before: int | None = None, now: int | None = None) -> Batch:
        """Take events in, and move the position from `before` to `now` (both None where there is none).

        Raises: Overtaken, and nothing is written."""
        return self._write(lambda connection: self._take(connection, events, _offset(before), _offset(now)))

    def _take(self, connection: sa.Connection, events: Sequence[EventFields], before: int, now: int) -> Batch:
        is_there = POSITION.c.position == before
        if not connection.execute(sa.update(POSITION).where(is_there).values(position=now)).rowcount:
            raise Overtaken("another process reads this history into the same index")
        names = {event["uuid"] for event in events if isinstance(event.get("uuid"), str)}
        stored = {row.id: row for row in self._rows(connection, list(names))}
        batch = Batch(dict(stored), {row.hostname: row for row in _workers(connection)})
        batch.add_all(events)
        self._write_tasks(connection, batch, stored.keys())
        self._write_minutes(connection, batch)
        heard = [row for row in batch.workers.values() if row.last_at]
        _replace(
            connection, WORKERS, "hostname", [_worker_columns(row) for row in heard] if _has_worker(events) else []
        )
        return batch

    def _rows(self, connection: sa.Connection, ids: Sequence[str]) -> Iterator[TaskRow]:
        for start in range(0, len(ids), AT_ONCE):
            statement = sa.select(*(TASKS.c[name] for name in COLUMNS)).where(
                TASKS.c.id.in_(ids[start : start + AT_ONCE])
            )
            for values in connection.execute(statement):
                yield TaskRow(*values)

    def _write_tasks(self, connection: sa.Connection, batch: Batch, stored_ids: Set[str]) -> None:
        rows = [batch.tasks[task_id] for task_id in batch.touched]
        old = [row for row in rows if row.id in stored_ids]
        new = [row for row in rows if row.id not in stored_ids]
        if new:
            _make_keys_unique(connection, new)
            connection.execute(sa.insert(TASKS), [as_columns(row) for row in sorted(new, key=lambda row: row.key)])
        if old:
            changed: dict[str, sa.BindParameter[object]] = {
                name: sa.bindparam(f"new_{name}") for name in COLUMNS if name not in ("id", "key")
            }
            statement = sa.update(TASKS).where(TASKS.c.key == sa.bindparam("new_key")).values(changed)
            connection.execute(statement, [{f"new_{n}": v for n, v in as_columns(row).items()} for row in old])
        texts = [batch.tasks[task_id] for task_id in batch.texts]
        form = str if connection.dialect.name == "sqlite" else _spaced
        _replace(
            connection,
            TEXTS,
            "rowid",
            [{"rowid": row.key, "body": form(body)} for row in texts if (body := searchable(row))],
        )
        stamps = [stamp for row in rows if row.stamps for stamp in _stamps(row)]
        if stamps:
            connection.execute(_ignoring(connection, STAMPS), stamps)

    def _write_minutes(self, connection: sa.Connection, batch: Batch) -> None:
        if not batch.minutes:
            return
        statement = sa.select(MINUTES).where(MINUTES.c.minute.in_(list(batch.minutes)))
        for row in connection.execute(statement).mappings():
            batch.minutes[row["minute"]].update({name: row[name] for name in COUNTED})
        rows = [
            {"minute": minute, **{name: numbers[name] for name in COUNTED}} for minute, numbers in batch.minutes.items()
        ]
        _replace(connection, MINUTES, "minute", rows)

    # -- forgetting

    def forget(self, *, max_age: float, max_bytes: int, now: float | None = None) -> int:
        """Delete tasks that are older than `max_age` seconds, and the oldest while the index has more than `max_bytes`.

        Each portion is a transaction of its own, so that nothing waits for long. Returns how many tasks that were."""
        total = self._forget_before(key_at((time.time() if now is None else now) - max_age))
        size = self.size()
        if size > max_bytes:
            limit = self._read(lambda connection: _key_at_share(connection, 1 - _KEEPS * max_bytes / size))
            total += self._forget_before(limit) if limit is not None else 0
        return total

    def _forget_before(self, key: int) -> int:
        total = 0
        while True:
            deleted = self._write(lambda connection: _delete_before(connection, key))
            total += deleted
            if deleted < DELETED_AT_ONCE:
                break
        minute = (key >> 10) // 60_000_000
        self._write(lambda connection: connection.execute(sa.delete(MINUTES).where(MINUTES.c.minute < minute)))
        self._write(lambda connection: connection.execute(sa.delete(WORKERS).where(WORKERS.c.last_at < minute * 60)))
        self._write(lambda connection: connection.execute(sa.delete(SEEN).where(SEEN.c.until < minute * 60)))
        return total

    def size(self) -> int:
        """Bytes that the index has on disk, without what a deletion left free; of PostgreSQL about."""
        if self._engine.dialect.name == "sqlite":
            text = (
                "SELECT (a.page_count - b.freelist_count) * c.page_size "
                "FROM pragma_page_count a, pragma_freelist_count b, pragma_page_size c"
            )
        else:
            # A deletion gives nothing back to the disk, and what it left is filled again: what counts is what rows need.
            total = " + ".join(f"pg_total_relation_size('{table.name}')" for table in (TASKS, STAMPS, TEXTS))
            rows = f"(SELECT * FROM {TASKS.name} ORDER BY key DESC LIMIT {MEASURED})"
            row_bytes = f"(SELECT coalesce(avg(pg_column_size(rows.*)), 0) + {_ROW_BYTES} FROM {rows} AS rows)"
            used = f"(SELECT count(*) FROM {TASKS.name}) * {row_bytes} / greatest(pg_relation_size('{TASKS.name}'), 1)"
            text = f"SELECT ({total}) * least(1, {used})"
        return int(self._read(lambda connection: connection.execute(sa.text(text)).scalar_one()))

    # -- searching

    def select(
        self,
        conditions: Sequence[sa.ColumnElement[bool]],
        *,
        words: str | None,
        marks: Sequence[str] = (),
        stamp: tuple[str, str] | None,
        limit: int,
    ) -> list[TaskRow]:
        """The newest tasks for which all of these hold; `marks` are those of `records.mark`, which words are looked for with."""
        source, conditions = self._source(conditions, words, marks, stamp)
        # With words the rows come by their key from the words' index.
        order = TASKS.c.key if words is None else TEXTS.c.rowid
        rows = sa.select(*(TASKS.c[name] for name in COLUMNS)).select_from(source).where(*conditions)
        statement = rows.order_by(order.desc()).limit(limit)
        return self._read(lambda connection: [TaskRow(*values) for values in connection.execute(statement)])

    def count_states(
        self,
        conditions: Sequence[sa.ColumnElement[bool]],
        *,
        words: str | None,
        marks: Sequence[str] = (),
        stamp: tuple[str, str] | None,
    ) -> dict[str, int]:
        """How many tasks there are for which all of these hold, by state; see `select`."""
        source, conditions = self._source(conditions, words, marks, stamp)
        statement = (
            sa.select(TASKS.c.state, sa.func.count())
            .select_from(source)
            .where(*conditions)
            .group_by(TASKS.c.state)
            .order_by(sa.func.count().desc())
        )
        return self._read(lambda connection: {row[0]: row[1] for row in connection.execute(statement)})

    def _source(
        self,
        conditions: Sequence[sa.ColumnElement[bool]],
        words: str | None,
        marks: Sequence[str],
        stamp: tuple[str, str] | None,
    ) -> tuple[sa.FromClause, list[sa.ColumnElement[bool]]]:
        """What a search reads from, and all of its conditions."""
        source: sa.FromClause = TASKS
        conditions = list(conditions)
        if words is not None:
            source = TEXTS.join(TASKS, TASKS.c.key == TEXTS.c.rowid)
            conditions.append(self._matches(words, marks))
        if stamp is not None:
            source = source.join(STAMPS, STAMPS.c.key == TASKS.c.key)
            conditions += [STAMPS.c.name == stamp[0], STAMPS.c.value == stamp[1]]
        return source, conditions

    def _matches(self, words: str, marks: Sequence[str]) -> sa.ColumnElement[bool]:
        if self._engine.dialect.name == "sqlite":
            return sa.literal_column("amqtask_history_texts").bool_op("MATCH")(
                " ".join([*marks, *map(_quoted, words.split())])
            )
        query = " & ".join([*marks, *filter(None, map(_lexemes, words.split()))])
        return sa.func.to_tsvector("simple", TEXTS.c.body).bool_op("@@")(sa.func.to_tsquery("simple", query))

    def group_failures(
        self, conditions: Sequence[sa.ColumnElement[bool]], limit: int
    ) -> list[tuple[str, str, int, int, int]]:
        """(task, error, how many, key of the first and of the last) of failures, the most first."""
        c = TASKS.c
        count = sa.func.count()
        statement = (
            sa.select(c.name, c.error, count, sa.func.min(c.key), sa.func.max(c.key))
            .where(FAILED, *conditions)
            .group_by(c.name, c.error)
            .order_by(count.desc())
            .limit(limit)
        )
        return self._read(lambda connection: [tuple(row) for row in connection.execute(statement)])

    def by_keys(self, keys: Sequence[int]) -> list[TaskRow]:
        """These tasks."""
        statement = sa.select(*(TASKS.c[name] for name in COLUMNS)).where(TASKS.c.key.in_(keys))
        return self._read(lambda connection: [TaskRow(*values) for values in connection.execute(statement)])

    def by_ids(self, ids: Sequence[str]) -> list[TaskRow]:
        """These tasks, as far as they are there."""
        return self._read(lambda connection: list(self._rows(connection, ids)))

    def minutes(self, since: int) -> list[JsonObject]:
        """The numbers of each minute from this one on (Unix time by 60); minutes in which nothing happened are left out."""
        statement = sa.select(MINUTES).where(MINUTES.c.minute >= since).order_by(MINUTES.c.minute)
        return self._read(lambda connection: [dict(row) for row in connection.execute(statement).mappings()])

    def seen(self) -> dict[tuple[str, str], Seen]:
        """(task, error) of the groups that were marked as seen."""
        columns = (SEEN.c.name, SEEN.c.error, SEEN.c.who, SEEN.c.at, SEEN.c.until)
        return self._read(
            lambda connection: {
                (name, error): Seen(user, at, until)
                for name, error, user, at, until in connection.execute(sa.select(*columns))
            }
        )

    def mark_seen(self, name: str, error: str, user: str, last: int) -> None:
        """Mark the group's failures of tasks up to this key as seen."""
        last_failed = sa.select(sa.func.max(TASKS.c.state_at)).where(*_group(name, error), TASKS.c.key <= last)

        def mark(connection: sa.Connection) -> None:
            until = connection.execute(last_failed).scalar()
            connection.execute(sa.delete(SEEN).where(SEEN.c.name == name, SEEN.c.error == error))
            if until is not None:
                values = {"name": name, "error": error, "until": until, "at": time.time(), "who": user}
                connection.execute(sa.insert(SEEN).values(values))

        self._write(mark)

    def count_failures(
        self, name: str | None, error: str | None, after: float, conditions: Sequence[sa.ColumnElement[bool]]
    ) -> int:
        """How many of the group failed after that moment (Unix time)."""
        statement = (
            sa.select(sa.func.count())
            .select_from(TASKS)
            .where(*_group(name or "", error or ""), TASKS.c.state_at > after, *conditions)
        )
        return int(self._read(lambda connection: connection.execute(statement).scalar_one()))

    def oldest_waiting(self, queue: str) -> float | None:
        """When the oldest task that waits in a queue was sent, as far as events tell; None where none waits.

        One that was sent before another that a worker has received is in the queue no more: it was purged, or is delayed. Looks
        at the newest MOST_WAITING tasks of the queue only."""
        c = TASKS.c
        columns = (c.state, c.sent_at, c.eta, c.received_at)
        newest = sa.select(*columns).where(c.queue == queue).order_by(c.key.desc()).limit(MOST_WAITING).cte()
        passed = sa.select(sa.func.max(newest.c.sent_at)).where(newest.c.received_at.is_not(None)).scalar_subquery()
        statement = sa.select(sa.func.min(newest.c.sent_at)).where(
            newest.c.state == PENDING, newest.c.eta.is_(None), newest.c.sent_at > sa.func.coalesce(passed, 0.0)
        )
        moment: float | None = self._read(lambda connection: connection.execute(statement).scalar())
        return moment

    # -- what operators did

    def begin_action(self, user: str, action: str, subject: str) -> int:
        """Note what somebody is about to do; its number."""
        values = {"at": time.time(), "who": user, "action": action, "subject": subject}
        inserted = self._write(
            lambda connection: connection.execute(sa.insert(ACTIONS).values(values)).inserted_primary_key
        )
        return int(inserted[0]) if inserted else 0

    def same_action(self, number: int, seconds: float) -> str | None:
        """Who began the same at most so many seconds before, and was not refused; None: nobody."""
        mine, theirs = ACTIONS, ACTIONS.alias("theirs")
        statement = (
            sa.select(theirs.c.who)
            .where(
                mine.c.id == number,
                theirs.c.id < mine.c.id,
                theirs.c.at > mine.c.at - seconds,
                theirs.c.action == mine.c.action,
                theirs.c.subject == mine.c.subject,
                sa.func.coalesce(theirs.c.outcome, "").not_like("refused:%"),
            )
            .limit(1)
        )
        user: str | None = self._read(lambda connection: connection.execute(statement).scalar())
        return user

    def end_action(self, number: int, outcome: str) -> None:
        """Note what came of it."""
        statement = sa.update(ACTIONS).where(ACTIONS.c.id == number).values(outcome=outcome)
        self._write(lambda connection: connection.execute(statement))

    def actions(self, limit: int) -> list[JsonObject]:
        """What was done last, the newest first."""
        statement = sa.select(ACTIONS).order_by(ACTIONS.c.id.desc()).limit(limit)
        return self._read(lambda connection: [dict(row) for row in connection.execute(statement).mappings()])

    def newest(self) -> tuple[int, float]:
        """What changes whenever something is taken in: the newest task's key, and the time of the last event of a worker."""
        keys = sa.select(sa.func.max(TASKS.c.key)).scalar_subquery()
        ends = sa.select(sa.func.max(MINUTES.c.minute)).scalar_subquery()
        total = sa.select(
            sa.func.sum(MINUTES.c.succeeded + MINUTES.c.failed + MINUTES.c.retried + MINUTES.c.sent)
        ).where(MINUTES.c.minute == ends)
        return self._read(
            lambda connection: (
                connection.execute(sa.select(keys)).scalar() or 0,
                float(connection.execute(total).scalar() or 0),
            )
        )

    def workers(self) -> list[WorkerRow]:
        """All workers that are remembered."""
        return self._read(_workers)


def _group(name: str, error: str) -> tuple[sa.ColumnElement[bool], ...]:
    """The failures of a task with an error; "" is what no event has told."""
    pairs = ((TASKS.c.name, name), (TASKS.c.error, error))
    return FAILED, *(column == value if value else column.is_(None) for column, value in pairs)


def _make_keys_unique(connection: sa.Connection, rows: Sequence[TaskRow]) -> None:
    """Give new rows keys that no other row has: a burst of calls is sent at one moment. A row moves by some microseconds."""
    taken: set[int] = set()
    waiting = list(rows)
    while waiting:
        keys = [row.key for row in waiting]
        for start in range(0, len(keys), AT_ONCE):
            statement = sa.select(TASKS.c.key).where(TASKS.c.key.in_(keys[start : start + AT_ONCE]))
            taken.update(connection.execute(statement).scalars())
        colliding = []
        for row in waiting:
            if row.key in taken:
                row.key += random.randint(1, 1 << (KEY_BITS + 2))
                colliding.append(row)
            else:
                taken.add(row.key)
        waiting = colliding


def _workers(connection: sa.Connection) -> list[WorkerRow]:
    return [WorkerRow(*values) for values in connection.execute(sa.select(WORKERS).order_by(WORKERS.c.hostname))]


def _has_worker(events: Sequence[EventFields]) -> bool:
    return any(str(event.get("type")).startswith("worker-") for event in events)


def _worker_columns(row: WorkerRow) -> JsonObject:
    return {column.name: getattr(row, column.name) for column in WORKERS.columns}


def _stamps(row: TaskRow) -> Iterator[JsonObject]:
    for name, values in json.loads(row.stamps or "{}").items():
        for value in dict.fromkeys(values):
            yield {"name": name, "value": value, "key": row.key}


def _replace(connection: sa.Connection, table: sa.Table, key: str, rows: Sequence[JsonObject]) -> None:
    """Write rows in place of those with the same key. (FTS5 knows no ON CONFLICT.)"""
    if rows:
        connection.execute(
            sa.delete(table).where(table.c[key] == sa.bindparam("old")), [{"old": row[key]} for row in rows]
        )
        connection.execute(sa.insert(table), list(rows))


def _ignoring(connection: sa.Connection, table: sa.Table) -> sa.Insert:
    """An INSERT that leaves out rows that are there."""
    statement = sa.insert(table)
    if connection.dialect.name == "sqlite":
        return statement.prefix_with("OR IGNORE")
    return postgresql.insert(table).on_conflict_do_nothing()


def _delete_before(connection: sa.Connection, key: int) -> int:
    """Delete a portion of what is older; how many tasks that were."""
    portion = sa.select(TASKS.c.key).where(TASKS.c.key < key).order_by(TASKS.c.key).limit(DELETED_AT_ONCE)
    keys = list(connection.execute(portion).scalars())
    if keys:
        last = keys[-1]
        connection.execute(sa.delete(TASKS).where(TASKS.c.key <= last))
        connection.execute(sa.delete(STAMPS).where(STAMPS.c.key <= last))
        connection.execute(sa.delete(TEXTS).where(TEXTS.c.rowid <= last))
    return len(keys)


def _key_at_share(connection: sa.Connection, share: float) -> int | None:
    """The key of which this share of all tasks is older."""
    count: int = connection.execute(sa.select(sa.func.count()).select_from(TASKS)).scalar_one()
    place = sa.select(TASKS.c.key).order_by(TASKS.c.key).offset(int(count * share)).limit(1)
    key: int | None = connection.execute(place).scalar_one_or_none()
    return key


def _quoted(term: str) -> str:
    """A term as FTS5 takes it, without its own signs; a star at its end is any end."""
    text, star = (term[:-1], "*") if term.endswith("*") and len(term) > 1 else (term, "")
    return '"' + text.replace('"', '""') + f'"{star}'


_NO_WORD = re.compile(r"[\W_]+")


def _spaced(text: str) -> str:
    """A text for PostgreSQL, whose parser knows addresses, paths and numbers with signs, and finds no word within them."""
    return _NO_WORD.sub(" ", text)


def _lexemes(term: str) -> str:
    """A term for PostgreSQL's to_tsquery: its words, one after the other."""
    words = " <-> ".join(_spaced(term).split())
    return words + (":*" if words and term.endswith("*") else "")


def _offset(position: int | None) -> int:
    return -1 if position is None else position


def _short(error: Exception) -> str:
    return str(error.__cause__ or error).partition("\n")[0]

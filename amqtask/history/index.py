"""HistoryIndex: takes events in, in batches; searches (`search`); forgets what is too old or too much.

A batch and the position in the stream up to which it goes are one transaction, whose first statement moves the position from
where this process believes it to be. So a process that is killed loses nothing and doubles nothing, and of two that read the same
stream one is told that it was overtaken. The statement also locks the row: one batch at a time reads rows and changes them.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import sqlalchemy as sa

from amqtask.exceptions import AmqTaskError, OperationalError
from amqtask.ground.lazy import ByProcess
from amqtask.history import search
from amqtask.history.records import (
    COLUMNS,
    KEY_BITS,
    LONG,
    Batch,
    TaskRow,
    WorkerRow,
    as_columns,
    key_at,
    searchable,
    short,
    text,
)
from amqtask.history.search import LISTED, Columns, Question, newest, spaced
from amqtask.history.tables import (
    ACTIONS,
    ASIDE,
    COUNTED,
    FAILED,
    MINUTES,
    POSITION,
    SEEN,
    STAMPS,
    TASKS,
    TEXTS,
    WORKERS,
    among,
    change,
    check,
    connect,
    delete,
    in_time,
    insert,
    insertion_of_new,
    is_about_values,
    is_too_slow,
)
from amqtask.states import PENDING

if TYPE_CHECKING:
    from amqtask.ground.shapes import EventFields, JsonObject

T = TypeVar("T")
# Ids per SELECT, and tasks per deletion: nothing is taken in meanwhile.
AT_ONCE, DELETED_AT_ONCE = 500, 1_000
# Of what is set aside: characters of each, and how many there are at most.
LONGEST_ASIDE, MOST_ASIDE = 100_000, 10_000
# After a deletion for size the index has so much of the size that it may have.
_KEEPS = 0.95
_STATES = [TASKS.c.key, TASKS.c.state]
# Of PostgreSQL: rows by which a row's size is told, and what each has beside its columns (bytes).
MEASURED, _ROW_BYTES = 1_000, 28


class IndexUnreachable(OperationalError):
    """The index's database is away, or refuses."""


class TooSlow(IndexUnreachable):
    """A search takes too long."""


class NotTaken(AmqTaskError):
    """The index's database takes no such values."""


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

    def check(self) -> None:
        """Look whether the database is there; nothing is made in it."""
        try:
            check(self._url)
        except sa.exc.SQLAlchemyError as error:
            raise IndexUnreachable(f"the index of history cannot be opened: {_short(error)}") from error

    def close(self) -> None:
        """Close the connections; they open again when they are used again."""
        engine = self._engines.pop()
        if engine is not None:
            engine.dispose()

    def _read(self, look: Callable[[sa.Connection], T], seconds: float | None = None) -> T:
        seconds = search.LONGEST_LOOK if seconds is None else seconds
        try:
            with self._engine.connect() as connection, in_time(connection, seconds):
                return look(connection)
        except sa.exc.SQLAlchemyError as error:
            if is_too_slow(error):
                raise TooSlow(
                    f"a search of history is given up after {seconds:g} s: ask for less (a time, a task, a queue)"
                ) from error
            raise IndexUnreachable(f"the index of history cannot be read: {_short(error)}") from error

    def _write(self, change: Callable[[sa.Connection], T]) -> T:
        try:
            with self._engine.begin() as connection:
                return change(connection)
        except sa.exc.SQLAlchemyError as error:
            if is_about_values(error):
                raise NotTaken(f"the index of history does not take this: {_short(error)}") from error
            raise IndexUnreachable(f"the index of history cannot be written: {_short(error)}") from error

    def transact(self, change: Callable[[sa.Connection], T]) -> T:
        """Do something with tables of one's own that are in the index, too, in one transaction."""
        return self._write(change)

    # -- taking in

    def position(self) -> int | None:
        """The offset of the last message that is in the index; None: there is none."""
        value: int = self._read(lambda connection: connection.execute(sa.select(POSITION.c.position)).scalar_one())
        return None if value < 0 else value

    def take(
        self,
        events: Sequence[EventFields],
        *,
        before: int | None = None,
        now: int | None = None,
        is_fresh: bool = False,
    ) -> Batch:
        """Take events in, and move the position from `before` to `now` (both None where there is none). They are fresh when they
        have just come.

        Raises: Overtaken, NotTaken, and nothing is written."""
        return self._write(lambda connection: self._take(connection, events, _offset(before), _offset(now), is_fresh))

    def _take(
        self, connection: sa.Connection, events: Sequence[EventFields], before: int, now: int, is_fresh: bool
    ) -> Batch:
        is_there = POSITION.c.position == before
        if not connection.execute(sa.update(POSITION).where(is_there).values(position=now)).rowcount:
            raise Overtaken("another process reads this history into the same index")
        # As they are kept: an id that was too long, or a number, is found again.
        ids = [task_id for task_id in {short(event.get("uuid")) for event in events} if task_id]
        stored = {row.id: row for row in self._rows(connection, ids)}
        batch = Batch(dict(stored), {row.hostname: row for row in _workers(connection)}, is_fresh=is_fresh)
        batch.add_all(events)
        self._write_tasks(connection, batch, stored.keys())
        self._write_minutes(connection, batch)
        if batch.touched:
            connection.execute(sa.update(POSITION).values(changes=POSITION.c.changes + 1))
        heard = [row for row in batch.workers.values() if row.last_at]
        _replace(
            connection, WORKERS, "hostname", [_worker_columns(row) for row in heard] if _has_worker(events) else []
        )
        return batch

    def _rows(self, connection: sa.Connection, ids: Sequence[str]) -> Iterator[TaskRow]:
        for start in range(0, len(ids), AT_ONCE):
            those = among(connection, TASKS.c.id, ids[start : start + AT_ONCE])
            statement = sa.select(*(TASKS.c[name] for name in COLUMNS)).where(those)
            for values in connection.execute(statement):
                yield TaskRow(*values)

    def _write_tasks(self, connection: sa.Connection, batch: Batch, stored_ids: Set[str]) -> None:
        rows = [batch.tasks[task_id] for task_id in batch.touched]
        old = [as_columns(row) for row in rows if row.id in stored_ids]
        new = [row for row in rows if row.id not in stored_ids]
        _make_keys_unique(connection, new)
        change(connection, TASKS, "key", old)
        insert(connection, TASKS, [as_columns(row) for row in sorted(new, key=lambda row: row.key)])
        texts = [batch.tasks[task_id] for task_id in batch.texts]
        form = str if connection.dialect.name == "sqlite" else spaced
        delete(connection, TEXTS, "rowid", [row.key for row in texts if row.id in stored_ids])
        insert(
            connection,
            TEXTS,
            [{"rowid": row.key, "body": form(body)} for row in texts if (body := searchable(row))],
        )
        stamps = [stamp for row in rows if row.stamps for stamp in _stamps(row)]
        if stamps:
            connection.execute(insertion_of_new(connection, STAMPS), stamps)

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

    def set_aside(self, body: str, reason: str) -> None:
        """Keep what cannot be taken in, with the reason; of many the newest MOST_ASIDE."""
        values = {"at": time.time(), "reason": text(reason, LONG), "body": text(body, LONGEST_ASIDE)}

        def keep(connection: sa.Connection) -> None:
            inserted = connection.execute(sa.insert(ASIDE).values(values)).inserted_primary_key
            connection.execute(sa.delete(ASIDE).where(ASIDE.c.id <= (inserted[0] if inserted else 0) - MOST_ASIDE))

        self._write(keep)

    def aside(self, limit: int) -> list[JsonObject]:
        """What was set aside last, the newest first."""
        statement = sa.select(ASIDE).order_by(ASIDE.c.id.desc()).limit(limit)
        return self._read(lambda connection: [dict(row) for row in connection.execute(statement).mappings()])

    # -- forgetting

    def outdated(self, *, max_age: float, max_bytes: int, now: float | None = None) -> int:
        """The key before which tasks are older than `max_age` seconds, or too many for `max_bytes`: what to `forget`."""
        limit = key_at((time.time() if now is None else now) - max_age)
        size = self.size()
        if size > max_bytes:
            share = 1 - _KEEPS * max_bytes / size
            limit = max(limit, self._read(lambda connection: _key_at_share(connection, share)) or 0)
        return limit

    def forget(self, before: int) -> int:
        """Delete the oldest tasks before this key, DELETED_AT_ONCE of them at most. How many: fewer where those are all."""
        deleted = self._write(lambda connection: _delete_before(connection, before))
        if deleted < DELETED_AT_ONCE:
            self._write(lambda connection: _delete_numbers(connection, (before >> KEY_BITS) // 60_000_000))
        return deleted

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

    def select(self, *questions: Question, limit: int, seconds: float | None = None) -> list[TaskRow]:
        """The newest tasks that one of these questions is about. Raises: TooSlow."""
        return [TaskRow(*values) for values in self._newest(questions, LISTED, limit, seconds)]

    def _newest(
        self, questions: Sequence[Question], columns: Columns, limit: int, seconds: float | None
    ) -> Sequence[Sequence[Any]]:
        if not questions:
            return []
        return self._read(
            lambda connection: connection.execute(newest(connection, questions, columns, limit)).all(), seconds
        )

    def look(self, *questions: Question, limit: int) -> tuple[list[TaskRow], int | None]:
        """`select` for who does not want to wait: the newest of these tasks that are found soon, and the key down to which was
        looked for them; None: there are no others, or as many as are wanted."""
        rows, bottom = self._look(questions, LISTED, limit)
        return [TaskRow(*values) for values in rows], bottom

    def _look(
        self, questions: Sequence[Question], columns: Columns, limit: int
    ) -> tuple[Sequence[Sequence[Any]], int | None]:
        if not questions:
            return [], None
        end = time.monotonic() + search.LOOK_SECONDS
        if search.can_be_stopped(self._engine, questions):
            try:
                return self._newest(questions, columns, limit, search.LOOK_SECONDS / 2), None
            except TooSlow:
                pass
        return self._read(lambda connection: search.look(connection, questions, columns, limit, end))

    def count_states(self, *questions: Question) -> dict[str, int]:
        """How many tasks these questions are about, by state."""
        if not questions:
            return {}
        count = sa.func.count()

        def ask(connection: sa.Connection) -> dict[str, int]:
            rows = newest(connection, questions, _STATES, None).subquery()
            statement = sa.select(rows.c.state, count).group_by(rows.c.state).order_by(count.desc())
            return {row[0]: row[1] for row in connection.execute(statement)}

        return self._read(ask)

    def count_newest(self, *questions: Question, most: int) -> tuple[dict[str, int], int | None]:
        """`count_states` for who does not want to wait: of the newest `most` and one, as far as they are found soon, and the key
        down to which was looked; None: there are no others, or as many as are wanted."""
        rows, bottom = self._look(questions, _STATES, most + 1)
        return dict(Counter(state for _, state in rows).most_common()), bottom

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
        statement = sa.select(*LISTED).where(TASKS.c.key.in_(keys))
        return self._read(lambda connection: [TaskRow(*values) for values in connection.execute(statement)])

    def by_ids(self, ids: Sequence[str]) -> list[TaskRow]:
        """These tasks, as far as they are there."""
        return self._read(lambda connection: list(self._rows(connection, ids)))

    def minutes(self, since: int, every: int = 1) -> Sequence[sa.Row[Any]]:
        """The numbers of each minute from this one on (Unix time by 60), or of so many together: the first one, and COUNTED.
        Those in which nothing happened are left out."""
        first = MINUTES.c.minute - MINUTES.c.minute % sa.literal_column(str(every))
        sums = [sa.cast(sa.func.sum(MINUTES.c[name]), sa.BigInteger) for name in COUNTED]
        statement = sa.select(first, *sums).where(MINUTES.c.minute >= since).group_by(first).order_by(first)
        return self._read(lambda connection: connection.execute(statement).all())

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

        One that was sent before another that a worker has received is in the queue no more: it was purged, or is delayed."""
        c = TASKS.c
        waiting = (c.queue == queue, c.state == PENDING)
        is_there = sa.select(c.key).where(*waiting).order_by(c.key.desc()).limit(1)
        was_sent = (c.queue == queue, c.state != PENDING, c.sent_at.is_not(None))
        passed = sa.select(c.sent_at).where(*was_sent).order_by(c.key.desc()).limit(1)

        def look(connection: sa.Connection) -> float | None:
            if connection.execute(is_there).first() is None:
                return None
            # Nothing but its sending is known of a task that waits, so its key is of that moment.
            after: float = connection.execute(passed).scalar() or 0.0
            begin = (c.key >= key_at(after), c.sent_at > after, c.eta.is_(None))
            moment: float | None = connection.execute(
                sa.select(c.sent_at).where(*waiting, *begin).order_by(c.key).limit(1)
            ).scalar()
            return moment

        return self._read(look)

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

    def newest(self) -> int:
        """The newest task's key."""
        keys = sa.select(sa.func.max(TASKS.c.key))
        return int(self._read(lambda connection: connection.execute(keys).scalar() or 0))

    def changes(self) -> int:
        """What changes whenever something is taken in of a task. (The newest times need not: a clock may have been ahead.)"""
        return int(self._read(lambda connection: connection.execute(sa.select(POSITION.c.changes)).scalar_one()))

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
            statement = sa.select(TASKS.c.key).where(among(connection, TASKS.c.key, keys[start : start + AT_ONCE]))
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
    delete(connection, table, key, [row[key] for row in rows])
    insert(connection, table, rows)


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


def _delete_numbers(connection: sa.Connection, minute: int) -> None:
    """Delete what is known of earlier minutes, of workers that were not heard of since then; what was seen, or set aside."""
    connection.execute(sa.delete(MINUTES).where(MINUTES.c.minute < minute))
    connection.execute(sa.delete(WORKERS).where(WORKERS.c.last_at < minute * 60, WORKERS.c.heard_at < minute * 60))
    connection.execute(sa.delete(SEEN).where(SEEN.c.until < minute * 60))
    connection.execute(sa.delete(ASIDE).where(ASIDE.c.at < minute * 60))


def _key_at_share(connection: sa.Connection, share: float) -> int | None:
    """The key of which this share of all tasks is older."""
    count: int = connection.execute(sa.select(sa.func.count()).select_from(TASKS)).scalar_one()
    place = sa.select(TASKS.c.key).order_by(TASKS.c.key).offset(int(count * share)).limit(1)
    key: int | None = connection.execute(place).scalar_one_or_none()
    return key


def _offset(position: int | None) -> int:
    return -1 if position is None else position


def _short(error: Exception) -> str:
    return str(error.__cause__ or error).partition("\n")[0]

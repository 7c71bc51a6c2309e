"""What a search asks, as SQL: which index is walked, from the newest task on, and how far within a given time."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sqlalchemy as sa

from amqtask.history.records import COLUMNS, key_at
from amqtask.history.tables import (
    FAILED,
    MINUTES,
    NO_INDEX,
    OF_STATE,
    STAMPS,
    TASKS,
    TEXTS,
    in_time,
    index_for,
    is_too_slow,
)
from amqtask.states import FAILURE

# Seconds that a look may take, about: see `look`; that a search may take: others wait for its connection.
LOOK_SECONDS, LONGEST_LOOK = 0.2, 10.0
# Tasks that are looked at first, and so many times as many each time after that.
_FIRST, _TIMES = 4_000, 4
# Minutes that are read at once.
_MINUTES = 500
# Rows that are few enough to look at each of them; texts that PostgreSQL sorts, rather than looking through all.
_FEW, _FEW_TEXTS = 1_000, 5_000
# What lists have of a task: all but its message, of which they have that there is one.
LISTED = [
    sa.case((TASKS.c.message.is_not(None), "null")).label("message") if name == "message" else TASKS.c[name]
    for name in COLUMNS
]
Columns = Sequence[sa.ColumnElement[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a search asks for: tasks for which all of this holds.

    `equal` are columns and their values. `since` and `until` are keys, the first of them is meant, too; `marks` are those of
    `records.mark`, which words are looked for with; `stamp` is a name and a value."""

    equal: Mapping[str, str] = field(default_factory=dict)
    conditions: Sequence[sa.ColumnElement[bool]] = ()
    words: str | None = None
    marks: Sequence[str] = ()
    stamp: tuple[str, str] | None = None
    since: int | None = None
    until: int | None = None


def newest(
    connection: sa.Connection, questions: Sequence[Question], columns: Columns, limit: int | None
) -> sa.Select[Any]:
    """Rows, the newest first. Each question walks an index of its own, no further than to the last row that is wanted."""
    statements = [_newest_of(connection, question, columns).limit(limit) for question in questions]
    if len(statements) == 1:
        return statements[0]
    rows = sa.union_all(*(sa.select(statement.subquery()) for statement in statements)).subquery()
    return sa.select(rows).order_by(rows.c.key.desc()).limit(limit)


def can_be_stopped(engine: sa.Engine, questions: Sequence[Question]) -> bool:
    """Whether a search for this ends at its time: SQLite compares the places of words without a look at the clock."""
    return not _is_sqlite(engine) or all(question.words is None for question in questions)


def look(
    connection: sa.Connection, questions: Sequence[Question], columns: Columns, limit: int, end: float
) -> tuple[list[tuple[Any, ...]], int | None]:
    """The newest rows that can be found until `end` (monotonic time), about, and the key down to which was looked; None: there
    are no others, or as many as are wanted.

    Looks at some of the newest tasks, then at several times as many before those, as long as there is time for it."""
    top = min((question.until for question in questions if question.until is not None), default=None)
    since = min(question.since or 0 for question in questions)
    rows: list[tuple[Any, ...]] = []
    is_first = True
    for bottom in _borders(connection, top):
        began = time.monotonic()
        try:
            # So that there is something to go on from.
            with in_time(connection, LONGEST_LOOK if is_first else end - began):
                within = [_within(question, bottom, top) for question in questions]
                rows += map(tuple, connection.execute(newest(connection, within, columns, limit - len(rows))))
        except sa.exc.DBAPIError as error:
            if is_first or not is_too_slow(error):
                raise
            return rows, top
        if len(rows) >= limit or bottom <= since:
            return rows, None
        is_first, top, now = False, bottom, time.monotonic()
        if now + (_TIMES + 1) * (now - began) > end:
            return rows, top
    return rows, None


def _within(question: Question, bottom: int, top: int | None) -> Question:
    return replace(question, since=max(bottom, question.since or 0), until=top)


def _borders(connection: sa.Connection, top: int | None) -> Iterator[int]:
    """Keys, each with about _TIMES as many tasks from there to the one before as there were before that; at last 0."""
    count, wanted = 0, _FIRST
    for minute, number in _minutes(connection, None if top is None else top // key_at(60.0)):
        before = number
        while count + before >= wanted:
            # Also within a minute: a burst has very many.
            before -= wanted - count
            bottom, count = key_at(60 * (minute + before / number)), 0
            if top is None or bottom < top:
                wanted *= _TIMES
                yield bottom
        count += before
    yield 0


def _minutes(connection: sa.Connection, last: int | None) -> Iterator[tuple[int, int]]:
    """The minutes up to the last one, the newest first, and about how many tasks each has."""
    c = MINUTES.c
    columns = (c.minute, c.sent, c.started, c.succeeded + c.failed + c.revoked)
    statement = sa.select(*columns).order_by(c.minute.desc()).limit(_MINUTES)
    condition = c.minute <= last if last is not None else sa.true()
    while rows := connection.execute(statement.where(condition)).all():
        for minute, *numbers in rows:
            yield minute, max(numbers)
        condition = c.minute < rows[-1][0]


def _newest_of(connection: sa.Connection, question: Question, columns: Columns) -> sa.Select[Any]:
    # The first of these is walked, and what is found there is looked up in the others; tasks, which are large, come last.
    is_sqlite = _is_sqlite(connection)
    keys = [TASKS.c.key]
    conditions = list(question.conditions)
    if question.stamp is not None:
        keys.insert(0, STAMPS.c.key)
        stamped = (STAMPS.c.name == question.stamp[0], STAMPS.c.value == question.stamp[1])
        conditions += stamped
    if question.words is not None:
        matching = _matches(question.words, question.marks, is_sqlite=is_sqlite)
        conditions.append(matching)
        if question.stamp is not None and is_sqlite and _are_few(connection, sa.select(STAMPS.c.key).where(*stamped)):
            keys.insert(1, TEXTS.c.rowid)
        else:
            keys.insert(0, TEXTS.c.rowid)
    key = keys[0]
    source: sa.FromClause = key.table
    for other in keys[1:]:
        # SQLite looks each text up, and does not begin with those: by no sum it can find a stamp.
        is_looked_up = other is TEXTS.c.rowid
        source = source.join(other.table, other == (key + 0 if is_looked_up else key))
    order: sa.ColumnElement[int] = key
    if question.words is not None and "*" in question.words and not is_sqlite and _are_few_texts(connection, matching):
        order = key + 0  # so that PostgreSQL sorts those few
    for name, value in question.equal.items():
        conditions.append(FAILED if (name, value) == ("state", FAILURE) else TASKS.c[name] == value)
    if question.since is not None:
        conditions.append(key >= question.since)
    if question.until is not None:
        conditions.append(key < question.until)
    rows = sa.select(*columns).select_from(source).where(*conditions).order_by(order.desc())
    # SQLite does not know how many rows have a value, and might walk those of the most common one.
    walked = _walked(connection, question.equal) if source is TASKS else NO_INDEX
    return rows.with_hint(TASKS, walked, "sqlite") if walked else rows


def _walked(connection: sa.Connection, equal: Mapping[str, str]) -> str:
    """Which index SQLite walks: that of the state where few tasks are in it."""
    walked = index_for(equal)
    state = equal.get("state")
    if state is None or state == FAILURE or walked in ("", OF_STATE) or not _is_sqlite(connection):
        return walked
    in_state = sa.select(TASKS.c.key).where(TASKS.c.state == state).with_hint(TASKS, OF_STATE, "sqlite")
    return OF_STATE if _are_few(connection, in_state) else walked


def _are_few(connection: sa.Connection, rows: sa.Select[Any], few: int = _FEW) -> bool:
    some = rows.limit(few + 1).subquery()
    return bool(connection.execute(sa.select(sa.func.count()).select_from(some)).scalar_one() <= few)


def _are_few_texts(connection: sa.Connection, matching: sa.ColumnElement[bool]) -> bool:
    """Whether few texts have words that begin so. PostgreSQL takes it that many have, and would look for them in each text
    from the newest on. (SQLite never does.)"""
    ways = ("seqscan", "indexscan", "indexonlyscan")
    for way in ways:
        connection.execute(sa.text(f"SET LOCAL enable_{way} = off"))
    are_few = _are_few(connection, sa.select(TEXTS.c.rowid).where(matching), _FEW_TEXTS)
    for way in ways:
        connection.execute(sa.text(f"SET LOCAL enable_{way} TO DEFAULT"))
    return are_few


def _matches(words: str, marks: Sequence[str], *, is_sqlite: bool) -> sa.ColumnElement[bool]:
    if is_sqlite:
        return sa.literal_column("amqtask_history_texts").bool_op("MATCH")(
            " ".join([*marks, *map(_quoted, words.split())])
        )
    query = " & ".join([*marks, *filter(None, map(_lexemes, words.split()))])
    return sa.func.to_tsvector("simple", TEXTS.c.body).bool_op("@@")(sa.func.to_tsquery("simple", query))


def _quoted(term: str) -> str:
    """A term as FTS5 takes it, without its own signs; a star at its end is any end."""
    text, star = (term[:-1], "*") if term.endswith("*") and len(term) > 1 else (term, "")
    return '"' + text.replace('"', '""') + f'"{star}'


_NO_WORD = re.compile(r"[\W_]+")


def spaced(text: str) -> str:
    """A text for PostgreSQL, whose parser knows addresses, paths and numbers with signs, and finds no word within them."""
    return _NO_WORD.sub(" ", text)


def _lexemes(term: str) -> str:
    """A term for PostgreSQL's to_tsquery: its words, one after the other."""
    words = " <-> ".join(spaced(term).split())
    return words + (":*" if words and term.endswith("*") else "")


def _is_sqlite(database: sa.Connection | sa.Engine) -> bool:
    return database.dialect.name == "sqlite"

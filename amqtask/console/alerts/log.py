"""What fired, and who has still to be told, in the history's index: so it lasts, and several consoles tell once.

An alert and its notices are one transaction; an open alert of one rule and subject is there once (a unique index says so). A
notice is claimed by who sends it for a while: one that is killed meanwhile leaves it to the next, so that it may come twice, but
not never."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from amqtask.history.index import IndexUnreachable
from amqtask.history.tables import ALERTS, DEPTHS, NOTICES

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.console.alerts.rules import Problem
    from amqtask.ground.shapes import JsonObject
    from amqtask.history.index import HistoryIndex

# Seconds that a claim lasts; a destination has less to answer.
CLAIM_SECONDS = 60.0
# Seconds before the next attempts; a notice is given up after the last of as many as make a day.
FIRST_PAUSE, LONGEST_PAUSE, GIVE_UP_AFTER = 5.0, 600.0, 86_400.0


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that a destination is to be told. `destination` is its mark, not its address."""

    id: int
    destination: str
    body: Mapping[str, object]
    attempts: int
    made_at: float


class AlertLog:
    """See the module; times are Unix times. Each method raises IndexUnreachable."""

    def __init__(self, index: HistoryIndex) -> None:
        self._index = index

    def firing(self) -> dict[tuple[str, str], JsonObject]:
        """The open alerts, by rule and subject."""
        return {(row["rule"], row["subject"]): row for row in self._rows(ALERTS.c.ended_at.is_(None), 10_000)}

    def past(self, limit: int) -> list[JsonObject]:
        """Those that are over, the newest first."""
        return self._rows(ALERTS.c.ended_at.is_not(None), limit)

    def _rows(self, condition: sa.ColumnElement[bool], limit: int) -> list[JsonObject]:
        statement = sa.select(ALERTS).where(condition).order_by(ALERTS.c.id.desc()).limit(limit)
        return self._index.transact(lambda connection: [dict(row) for row in connection.execute(statement).mappings()])

    def fire(self, problem: Problem, now: float, destinations: Sequence[str], body: Mapping[str, object]) -> bool:
        """Open an alert, and have these destinations told. False: it is open already, by whoever opened it."""
        values = {
            "rule": problem.rule, "subject": problem.subject, "text": problem.text, "began_at": now,
        }  # fmt: skip
        is_open = (ALERTS.c.rule == problem.rule, ALERTS.c.subject == problem.subject, ALERTS.c.ended_at.is_(None))

        def change(connection: sa.Connection) -> bool:
            if connection.execute(sa.select(ALERTS.c.id).where(*is_open)).first() is not None:
                return False
            connection.execute(sa.insert(ALERTS).values(values))
            number = int(connection.execute(sa.select(ALERTS.c.id).where(*is_open)).scalar_one())
            _add_notices(connection, number, now, destinations, {**body, "id": number})
            return True

        try:
            return self._index.transact(change)
        except IndexUnreachable as error:
            if isinstance(error.__cause__, sa.exc.IntegrityError):
                return False  # another console was faster by a moment
            raise

    def resolve(self, number: int, now: float, destinations: Sequence[str], body: Mapping[str, object]) -> bool:
        """Close an alert, and have these destinations told. False: it is closed already."""
        statement = sa.update(ALERTS).where(ALERTS.c.id == number, ALERTS.c.ended_at.is_(None)).values(ended_at=now)

        def change(connection: sa.Connection) -> bool:
            is_ours = connection.execute(statement).rowcount == 1
            if is_ours:
                _add_notices(connection, number, now, destinations, {**body, "id": number})
            return is_ours

        return self._index.transact(change)

    # -- notices

    def claim(self, now: float) -> Notice | None:
        """A notice that is due, to send now; nobody else sends it meanwhile. One waits for those before it."""
        c = NOTICES.c
        earlier = NOTICES.alias("earlier")
        is_first = ~sa.exists().where(
            earlier.c.alert == c.alert, earlier.c.destination == c.destination, earlier.c.id < c.id,
            earlier.c.done_at.is_(None),
        )  # fmt: skip
        due = sa.select(NOTICES).where(c.done_at.is_(None), c.due_at <= now, is_first).order_by(c.id).limit(1)

        def change(connection: sa.Connection) -> Notice | None:
            row = connection.execute(due).mappings().first()
            if row is None:
                return None
            is_ours = (c.id == row["id"], c.due_at == row["due_at"], c.done_at.is_(None))
            if connection.execute(sa.update(NOTICES).where(*is_ours).values(due_at=now + CLAIM_SECONDS)).rowcount != 1:
                return None
            return Notice(row["id"], row["destination"], json.loads(row["body"]), row["attempts"], row["made_at"])

        return self._index.transact(change)

    def told(self, notice: Notice, now: float) -> None:
        """It has been told."""
        self._change(notice, done_at=now, error=None)

    def failed(self, notice: Notice, now: float, error: str) -> None:
        """It could not be told: again later, for a day."""
        attempts = notice.attempts + 1
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(attempts - 1, 20))
        is_over = now - notice.made_at > GIVE_UP_AFTER
        self._change(notice, attempts=attempts, error=error[:500], due_at=now + pause, done_at=now if is_over else None)

    def _change(self, notice: Notice, **values: object) -> None:
        statement = sa.update(NOTICES).where(NOTICES.c.id == notice.id).values(values)
        self._index.transact(lambda connection: connection.execute(statement))

    def untold(self, limit: int) -> list[JsonObject]:
        """Notices that could not be told yet, or were given up, the newest first."""
        c = NOTICES.c
        columns = (c.alert, c.destination, c.made_at, c.attempts, c.error, c.done_at)
        statement = sa.select(*columns).where(c.error.is_not(None)).order_by(c.id.desc()).limit(limit)
        return self._index.transact(lambda connection: [dict(row) for row in connection.execute(statement).mappings()])

    def forget(self, before: float) -> None:
        """Delete alerts that were over before that time, and their notices."""
        old = sa.select(ALERTS.c.id).where(ALERTS.c.ended_at < before)

        def change(connection: sa.Connection) -> None:
            connection.execute(sa.delete(NOTICES).where(NOTICES.c.alert.in_(old)))
            connection.execute(sa.delete(ALERTS).where(ALERTS.c.ended_at < before))

        self._index.transact(change)


def _add_notices(
    connection: sa.Connection, alert: int, now: float, destinations: Sequence[str], body: Mapping[str, object]
) -> None:
    rows = [
        {"alert": alert, "destination": mark, "body": json.dumps(body), "made_at": now, "due_at": now, "attempts": 0}
        for mark in destinations
    ]
    if rows:
        connection.execute(sa.insert(NOTICES), rows)


# -- How deep queues were: noted about once a minute by who looks for alerts, so that the overview can say which ones grow.

# Minutes over which growth is told, after which a depth is not told any more, and that depths are kept.
GROWTH_MINUTES, STALE_MINUTES, KEPT_MINUTES = 10, 5, 1_440


def note_depths(index: HistoryIndex, ready: Mapping[str, int], now: float) -> None:
    """Note how many messages are ready in each queue at this time, in place of what the minute had."""
    minute = int(now // 60)
    rows = [{"minute": minute, "queue": queue, "ready": number} for queue, number in ready.items()]

    def change(connection: sa.Connection) -> None:
        is_old = DEPTHS.c.minute < minute - KEPT_MINUTES
        connection.execute(sa.delete(DEPTHS).where(sa.or_(is_old, DEPTHS.c.minute == minute)))
        if rows:
            connection.execute(sa.insert(DEPTHS), rows)

    index.transact(change)


def growing_queues(app: AmqTask) -> list[JsonObject]:
    """Queues with messages, those that grow most first: how many are ready, how many more than ten minutes before (None: nobody
    looked then), and since when the oldest waits (seconds)."""
    minute = int(time.time() // 60)
    since = minute - GROWTH_MINUTES - STALE_MINUTES
    statement = sa.select(DEPTHS).where(DEPTHS.c.minute >= since).order_by(DEPTHS.c.minute)
    depths_by_queue: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for row in app.history.index.transact(lambda connection: list(connection.execute(statement).mappings())):
        depths_by_queue[row["queue"]].append((row["minute"], row["ready"]))
    shown: list[JsonObject] = []
    for queue, depths in depths_by_queue.items():
        last, ready = depths[-1]
        if last < minute - STALE_MINUTES or not ready:
            continue
        before = next((number for at, number in reversed(depths) if at <= last - GROWTH_MINUTES), None)
        growth = None if before is None else ready - before
        shown.append({"queue": queue, "ready": ready, "growth": growth, "waits": app.history.waits(queue)})
    return sorted(shown, key=lambda row: (-(row["growth"] or 0), -row["ready"]))

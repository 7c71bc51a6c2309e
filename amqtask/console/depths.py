"""How deep queues were: noted about once a minute by who looks for alerts, so that the overview can say which ones grow."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING

import sqlalchemy as sa

from amqtask.history.tables import DEPTHS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from amqtask.app import AmqTask
    from amqtask.ground.shapes import JsonObject
    from amqtask.history.index import HistoryIndex

# Minutes over which growth is told, after which a depth is not told any more, and that depths are kept.
GROWTH_MINUTES, STALE_MINUTES, KEPT_MINUTES = 10, 5, 1_440


def note(index: HistoryIndex, ready: Mapping[str, int], now: float) -> None:
    """Note how many messages are ready in each queue at this time, in place of what the minute had."""
    minute = int(now // 60)
    rows = [{"minute": minute, "queue": queue, "ready": number} for queue, number in ready.items()]

    def change(connection: sa.Connection) -> None:
        is_old = DEPTHS.c.minute < minute - KEPT_MINUTES
        connection.execute(sa.delete(DEPTHS).where(sa.or_(is_old, DEPTHS.c.minute == minute)))
        if rows:
            connection.execute(sa.insert(DEPTHS), rows)

    index.transact(change)


def queues(app: AmqTask) -> list[JsonObject]:
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

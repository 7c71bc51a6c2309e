"""What anybody may send as an event is taken in as far as it goes, and keeps no other out."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amqtask.history.client import History
from amqtask.history.indexer import Indexer
from amqtask.protocol.message import Delivery, Properties
from tests.history.test_index import NOON


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    made = History(f"sqlite:///{tmp_path}/index.sqlite3")
    yield made
    made.close()


class Told:
    """Reads these messages, once."""

    def __init__(self, deliveries: list[Delivery]) -> None:
        self._deliveries = deliveries
        self.acknowledged = 0

    def read(self, most: int, seconds: float) -> list[Delivery]:
        taken, self._deliveries = self._deliveries, []
        return taken

    def acknowledge(self) -> None:
        self.acknowledged += 1

    def close(self) -> None: ...


def taken(history: History, *bodies: str, headers: dict[str, Any] | None = None) -> int:
    deliveries = [
        Delivery(body.encode(), Properties("application/json", "utf-8", headers or {}), "", "", False, "history", 1, 1)
        for body in bodies
    ]
    tail, ticks = Told(deliveries), itertools.count()
    indexer = Indexer(
        history.index,
        lambda position: tail,
        accept=frozenset({"application/json"}),
        max_age=1e9,
        max_bytes=10**9,
        clock=lambda: float(next(ticks)),
    )
    count = indexer.read_once(0.0)
    assert tail.acknowledged == 1
    return count


def told(task_id: str, **fields: Any) -> str:
    return json.dumps(
        {"type": "task-received", "uuid": task_id, "hostname": "w@h", "timestamp": NOON, "name": "t", **fields}
    )


def test_messages_within_events_are_kept_with_the_types_of_their_headers(history: History) -> None:
    at = {"__type__": "datetime", "__value__": "2026-11-30T12:00:00+00:00"}
    message = {"body": "W10=", "headers": {"id": "one", "at": at}}

    assert taken(history, told("one", message=message, follows=[{"how": "link", "id": at}])) == 1

    (task,) = history.by_ids(["one"])
    assert task.message is not None
    assert task.message.headers["at"].year == 2026  # type: ignore[attr-defined]


def test_lists_within_each_other_keep_no_event_out(history: History) -> None:
    limit = sys.getrecursionlimit()
    for depth in range(limit - 300, limit, 7):
        nested = f"{'[' * depth}{']' * depth}"
        written = told(f"deep {depth}", args="?", follows="?", stamps={"s": "?"}).replace('"?"', nested)
        taken(history, written, told(f"other {depth}"))

    assert {task.id for task in history.find(limit=1000)} >= {
        f"other {depth}" for depth in range(limit - 300, limit, 7)
    }


@pytest.mark.parametrize("offset", [10**400, -1, "x", None, [1]])
def test_an_offset_that_is_none_moves_nothing(history: History, offset: Any) -> None:
    assert taken(history, told("one"), headers={"x-stream-offset": offset}) == 1
    assert (history.index.position(), [task.id for task in history.find()]) == (None, ["one"])

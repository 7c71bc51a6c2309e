"""What anybody may send as an event is taken in as far as it goes, and keeps no other out."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from amqtask.exceptions import AccessRefused
from amqtask.history import indexer as module
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
    """Reads these messages, once, after these errors; `on_end` is called when it has no more."""

    def __init__(self, deliveries: list[Delivery], errors: Sequence[Exception] = ()) -> None:
        self._deliveries = deliveries
        self._errors = list(errors)
        self.on_end: Callable[[], None] = lambda: None
        self.acknowledged = 0

    def read(self, most: int, seconds: float) -> list[Delivery]:
        if self._errors:
            raise self._errors.pop(0)
        if not self._deliveries:
            self.on_end()
        taken, self._deliveries = self._deliveries, []
        return taken

    def come(self, delivery: Delivery) -> None:
        self._deliveries.append(delivery)

    def acknowledge(self) -> None:
        self.acknowledged += 1

    def close(self) -> None: ...


def message(body: str, headers: dict[str, Any] | None = None) -> Delivery:
    properties = Properties("application/json", "utf-8", headers or {})
    return Delivery(body.encode("utf-8", "surrogatepass"), properties, "", "", False, "history", 1, 1)


def made(history: History, tail: Told, **options: Any) -> Indexer:
    ticks = itertools.count()
    accept = frozenset({"application/json"})
    return Indexer(
        history.index,
        lambda position: tail,
        accept=accept,
        max_age=1e9,
        max_bytes=10**9,
        clock=lambda: float(next(ticks)),
        **options,
    )


def taken(history: History, *bodies: str, headers: dict[str, Any] | None = None) -> int:
    tail = Told([message(body, headers) for body in bodies])
    count = made(history, tail).read_once(0.0)
    assert tail.acknowledged == 1
    return count


def run(history: History, errors: Sequence[Exception], *bodies: str, **options: Any) -> None:
    """Until these messages are read, after these errors."""
    tail = Told([message(body, {"x-stream-offset": number}) for number, body in enumerate(bodies)], errors)
    indexer = made(history, tail, **options)
    tail.on_end = indexer.stop
    indexer.run()
    assert tail.acknowledged == 1


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


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)


def refuse(history: History, name: str) -> None:
    """Have the database take no task of this name."""
    trigger = (
        f"CREATE TRIGGER refuses BEFORE INSERT ON amqtask_history WHEN NEW.name = '{name}' "
        "BEGIN SELECT RAISE(ABORT, 'not that'); END"
    )
    history.index.transact(lambda connection: connection.execute(sa.text(trigger)))


def test_an_event_that_fails_each_time_is_set_aside_with_its_reason_and_no_other_is_lost(
    history: History, caplog: pytest.LogCaptureFixture
) -> None:
    refuse(history, "poison")
    events = [json.loads(told(f"task {number}", name="poison" if number == 7 else "t")) for number in range(20)]

    run(history, [], json.dumps(events[:10]), json.dumps(events[10:]), told("last"))

    found = {task.id for task in history.find(limit=100)}
    assert found == {"last", *(f"task {number}" for number in range(20) if number != 7)}
    assert history.index.position() == 2
    (one,) = history.index.aside(10)
    assert (json.loads(one["body"]), "not that" in one["reason"]) == (events[7], True)
    assert caplog.text.count("set aside") == 1


@pytest.mark.parametrize(
    "error", [ValueError("odd"), KeyError("odd"), RecursionError("odd"), AssertionError("odd")], ids=repr
)
def test_no_error_ends_the_indexer(history: History, error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    run(history, [error] * 3, told("one"))

    assert [task.id for task in history.find()] == ["one"]
    lines = [record for record in caplog.records if "odd" in record.getMessage()]
    assert [("trying again" in line.getMessage(), line.exc_info) for line in lines] == [(True, None)]
    assert "goes on" in caplog.text


def test_who_may_not_read_ends_unless_patient(history: History) -> None:
    with pytest.raises(AccessRefused):
        run(history, [AccessRefused("no")], told("one"))
    run(history, [AccessRefused("no")], told("two"), is_patient=True)
    assert [task.id for task in history.find()] == ["two"]


@pytest.mark.parametrize("body", ["{", "\ud800", '"text"', '[{"type": 7}]', "\0", "[" * 100_000], ids=range(6))
def test_a_message_that_cannot_be_read_is_set_aside(history: History, body: str) -> None:
    run(history, [], told("before"), body, told("after"))

    assert {task.id for task in history.find()} == {"before", "after"}
    (one,) = history.index.aside(10)
    assert one["reason"]
    assert one["body"].startswith(body[0].replace("\0", "\ufffd").replace("\ud800", "\ufffd"))


def test_a_worker_is_there_for_what_is_read_as_it_comes_not_for_what_had_waited(history: History) -> None:
    beat = json.dumps({"type": "worker-heartbeat", "hostname": "w@h", "freq": 2.0, "timestamp": NOON})
    tail = Told([message(beat)])
    indexer = made(history, tail)

    assert indexer.read_once(0.0) == 1
    (behind,) = history.workers()
    tail.come(message(beat.replace(str(NOON), str(NOON + 2))))
    assert indexer.read_once(0.0) == 1
    (fresh,) = history.workers()

    assert (behind.is_gone, fresh.is_gone) == (True, False)

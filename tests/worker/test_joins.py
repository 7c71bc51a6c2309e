"""Chords that are joined in the broker, when its queues and nodes come and go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from amqtask import AmqTask, states
from amqtask.exceptions import MessageTooLarge, PublishError, PublishRefused, Unroutable
from amqtask.execution.executor import Executor
from amqtask.execution.follow_ups import FollowUpComposer
from amqtask.protocol.chord import ChordPart
from amqtask.protocol.message import Delivery, Message
from amqtask.protocol.result import ResultMessage, decode_result
from amqtask.transport.contract import QueuePresence
from amqtask.worker.follow_ups import FollowUpPublisher
from amqtask.worker.workflows import AGAIN_SECONDS, ChordJoiner
from tests.worker.fakes import HandLoop, HandPublisher

GROUP, QUEUE = "g", "amqtask.chord.g.secret"
JSON = frozenset({"application/json"})


class HandCollector:
    """Looks end as the test says: with what is seen, or with all messages of a queue."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self._take: Any = None
        self._on_done: Any = None

    def collect(
        self,
        queue: str,
        size: int,
        *,
        take: Callable[[Sequence[Delivery], Callable[[bool], None]], bool],
        on_done: Callable[[QueuePresence], None],
    ) -> None:
        self.asked.append((queue, size))
        self._take, self._on_done = take, on_done

    def sees(self, seen: QueuePresence) -> None:
        self._on_done(seen)

    def has(self, messages: Sequence[Message]) -> bool:
        found = [
            Delivery(each.body, each.properties, "", QUEUE, False, QUEUE, tag, 0) for tag, each in enumerate(messages)
        ]
        taken: bool = self._take(
            found, lambda is_over: self._on_done(QueuePresence.GONE if is_over else QueuePresence.AWAY)
        )
        return taken

    def stop(self) -> None: ...


class Table:
    """A worker's chord joiner, with the broker in the test's hands."""

    def __init__(self) -> None:
        app = AmqTask("joins", broker="amqp://", backend="rpc://", set_as_current=False)

        @app.task(name="total")
        def total(values: list[int]) -> int:
            return sum(values)

        executor: Executor = app.make_executor("w@h")
        self.chords: FollowUpComposer = executor.follow_ups
        self.loop, self.publisher, self.collector = HandLoop(), HandPublisher(), HandCollector()
        self.chord_joiner = ChordJoiner(lambda: self.collector, self.chords, JSON)
        self.is_stopping = False
        self.following = FollowUpPublisher(
            self.publisher, self.loop, executor, add_part=self.add, is_stopping=lambda: self.is_stopping
        )
        self.done: list[bool] = []
        self.body = {
            "task": "total", "args": [], "kwargs": {}, "chord_size": 2, "chord_token": "secret",
            "options": {"task_id": "body", "reply_to": "7c1fd0b6-2d3d-4e0b-a7a5-7f4b6a6a1c11"},
        }  # fmt: skip

    def add(self, part: ChordPart, on_done: Callable[[bool], None]) -> None:
        self.chord_joiner.add(part, self.following, on_done)

    def part(self, task_id: str, value: Any = 1) -> ChordPart:
        (part,) = self.chords.part(self.body, GROUP, 0, ResultMessage(task_id, states.SUCCESS, value)).parts
        return part

    def ended(self, task_id: str = "a") -> None:
        self.add(self.part(task_id), self.done.append)

    def confirm(self, error: PublishError | None = None) -> None:
        self.publisher.confirm(error)

    def result_of_the_body(self) -> ResultMessage:
        (message,) = [each for each in self.publisher.sent if each.routing_key.startswith("7c1f")]
        return decode_result(message.body, "application/json", "utf-8", JSON)


@pytest.fixture
def table() -> Table:
    return Table()


def test_the_last_part_has_the_body_published_before_its_member_is_answered(table: Table) -> None:
    table.ended("b")
    table.confirm()
    assert table.collector.asked == [(QUEUE, 2)]

    assert table.collector.has([table.part("a", 1).message, table.part("b", 2).message])
    body = table.publisher.sent[-1]
    assert body.properties.headers["task"] == "total"
    assert table.done == []
    table.confirm()

    assert table.done == [True]


def test_a_part_that_is_alone_is_given_back(table: Table) -> None:
    table.ended("a")
    table.confirm()

    assert not table.collector.has([table.part("a").message, table.part("a").message])


def test_a_part_that_nobody_takes_belongs_to_a_chord_that_is_over(table: Table) -> None:
    table.ended()
    table.confirm(Unroutable("no queue"))
    table.collector.sees(QueuePresence.GONE)
    assert table.done == [], "a host that has lost the others may have said so"

    table.loop.advance(AGAIN_SECONDS)
    table.confirm(Unroutable("no queue"))
    table.collector.sees(QueuePresence.GONE)

    assert table.done == [True]


def test_a_part_that_comes_back_once_and_is_taken_then_counts(table: Table) -> None:
    table.ended()
    table.confirm(Unroutable("no queue"))
    table.collector.sees(QueuePresence.GONE)

    table.loop.advance(AGAIN_SECONDS)
    table.confirm()
    table.collector.sees(QueuePresence.THERE)

    assert table.done == [True]


def test_a_part_whose_queue_is_away_with_its_node_is_published_again_when_that_is_back(table: Table) -> None:
    table.ended()
    for _ in range(5):
        table.confirm(Unroutable("no queue"))
        table.collector.sees(QueuePresence.AWAY)
        assert table.done == []
        table.loop.advance(5.0)
    table.confirm()
    table.collector.sees(QueuePresence.THERE)

    assert table.done == [True]


def test_a_stored_part_is_looked_at_again_when_its_node_is_back(table: Table) -> None:
    table.ended("b")
    table.confirm()
    table.collector.sees(QueuePresence.AWAY)
    table.loop.advance(1.0)
    assert len(table.collector.asked) == 2
    table.collector.has([table.part("a").message, table.part("b").message])
    table.confirm()

    assert table.done == [True]


def test_a_chord_whose_queue_does_not_come_back_fails_and_its_owner_is_told(table: Table) -> None:
    table.ended()
    table.confirm()
    for _ in range(40):
        if table.collector.asked:
            table.collector.asked.clear()
            table.collector.sees(QueuePresence.AWAY)
        table.loop.advance(5.0)
    assert table.done == []
    told = table.result_of_the_body()
    assert (told.task_id, told.status, told.result["exc_type"]) == ("body", states.FAILURE, "ChordError")
    table.confirm()

    assert table.done == [True]


def test_a_part_that_is_too_large_fails_its_chord(table: Table) -> None:
    table.ended()
    table.confirm(MessageTooLarge("too large"))
    broken = table.publisher.sent[-1]
    table.confirm()
    assert table.collector.has([broken, table.part("b").message])

    told = table.result_of_the_body()
    assert (told.task_id, told.status) == ("body", states.FAILURE)
    assert "too large" in str(told.result["exc_message"])


def test_a_body_that_is_refused_for_now_is_published_again(table: Table) -> None:
    table.ended("b")
    table.confirm()
    table.collector.has([table.part("a").message, table.part("b").message])
    for _ in range(10):
        table.confirm(PublishRefused("full"))
        assert table.done == []
        table.loop.advance(5.0)
    table.confirm()

    assert table.done == [True]


def test_a_body_that_nobody_takes_fails(table: Table) -> None:
    table.ended("b")
    table.confirm()
    table.collector.has([table.part("a").message, table.part("b").message])
    for _ in range(5):
        table.confirm(Unroutable("no such queue"))
        table.loop.advance(5.0)
        if any(each.routing_key.startswith("7c1f") for each in table.publisher.sent):
            break
    told = table.result_of_the_body()
    assert (told.task_id, told.status, told.result["exc_type"]) == ("body", states.FAILURE, "ChordError")
    table.confirm()

    assert table.done == [True]


def test_a_worker_that_stops_leaves_a_chord_that_is_away_to_others(table: Table) -> None:
    table.ended()
    table.confirm()
    table.collector.sees(QueuePresence.AWAY)
    table.is_stopping = True
    table.loop.advance(1.0)
    table.collector.sees(QueuePresence.AWAY)

    assert table.done == [False]

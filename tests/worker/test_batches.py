"""The line of a batch task: a batch is due when there are enough calls, or when the first of them has waited for long enough."""

from __future__ import annotations

from typing import Any

import pytest

from amqtask.execution.request import Answer, Outcome, Request, calls_of, is_batch
from amqtask.protocol.flow_options import Batch
from amqtask.testing.tasks import PlainTask
from amqtask.worker.dispatcher import Dispatcher
from amqtask.worker.lines import BatchLine, Throttle
from amqtask.worker.prefetch import Window
from amqtask.worker.report import Report
from amqtask.worker.strategy import TaskStrategy
from tests.worker.fakes import HandLoop, HandPool

PAY = TaskStrategy(
    "pay", PlainTask(lambda calls: None, "pay", batch=Batch(3, 1.0), time_limit=5.0, soft_time_limit=4.0)
)


class Gathered:
    """A line, the calls that it was given, and when a batch was due."""

    def __init__(self) -> None:
        self.loop = HandLoop()
        self.due: list[float] = []
        self.line = BatchLine(self.loop, self._is_due, clock=lambda: self.loop.now)
        self._number = 0

    def _is_due(self, line: Any) -> None:
        assert line is self.line
        self.due.append(self.loop.now - 1000.0)

    def come(self, count: int) -> None:
        for _ in range(count):
            self._number += 1
            self.line.gather(Request(number=self._number, id=f"id{self._number}", task="pay", queue="q"), PAY)

    def take(self) -> list[int]:
        batch = self.line.popleft()
        assert is_batch(batch)
        return [call.number for call in calls_of(batch)]


@pytest.fixture
def gathered() -> Gathered:
    return Gathered()


def test_a_batch_is_due_when_there_are_enough(gathered: Gathered) -> None:
    gathered.come(2)
    assert not gathered.line
    gathered.come(1)
    assert gathered.line
    assert (gathered.due, gathered.take()) == ([0.0], [1, 2, 3])
    assert not gathered.line


def test_a_batch_is_due_when_its_first_call_has_waited_for_long_enough(gathered: Gathered) -> None:
    gathered.come(1)
    gathered.loop.advance(0.75)
    gathered.come(1)
    gathered.loop.advance(0.2)
    assert not gathered.line
    gathered.loop.advance(0.1)
    assert (gathered.due, gathered.take()) == ([1.0], [1, 2])


def test_more_calls_join_a_batch_that_waits_for_a_slot(gathered: Gathered) -> None:
    gathered.come(1)
    gathered.loop.advance(1.0)
    gathered.come(4)
    assert gathered.line.batches == 2
    assert (gathered.take(), bool(gathered.line)) == ([1, 2, 3], False)


def test_what_is_left_waits_no_longer_than_it_would_have(gathered: Gathered) -> None:
    gathered.come(3)
    gathered.loop.advance(0.5)
    gathered.come(1)
    assert gathered.take() == [1, 2, 3]
    gathered.loop.advance(0.9)
    assert not gathered.line
    gathered.loop.advance(0.1)
    assert (gathered.due, gathered.take()) == ([0.0, 1.5], [4])


def test_what_waited_while_no_slot_was_free_is_due_at_once(gathered: Gathered) -> None:
    gathered.come(3)
    gathered.come(1)
    gathered.loop.advance(5.0)
    assert (gathered.take(), bool(gathered.line), gathered.take()) == ([1, 2, 3], True, [4])


def test_what_was_cleared_is_not_due(gathered: Gathered) -> None:
    gathered.come(2)
    gathered.line.clear()
    gathered.loop.advance(2.0)
    assert (gathered.due, len(gathered.line)) == ([], 0)


def test_the_limits_are_the_tasks(gathered: Gathered) -> None:
    gathered.come(3)
    batch = gathered.line.popleft()
    assert (batch.soft_limit, batch.hard_limit, batch.id, batch.number) == (4.0, 5.0, "batch of 3", -1)


def test_a_pool_ends_the_calls_of_its_batch_and_no_others(gathered: Gathered) -> None:
    gathered.come(3)
    batch = gathered.line.popleft()
    loop, pool = HandLoop(), HandPool(slots=2)
    dispatcher = Dispatcher(
        pool=pool,
        loop=loop,
        throttle=Throttle(lambda *_: None),
        report=Report(),
        admit=lambda *_: True,
        acks_early=set(),
        accepted=lambda _: None,
    )
    other = Request(number=7, id="other", task="add", queue="q")
    dispatcher.running.update({batch.number: batch, other.number: other})

    told = Outcome(batch.number, calls=(Outcome(1), Outcome(3), Outcome(7)))
    ends = [(outcome.number, outcome.answer) for outcome in dispatcher.end_batches([told])]
    assert ends == [(1, Answer.ACK), (2, Answer.REQUEUE), (3, Answer.ACK)]
    assert sorted(dispatcher.running) == [1, 2, 3, 7]


@pytest.mark.parametrize(("pinned", "room"), [(None, 300), (4, 100), (1000, 1000)])
def test_the_window_has_room_for_batches(pinned: int | None, room: int) -> None:
    window = Window(2, pinned)
    window.batch = 100
    window.look(1.0)
    assert window.current == room


def test_after_a_lost_connection_the_window_is_small_for_a_while() -> None:
    window = Window(2)
    window.batch = 100
    window.look(1.0)
    window.begin_anew(2.0)
    assert (window.current, window.look(3.0), window.look(5.0)) == (2, None, 300)

"""Who runs next: only free slots are given work, queues take turns, one limited task holds up nobody."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from amqtask.execution.request import Outcome, Request
from amqtask.worker.dispatcher import Dispatcher
from amqtask.worker.lines import Throttle
from amqtask.worker.report import Report
from tests.worker.fakes import HandLoop, HandPool


class Bench:
    """A dispatcher with its pool and clock in the test's hands."""

    def __init__(self, slots: int = 1, *, inline: bool = False) -> None:
        self.loop = HandLoop()
        self.pool = HandPool(slots, inline=inline)
        self.away: list[tuple[str, float]] = []
        self.refused: set[int] = set()
        self.acks_early: set[int] = set()
        self.accepted: list[int] = []
        self.throttle = Throttle(lambda request, seconds: self.away.append((request.id, seconds)))
        self.dispatcher = Dispatcher(
            pool=self.pool,
            loop=self.loop,
            throttle=self.throttle,
            report=Report(),
            admit=lambda request, deadline: request.number not in self.refused,
            acks_early=self.acks_early,
            accepted=lambda request: self.accepted.append(request.number),
            clock=lambda: self.loop.now,
        )
        self.pool.on_outcomes = self.ended
        self.number = 0

    def ended(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            self.dispatcher.running.pop(outcome.number)
        self.loop.call_soon(self.dispatcher.run)

    def add(self, *ids: str, queue: str = "q", task: str = "t") -> list[int]:
        numbers = []
        for task_id in ids:
            self.number += 1
            self.dispatcher.add(Request(number=self.number, id=task_id, task=task, queue=queue))
            numbers.append(self.number)
        return numbers

    @property
    def started(self) -> list[str]:
        return [request.id for request in self.pool.started]


def test_a_request_waits_until_a_slot_is_free() -> None:
    bench = Bench(slots=2)
    first, *_ = bench.add("a", "b", "c")
    bench.dispatcher.run()
    assert bench.started == ["a", "b"]
    assert bench.dispatcher.waiting == 1

    bench.pool.end(first)
    bench.loop.turn()

    assert bench.started == ["a", "b", "c"]


def test_queues_take_turns() -> None:
    bench = Bench(slots=5)
    bench.add("a1", "a2", "a3", queue="a")
    bench.add("b1", "b2", queue="b")
    bench.dispatcher.run()

    assert bench.started == ["a1", "b1", "a2", "b2", "a3"]


def test_a_pool_that_runs_inside_submit_gets_them_in_order_without_recursion() -> None:
    bench = Bench(inline=True)
    bench.add(*[str(number) for number in range(5000)])
    bench.dispatcher.run()

    assert bench.started == [str(number) for number in range(5000)]
    assert bench.dispatcher.running == {}


def test_a_watched_request_is_asked_about_before_it_runs() -> None:
    bench = Bench(slots=3)
    refused, admitted = bench.add("late", "in-time")
    bench.refused.add(refused)
    bench.dispatcher.watched.update({refused: 1.0, admitted: 2.0})
    bench.dispatcher.run()

    assert bench.started == ["in-time"]
    assert bench.dispatcher.watched == {}


def test_an_early_acked_request_is_told_before_the_pool_has_it() -> None:
    bench = Bench(slots=1)
    (number,) = bench.add("a")
    bench.acks_early.add(number)
    bench.dispatcher.run()

    assert bench.accepted == [number]


def test_a_limited_task_does_not_hold_up_the_others() -> None:
    bench = Bench(slots=4, inline=True)
    bench.throttle.set_rate("limited", "1/m")
    bench.add("l1", "l2", "l3", task="limited")
    bench.add("a", "b")
    bench.dispatcher.run()

    assert bench.started == ["l1", "a", "b"]
    assert [task_id for task_id, _ in bench.away] == ["l2", "l3"]


def test_held_requests_start_when_their_token_comes() -> None:
    bench = Bench(slots=4, inline=True)
    bench.throttle.set_rate("limited", "10/s")
    bench.add("l1", "l2", "l3", task="limited")
    bench.dispatcher.run()
    assert bench.started == ["l1"]

    bench.loop.advance(0.11)
    assert bench.started == ["l1", "l2"]
    bench.loop.advance(0.11)
    assert bench.started == ["l1", "l2", "l3"]
    assert bench.away == []


def test_a_token_that_comes_while_all_slots_are_busy_is_used_when_one_is_free() -> None:
    bench = Bench(slots=1)
    bench.throttle.set_rate("limited", "10/s")
    first, _ = bench.add("l1", "l2", task="limited")
    bench.dispatcher.run()
    bench.pool.slots = 2
    (other,) = bench.add("a")
    bench.dispatcher.run()
    bench.loop.advance(5.0)
    bench.pool.slots = 1

    bench.pool.end(first)
    bench.loop.turn()
    bench.pool.end(other)
    bench.loop.advance(0.2)

    assert bench.started == ["l1", "a", "l2"]


def test_clear_takes_everything_away() -> None:
    bench = Bench(slots=1)
    bench.throttle.set_rate("limited", "2/s")
    bench.add("l1", "l2", task="limited")
    bench.add("a", "b", queue="other")
    bench.dispatcher.run()

    taken = {request.id for request in bench.dispatcher.clear()}

    assert taken | set(bench.started) == {"l1", "l2", "a", "b"}
    assert list(bench.dispatcher) == []
    assert bench.dispatcher.waiting == 0


def test_the_line_of_one_queue_can_be_taken_back() -> None:
    bench = Bench(slots=1)
    bench.add("a", "b", "keep", "c", "d")
    bench.dispatcher.run()

    taken = bench.dispatcher.take_line("q", allowed=lambda request: request.id != "keep", limit=2)

    assert [request.id for request in taken] == ["c", "d"]
    assert [request.id for request in bench.dispatcher] == ["b", "keep"]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 6)), min_size=1, max_size=20),
    st.integers(1, 4),
)
def test_everything_runs_once_and_no_queue_starves(batches: list[tuple[str, int]], slots: int) -> None:
    bench = Bench(slots=slots)
    expected = []
    for queue, count in batches:
        ids = [f"{queue}-{bench.number + offset}" for offset in range(count)]
        expected += ids
        bench.add(*ids, queue=queue)
    bench.dispatcher.run()
    while bench.pool.running:
        bench.pool.end(next(iter(bench.pool.running)))
        bench.loop.turn()

    assert sorted(bench.started) == sorted(expected)
    queues = {task_id[0] for task_id in expected}
    assert {task_id[0] for task_id in bench.started[: len(queues)]} == queues


def test_shards_of_a_queue_take_turns_and_together_they_are_one_queue() -> None:
    bench = Bench(slots=8)
    bench.add("a1", "a2", "a3", "a4", queue="q.fair.1")
    bench.add("b1", queue="q.fair.2")
    bench.add("m1", "m2", "m3", queue="mail")
    bench.dispatcher.run()

    assert bench.started == ["a1", "m1", "b1", "m2", "a2", "m3", "a3", "a4"]


def test_requests_of_shards_are_found_taken_back_and_cleared_once() -> None:
    bench = Bench(slots=1)
    bench.add("now", queue="q.fair.1")
    bench.add("a1", "a2", queue="q.fair.1")
    bench.add("b1", "b2", queue="q.fair.2")
    bench.dispatcher.run()
    assert sorted(request.id for request in bench.dispatcher) == ["a1", "a2", "b1", "b2"]

    taken = bench.dispatcher.take_line("q.fair.2", allowed=lambda request: request.queue == "q.fair.2", limit=1)
    assert [request.id for request in taken] == ["b2"]
    assert bench.dispatcher.waiting == 3

    assert sorted(request.id for request in bench.dispatcher.clear()) == ["a1", "a2", "b1"]
    assert bench.dispatcher.waiting == 0

"""A slot that has the next call at hand runs it in the place of the one before, without a question."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from amqtask import AmqTask, Concurrency, Rate
from amqtask.flow.contract import Entry, Verdict
from amqtask.flow.gate import Gate
from amqtask.flow.keys import FlowPlan
from amqtask.flow.memory import MemoryStore
from amqtask.testing.worker import start_worker
from integration.waiting import eventually


class Asked(MemoryStore):
    """It counts questions."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self.asked = 0

    def enter(self, entry: Entry, lease: float, most: int = 1) -> Verdict:
        self.asked += 1
        return super().enter(entry, lease, most)


class Slot:
    """A worker of one slot, whose calls come when they are told to."""

    def __init__(self, store: Asked, clock: Callable[[], float], *limits: Concurrency | Rate) -> None:
        self.gate = Gate({"work": FlowPlan("work", lambda key: None, None, limits)}, store, lease=30.0, clock=clock)
        self.entry: Entry | None = None

    def begins(self, number: int, key: str = "a", headers: Any = None) -> bool:
        self.entry, verdict = self.gate.enter("work", str(number), number, headers or {}, (key,), {})
        return verdict.seconds == 0

    def ends(self) -> None:
        assert self.entry is not None
        self.gate.leave("work", self.entry, 0.001, "free", "")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> Asked:
    return Asked(clock)


def test_one_question_is_for_several_short_runs(store: Asked, clock: Clock) -> None:
    slot, other = Slot(store, clock, Concurrency(1)), Slot(store, clock, Concurrency(1))
    slot.gate.rest()

    for number in range(5):
        assert slot.begins(number)
        slot.ends()
    assert store.asked == 1
    assert not other.begins(1)
    slot.gate.rest()
    assert other.begins(2)


def test_a_slot_that_never_says_that_it_rests_keeps_nothing(store: Asked, clock: Clock) -> None:
    slot, other = Slot(store, clock, Concurrency(1)), Slot(store, clock, Concurrency(1))

    assert slot.begins(1)
    slot.ends()
    assert other.begins(2)


def test_a_place_is_kept_for_a_moment_and_for_the_same_key(store: Asked, clock: Clock) -> None:
    slot = Slot(store, clock, Concurrency(1, by="key"))
    slot.gate.rest()

    for number, (key, seconds) in enumerate([("a", 0.0), ("a", 0.0), ("b", 0.0), ("b", 1.0), ("b", 0.0)]):
        clock.now += seconds
        assert slot.begins(number, key)
        slot.ends()
    assert store.asked == 3
    assert len([line for line in store.state.lines.values() if line.holders]) == 1


def test_a_call_with_a_ticket_asks(store: Asked, clock: Clock) -> None:
    slot = Slot(store, clock, Concurrency(1))
    slot.gate.rest()

    for number, headers in enumerate([{}, {"amqtask-tickets": {"concurrency": 1}}]):
        assert slot.begins(number, headers=headers)
        slot.ends()
    assert store.asked == 2


def test_a_run_in_anothers_place_keeps_it_for_as_long_as_it_runs(store: Asked, clock: Clock) -> None:
    slot, other = Slot(store, clock, Concurrency(1)), Slot(store, clock, Concurrency(1))
    slot.gate.rest()

    assert slot.begins(1)
    slot.ends()
    assert slot.begins(2)
    for _ in range(4):
        clock.now += 20
        slot.gate.note([2])
        slot.gate.renew({"work": [2]})
        assert not other.begins(1)
    clock.now += 31  # nobody renews it
    assert other.begins(2, headers={"amqtask-tickets": {"concurrency": 9}})


def test_of_a_rate_hardly_more_is_asked_for_than_runs(store: Asked, clock: Clock) -> None:
    slot, other = Slot(store, clock, Rate("2000/s")), Slot(store, clock, Rate("2000/s"))
    slot.gate.rest()

    for number in range(1000):
        assert slot.begins(number)
        slot.ends()
    slot.gate.rest()
    assert store.asked < 200
    left = 0
    while other.begins(left):
        other.ends()
        left += 1
    assert 900 < left <= 1000


def test_quick_calls_ask_rarely_and_leave_no_place_behind(clock: Clock) -> None:
    app = AmqTask("gate", broker="memory://")
    store = app.runtime._kept.flow_store = Asked(clock)
    ran, lock = [0], threading.Lock()

    @app.task(name="quick", limits=Concurrency(2))
    def quick() -> None:
        with lock:
            ran[0] += 1

    for _ in range(200):
        quick.delay()
    with start_worker(app, pool="threads", concurrency=2):
        eventually(lambda: ran[0] == 200)
        eventually(lambda: not any(line.holders for line in store.state.lines.values()))
    assert store.asked < 200


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_another_task_runs_without_the_place(clock: Clock, pool: str) -> None:
    app = AmqTask("gate", broker="memory://")
    store = app.runtime._kept.flow_store = Asked(clock)
    held: list[int] = []
    limited = app.task(name="limited", limits=Concurrency(1))(lambda: None)
    free = app.task(name="free")(lambda: held.append(sum(len(line.holders) for line in store.state.lines.values())))

    for _ in range(20):
        limited.delay()
        free.delay()
    with start_worker(app, pool=pool, concurrency=1):
        eventually(lambda: len(held) == 20)
    assert held == [0] * 20

"""The pool grows with the work that is there and shrinks when slots have been idle a while."""

from __future__ import annotations

from amqtask.services.autoscale import Autoscale
from tests.worker.bench import Bench


class Scaled:
    """A worker with one slot that may have four."""

    def __init__(self) -> None:
        self.bench = Bench(slots=1, most_slots=4)
        self.now = 0.0
        self.autoscale = Autoscale(
            self.bench.worker,
            self.bench.operations,
            max_slots=4,
            min_slots=1,
            keep_seconds=30.0,
            clock=lambda: self.now,
        )

    def check_at(self, now: float) -> int:
        self.now = now
        self.autoscale.check()
        self.bench.loop.turn()
        return self.bench.pool.slots


def test_the_window_is_as_large_as_the_maximum() -> None:
    assert Scaled().bench.consumer.windows == {"q": 4}


def test_it_grows_to_what_is_needed_but_not_beyond_the_maximum() -> None:
    scaled = Scaled()
    scaled.bench.deliver("a", "b", "c")
    assert scaled.check_at(1.0) == 3
    assert scaled.bench.started == ["a", "b", "c"]

    scaled.bench.deliver("d", "e", "f")

    assert scaled.check_at(2.0) == 4


def test_it_shrinks_only_after_a_while() -> None:
    scaled = Scaled()
    scaled.bench.deliver("a", "b", "c")
    scaled.check_at(1.0)
    for task_id in "abc":
        scaled.bench.end(task_id)

    assert scaled.check_at(20.0) == 3
    assert scaled.check_at(32.0) == 1


def test_new_bounds_hold_at_once() -> None:
    scaled = Scaled()
    scaled.bench.deliver("a", "b", "c", "d")
    scaled.check_at(1.0)

    assert scaled.autoscale.set_bounds(2, 1) == (2, 1)
    assert scaled.bench.pool.slots == 2

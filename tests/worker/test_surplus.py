"""Fairness when tasks turn long: what a window grown on short tasks holds is left to slots that idle."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from amqtask import AmqTask, group
from amqtask.testing.worker import start_worker
from integration.waiting import eventually
from tests.worker.bench import Bench

PATIENCE = 30.0


class Hall:
    """Tasks that are short, and others that run until they are let go; and workers for them."""

    def __init__(self, pool: str) -> None:
        self.pool = pool
        self.app = AmqTask(
            "hall", broker="memory://", backend="cache+memory://", task_default_queue="work", set_as_current=False
        )
        self.begun: list[int] = []
        self.gates: dict[int, threading.Event] = {}
        self.workers = ExitStack()
        app, begun, gates = self.app, self.begun, self.gates

        @app.task(name="hall.short")
        def short() -> None:
            pass

        def hold(number: int) -> None:
            begun.append(number)
            gates[number].wait(PATIENCE)

        async def hold_coroutine(number: int) -> None:
            begun.append(number)
            while not gates[number].is_set():
                await asyncio.sleep(0.01)

        self.short = short
        self.hold = app.task(name="hall.hold")(hold_coroutine if pool == "asyncio" else hold)

    def start_worker(self, slots: int = 2) -> Any:
        return self.workers.enter_context(start_worker(self.app, pool=self.pool, concurrency=slots))

    def run_short_ones(self, count: int) -> None:
        group(self.short.s() for _ in range(count)).apply_async().get(timeout=PATIENCE)

    def send(self, count: int) -> list[Any]:
        self.gates.update({number: threading.Event() for number in range(count)})
        return [self.hold.delay(number) for number in range(count)]

    def let_go(self, *numbers: int) -> None:
        for number in numbers:
            self.gates[number].set()

    def close(self) -> None:
        self.let_go(*self.gates)
        self.workers.close()
        self.app.close()


@pytest.fixture(params=["threads", "asyncio"])
def hall(request: pytest.FixtureRequest) -> Iterator[Hall]:
    made = Hall(request.param)
    yield made
    made.close()


def test_slots_of_a_worker_that_comes_later_run_what_a_busy_one_holds(hall: Hall) -> None:
    hall.start_worker()
    hall.run_short_ones(200)
    hall.send(4)
    eventually(lambda: len(hall.begun) == 2, what=lambda: repr(hall.begun))

    hall.start_worker()

    eventually(lambda: sorted(hall.begun) == [0, 1, 2, 3], what=lambda: repr(hall.begun))


def test_two_workers_share_long_tasks_that_follow_short_ones(hall: Hall) -> None:
    hall.start_worker()
    hall.run_short_ones(200)
    hall.start_worker()
    results = hall.send(8)
    eventually(lambda: len(hall.begun) == 4, what=lambda: repr(hall.begun))
    broker = hall.app.memory_broker
    assert broker is not None
    eventually(lambda: broker.count("work") >= 2, what="nothing was given back")

    hall.let_go(*hall.begun)

    eventually(lambda: len(hall.begun) == 8, what=lambda: repr(hall.begun))
    hall.let_go(*range(8))
    for result in results:
        result.get(timeout=PATIENCE)
    assert sorted(hall.begun) == list(range(8))


def test_a_worker_alone_runs_what_it_gave_back_one_after_the_other(hall: Hall) -> None:
    hall.start_worker()
    hall.run_short_ones(200)
    results = hall.send(9)

    for number in range(9):
        eventually(lambda: len(hall.begun) >= min(9, 2 + number), what=lambda: repr(hall.begun))  # noqa: B023
        hall.let_go(hall.begun[number])

    for result in results:
        result.get(timeout=PATIENCE)
    assert sorted(hall.begun) == list(range(9))


# -- in portions


def busy_bench(slots: int = 2, **setup: Any) -> Bench:
    """A worker whose window short tasks have opened, with twenty long ones that have just come."""
    bench = Bench(slots=slots, **setup)
    bench.deliver("short")
    bench.end("short", runtime=0.0001)
    bench.pass_time(0.02)
    bench.deliver(*(str(number) for number in range(20)))
    return bench


def given_back(bench: Bench) -> int:
    return sum(frame[0] == "nack" for frame in bench.frames)


def after(bench: Bench, seconds: float) -> int:
    """How many were given back by then."""
    for _ in range(round(seconds / 0.25)):
        bench.pass_time(0.25)
    return given_back(bench)


def deliveries(count: int) -> dict[str, Any]:
    """What RabbitMQ before 4.3 writes on a message that went back so often."""
    return {"x-delivery-count": count}


def end_short_ones(bench: Bench) -> None:
    """What runs, and twenty more, end at once; others run then."""
    for _ in range(10):
        bench.deliver("one", "another")
        for number in list(bench.pool.running):
            bench.pool.end(number, runtime=0.0001)
        bench.loop.turn()


def test_nothing_goes_back_while_the_tasks_may_be_short() -> None:
    bench = busy_bench()

    assert after(bench, 0.25) == 0
    assert bench.consumer.windows["q"] > 20


def test_what_a_busy_worker_holds_goes_back_in_portions_that_double() -> None:
    bench = busy_bench()

    assert after(bench, 0.75) == 2
    assert after(bench, 0.5) == 2 + 4
    assert after(bench, 0.5) == 2 + 4 + 8
    assert after(bench, 2.0) == 18


def test_the_last_ones_go_back_first() -> None:
    bench = busy_bench()
    after(bench, 0.75)

    assert bench.frames[-2:] == [("nack", 20, True), ("nack", 21, True)]


def test_no_more_goes_back_once_the_tasks_are_short_again() -> None:
    bench = busy_bench()
    after(bench, 0.75)
    for _ in range(8):
        end_short_ones(bench)
        bench.pass_time(0.25)

    assert given_back(bench) == 2


def test_a_message_goes_back_a_second_time_when_all_have_gone_and_never_a_third() -> None:
    bench = busy_bench()
    bench.deliver("once", redelivered=True, **deliveries(1))
    bench.deliver("twice", redelivered=True, **deliveries(2))

    assert after(bench, 1.75) == 14
    assert ("nack", 22, True) not in bench.frames
    assert after(bench, 5.0) == 18 + 1
    assert ("nack", 22, True) in bench.frames
    bench.deliver("once", redelivered=True, **deliveries(2))
    assert after(bench, 5.0) == 18 + 1


def test_no_message_comes_near_its_delivery_limit_by_going_back() -> None:
    bench = busy_bench(delivery_limit=2)
    bench.deliver("once", redelivered=True, **deliveries(1))

    assert after(bench, 10.0) == 18


def test_what_is_to_be_acked_early_goes_back_before_it_was() -> None:
    bench = Bench(slots=1)
    bench.deliver("short", task="early")
    bench.end("short", runtime=0.0001)
    bench.pass_time(0.02)
    bench.deliver("a", "b", task="early")

    assert after(bench, 5.0) == 1
    assert [frame for frame in bench.frames if frame[1] == 3] == [("nack", 3, True)]
    bench.end("a")
    assert bench.worker.deliveries.outstanding == 0


def test_what_comes_when_all_has_gone_back_stays() -> None:
    bench = busy_bench()
    after(bench, 5.0)
    bench.deliver("late")

    assert after(bench, 5.0) == 18


# -- room


def test_a_closed_window_has_no_more_room_than_slots_that_become_free() -> None:
    bench = busy_bench(slots=4)
    after(bench, 5.0)
    assert bench.consumer.windows == {"q": 1}

    rooms = []
    for task_id in ("0", "1", "2", "3"):
        bench.end(task_id, runtime=5.0)
        bench.pass_time(0.01)
        rooms.append(bench.consumer.windows["q"])

    assert rooms == [1, 2, 4, 4]


def test_a_window_that_opens_again_has_all_its_room() -> None:
    bench = busy_bench()
    after(bench, 5.0)
    for _ in range(8):
        end_short_ones(bench)
        bench.pass_time(0.02)

    assert bench.consumer.windows["q"] > 20

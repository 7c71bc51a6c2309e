"""A worker with two pools: each has its queues and its slots, and neither waits for the other."""

from __future__ import annotations

from typing import Any

import pytest

from amqtask.exceptions import ConfigurationError
from amqtask.protocol.entities import Queue
from amqtask.services.autoscale import Autoscale
from amqtask.services.watchdog import Watchdog
from amqtask.topology.slots import QueueSlots
from tests.worker.bench import Bench
from tests.worker.fakes import HandPool, TwoHandPools


def two_pools(first: int = 1, second: int = 2, **setup: Any) -> tuple[Bench, TwoHandPools]:
    pool = TwoHandPools(first, second)
    bench = Bench(pool=pool, **setup)
    for queue in ("web", "mail"):
        bench.operations.consume(Queue(queue), None)
    return bench, pool


def ids(pool: HandPool) -> list[str]:
    return [request.id for request in pool.started]


def test_each_pool_runs_its_own_queues_and_waits_for_no_other() -> None:
    bench, pool = two_pools()
    bench.deliver("a", "b")
    bench.deliver("w", "x", "y", queue="web")
    assert (ids(pool.hand), ids(pool.other)) == (["a"], ["w", "x"])

    bench.end("w")
    bench.deliver("m", queue="mail")
    assert (ids(pool.hand), ids(pool.other)) == (["a"], ["w", "x", "y"])

    bench.end("a")
    bench.loop.turn()
    bench.end("b")
    bench.loop.turn()
    assert ids(pool.hand) == ["a", "b", "m"]


def test_the_windows_are_as_large_as_the_pool_of_the_queue() -> None:
    bench, _ = two_pools(1, 20)

    assert bench.consumer.windows == {"q": 1, "web": 20, "mail": 1}


def test_slots_of_queues_divide_the_pool_of_the_queue() -> None:
    bench, pool = two_pools(3, 2, queue_slots={"mail": QueueSlots(reserved=1), "web": QueueSlots(most=1)})
    bench.deliver("a", "b", "c")
    bench.deliver("w", "x", queue="web")
    bench.deliver("m", queue="mail")

    assert (ids(pool.hand), ids(pool.other)) == (["a", "b", "m"], ["w"])


def test_more_reserved_than_the_pool_of_the_queue_has_is_refused() -> None:
    bench, _ = two_pools(8, 2)

    with pytest.raises(ConfigurationError, match=r"web:3\+ keeps 3 slots free, and there are 2"):
        bench.operations.consume(Queue("web"), None, QueueSlots(reserved=3))


def test_one_pool_grows_and_its_windows_with_it() -> None:
    bench, pool = two_pools()
    bench.deliver("w", "x", "y", queue="web")
    bench.operations.resize(3, bench.operations.pool("other"))
    bench.pass_time(1.0)

    assert (pool.hand.slots, pool.other.slots, ids(pool.other)) == (1, 3, ["w", "x", "y"])
    assert bench.consumer.windows["web"] == 3
    with pytest.raises(ConfigurationError, match="no pool 'third'; it has hand, other"):
        bench.operations.pool("third")


def test_autoscale_is_for_the_first_pool() -> None:
    bench, pool = two_pools(1, 2, most_slots=4)
    autoscale = Autoscale(bench.worker, bench.operations, max_slots=4, min_slots=1)
    bench.deliver("w", "x", "y", "z", queue="web")
    autoscale.check()
    assert (pool.hand.slots, pool.other.slots) == (1, 2)

    bench.deliver("a", "b", "c")
    autoscale.check()
    bench.loop.turn()

    assert (pool.hand.slots, pool.other.slots, ids(pool.hand)) == (3, 2, ["a", "b", "c"])
    assert autoscale.info() == {"max": 4, "min": 1, "current": 3}


def test_a_full_pool_beside_an_idle_one_is_not_taken_for_a_stuck_worker() -> None:
    bench, _ = two_pools()
    bench.deliver("a", "b")
    clock = [0.0]
    watchdog = Watchdog(bench.worker, stuck_after=60.0, clock=lambda: clock[0])
    watchdog.check()
    clock[0] = 3600.0
    watchdog.check()
    bench.loop.turn()

    assert not bench.loop.stopped


def test_a_quiet_worker_gives_back_what_waits_and_ends_what_runs_in_both() -> None:
    bench, _ = two_pools(1, 1)
    bench.deliver("a", "b")
    bench.deliver("w", "x", queue="web")
    bench.worker.quiet()
    assert {request.id for request in bench.worker.dispatcher.running.values()} == {"a", "w"}

    bench.worker.abandon()

    assert bench.worker.deliveries.outstanding == 0


def test_terminate_and_stats_reach_both() -> None:
    bench, pool = two_pools()
    pool.other.can_terminate = True
    bench.deliver("a")
    bench.deliver("w", queue="web")

    told = bench.operations.terminate(lambda request: True)

    assert ([request.id for request in told.ended], [request.id for request in told.going_on]) == (["w"], ["a"])


def test_a_full_pool_whose_tasks_have_become_long_hoards_nothing() -> None:
    bench, pool = two_pools(8, 2)
    bench.deliver("w", "x", queue="web")
    for number in list(pool.other.running):
        pool.other.end(number, runtime=0.0005)
    bench.pass_time(1.0)
    bench.deliver("y", "z", queue="web")
    bench.pass_time(0.02)
    assert bench.consumer.windows["web"] > 10

    for _ in range(8):
        bench.pass_time(0.25)

    assert bench.consumer.windows["web"] <= 2


def test_an_outcome_of_either_pool_is_answered() -> None:
    bench, _ = two_pools()
    bench.deliver("a")
    bench.deliver("w", queue="web")
    bench.end("w")
    bench.end("a")

    assert bench.frames == [("ack", 2, True)]

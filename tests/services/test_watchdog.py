"""A worker that could work and does not is ended."""

from __future__ import annotations

from amqtask.services.watchdog import Watchdog
from tests.worker.bench import Bench


def watched(bench: Bench) -> tuple[Watchdog, list[float]]:
    clock = [0.0]
    watchdog = Watchdog(bench.worker, stuck_after=60.0, clock=lambda: clock[0])
    watchdog.check()
    return watchdog, clock


def test_a_stuck_worker_is_ended_with_a_failure() -> None:
    bench = Bench(slots=1)
    bench.deliver("a", "b")
    bench.pool.slots = 2  # a slot came free and nobody noticed
    watchdog, clock = watched(bench)
    clock[0] = 61.0
    watchdog.check()
    bench.loop.turn()

    assert bench.loop.stopped
    assert bench.worker.lifecycle.shutdown.exit_code == 1


def test_a_worker_whose_slots_are_all_busy_is_left_alone() -> None:
    bench = Bench(slots=1)
    bench.deliver("a", "b")
    watchdog, clock = watched(bench)
    clock[0] = 3600.0
    watchdog.check()

    assert not bench.loop.stopped


def test_an_idle_worker_is_left_alone() -> None:
    bench = Bench(slots=1)
    watchdog, clock = watched(bench)
    clock[0] = 3600.0
    watchdog.check()

    assert not bench.loop.stopped


def test_movement_starts_the_time_again() -> None:
    bench = Bench(slots=1)
    bench.deliver("a", "b", "c")
    bench.pool.slots = 2
    watchdog, clock = watched(bench)
    clock[0] = 50.0
    bench.end("a")
    bench.loop.turn()
    bench.pool.slots = 3
    watchdog.check()
    clock[0] = 100.0
    watchdog.check()

    assert not bench.loop.stopped

"""Slots of queues: at most so many, some kept free, the others for all; and no other queue waits for that."""

from __future__ import annotations

import pytest

from amqtask.exceptions import ConfigurationError
from amqtask.protocol.entities import Queue
from amqtask.services.watchdog import Watchdog
from amqtask.topology.slots import QueueSlots
from tests.worker.bench import Bench

MOST_ONE, TWO_RESERVED = QueueSlots(most=1), QueueSlots(reserved=2)


def divided(slots: int, queues: tuple[str, ...] = ("web",), /, prefetch: int | None = None, **own: QueueSlots) -> Bench:
    bench = Bench(slots=slots, queue_slots=own, prefetch=prefetch)
    for queue in queues:
        bench.operations.consume(Queue(queue), None)
    return bench


def test_a_queue_takes_at_most_its_slots_and_holds_up_no_other() -> None:
    bench = divided(3, q=MOST_ONE)
    bench.deliver("a", "b", "c")
    bench.deliver("w", "x", "y", queue="web")
    assert bench.started == ["a", "w", "x"]

    bench.end("x")
    bench.loop.turn()
    assert bench.started == ["a", "w", "x", "y"]

    bench.end("a")
    bench.loop.turn()
    assert bench.started[4:] == ["b"]


def test_reserved_slots_stay_free_for_their_queue() -> None:
    bench = divided(3, web=TWO_RESERVED)
    bench.deliver("a", "b", "c")
    assert bench.started == ["a"]

    bench.deliver("w", "x", "y", queue="web")
    assert bench.started == ["a", "w", "x"]

    bench.end("a")
    bench.loop.turn()
    assert len(bench.started) == 4  # the shared slot goes to either

    bench.end("w")
    bench.loop.turn()
    assert bench.pool.free == 0


def test_a_queue_with_reserved_slots_takes_shared_ones_too_and_others_get_them_back() -> None:
    bench = divided(3, web=TWO_RESERVED)
    bench.deliver("w", "x", "y", "z", queue="web")
    bench.deliver("a")
    assert bench.started == ["w", "x", "y"]

    bench.end("y")
    bench.loop.turn()
    assert len(bench.started) == 4
    bench.end(bench.started[3])
    bench.loop.turn()
    assert sorted(bench.started[3:]) == ["a", "z"]


def test_both_limits_of_one_queue() -> None:
    bench = divided(4, web=QueueSlots(reserved=1, most=2))
    bench.deliver("w", "x", "y", queue="web")
    bench.deliver("a", "b", "c")

    assert sorted(bench.started) == ["a", "b", "w", "x"]


def test_nothing_is_kept_free_for_a_queue_that_is_not_consumed_any_more() -> None:
    bench = divided(3, web=TWO_RESERVED)
    bench.deliver("a", "b", "c")
    bench.operations.cancel("web")
    bench.worker.wake()
    bench.loop.turn()

    assert bench.started == ["a", "b", "c"]


def test_a_pool_that_has_shrunk_below_what_is_reserved_still_runs_all_queues() -> None:
    bench = divided(3, web=TWO_RESERVED)
    bench.operations.resize(1)
    bench.deliver("a")
    bench.end("a")
    bench.deliver("w", queue="web")

    assert bench.started == ["a", "w"]


def test_slots_can_be_given_and_changed_while_the_worker_runs() -> None:
    bench = divided(3)
    bench.deliver("a")
    bench.operations.consume(Queue("q"), None, MOST_ONE)
    bench.deliver("b", "c")
    assert bench.started == ["a"]
    assert bench.operations.stats()["slots"] == {"q": {"slots": "1", "running": 1}}

    bench.operations.consume(Queue("q"), None, QueueSlots(most=2))
    bench.loop.turn()

    assert bench.started == ["a", "b"]


def test_more_reserved_than_there_is_says_what_to_do_and_changes_nothing() -> None:
    bench = divided(3)

    with pytest.raises(ConfigurationError, match=r"web:3\+ keeps 3 slots free, and there are 3.*none.*left for q"):
        bench.operations.consume(Queue("web"), None, QueueSlots(reserved=3))

    bench.deliver("a", "b", "c")
    assert bench.started == ["a", "b", "c"]


def test_the_prefetch_follows_the_slots_of_the_queue() -> None:
    bench = divided(8, ("web", "mail"), q=MOST_ONE, web=TWO_RESERVED)
    assert bench.consumer.windows == {"q": 1, "web": 8, "mail": 6}

    pinned = divided(8, prefetch=32, q=MOST_ONE)
    assert pinned.consumer.windows == {"q": 4, "web": 32}


def test_a_full_queue_whose_tasks_have_become_long_hoards_nothing() -> None:
    bench = divided(8, q=QueueSlots(most=2))
    bench.deliver("a", "b")
    bench.end("a", runtime=0.0005)
    bench.end("b", runtime=0.0005)
    bench.pass_time(1.0)
    bench.deliver("c", "d")
    bench.pass_time(0.02)
    assert bench.consumer.windows["q"] > 10
    for _ in range(8):
        bench.pass_time(0.25)

    assert bench.consumer.windows["q"] <= 2


def test_a_full_queue_is_not_taken_for_a_stuck_worker() -> None:
    bench = divided(3, q=MOST_ONE)
    bench.deliver("a", "b")
    clock = [0.0]
    watchdog = Watchdog(bench.worker, stuck_after=60.0, clock=lambda: clock[0])
    watchdog.check()
    clock[0] = 3600.0
    watchdog.check()
    bench.loop.turn()

    assert not bench.loop.stopped


def test_a_full_queue_asks_for_no_more_slots() -> None:
    bench = divided(3, q=MOST_ONE, web=TWO_RESERVED)
    bench.deliver("a", "b", "c")
    assert bench.operations.backlog == 3  # one that runs, and two that are kept free

    bench.deliver("w", "x", "y", queue="web")
    assert bench.operations.backlog == 4


def test_a_task_that_waited_for_its_rate_waits_for_a_slot_of_its_queue_too() -> None:
    bench = divided(3, q=MOST_ONE)
    bench.operations.set_rate_limit("t", "10/s")
    bench.deliver("a", "b")
    bench.loop.advance(5.0)
    assert bench.started == ["a"]

    bench.end("a")
    bench.loop.turn()

    assert bench.started == ["a", "b"]


def test_a_lost_connection_frees_the_lines_and_keeps_the_count() -> None:
    bench = divided(3, q=MOST_ONE)
    bench.deliver("a", "b")
    bench.lose_connection()
    bench.deliver("b")
    assert bench.started == ["a"]

    bench.end("a")
    bench.loop.turn()

    assert bench.started == ["a", "b"]


def with_shards(web: QueueSlots) -> Bench:
    bench = divided(4, ("web", "web.fair.0", "web.fair.1"), web=web)
    bench.deliver("a", "b", queue="web.fair.0")
    bench.deliver("c", "d", queue="web.fair.1")
    return bench


def test_shards_share_the_slots_of_their_queue() -> None:
    bench = with_shards(web=QueueSlots(most=2))

    assert bench.started == ["a", "b"]
    assert bench.operations.stats()["slots"] == {"web": {"slots": "2", "running": 2}}
    assert bench.consumer.windows == {"q": 4, "web": 2, "web.fair.0": 2, "web.fair.1": 2}


def test_shards_are_paused_resumed_and_cancelled_with_their_queue() -> None:
    bench = with_shards(web=MOST_ONE)
    assert bench.operations.pause("web")
    assert {queue.name for queue in bench.worker.consumed} == {"q"}
    assert bench.operations.stats()["paused"] == ["web"]
    assert len([frame for frame in bench.frames if frame[0] != "ack"]) == 3  # what had not begun went back

    bench.operations.keep_paused({"web"})
    assert {queue.name for queue in bench.worker.consumed} == {"q"}
    bench.operations.keep_paused(set())
    assert {queue.name for queue in bench.worker.consumed} == {"q", "web", "web.fair.0", "web.fair.1"}

    assert bench.operations.cancel("web")
    assert {queue.name for queue in bench.worker.consumed} == {"q"}

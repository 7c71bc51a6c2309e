"""What a limit has no room for: for a moment it waits in the worker, beside the window and in no slot, and else in the broker."""

from __future__ import annotations

from typing import Any

import pytest

from amqtask import states
from amqtask.execution.request import HELD, Answer
from amqtask.worker.lines import LEAST, LOOK_SECONDS
from tests.worker.bench import Bench


def refuse(bench: Bench, task_id: str, *, ticket: int, seconds: float = 0.1, place: str = "p", more: str = "m") -> None:
    """Let the run of a call end without having begun: its limit is full."""
    tickets = {"concurrency": ticket} if ticket else {}
    bench.end(task_id, state=HELD, answer=Answer.REQUEUE, pause=seconds, tickets=tickets, places=[place, more])
    bench.loop.turn()


def test_it_asks_again_when_it_was_told_to_and_is_not_published() -> None:
    bench = Bench()
    bench.deliver("a")
    refuse(bench, "a", ticket=7)
    bench.loop.advance(0.09)
    assert (bench.started, bench.frames, bench.publisher.sent) == (["a"], [], [])
    assert [request.id for request in bench.operations.reserved()] == ["a"]

    bench.loop.advance(0.02)

    assert bench.started == ["a", "a"]
    assert bench.pool.started[1].headers["amqtask-tickets"] == {"concurrency": 7}
    bench.end("a")
    assert (bench.frames, bench.publisher.sent) == ([("ack", 1, False)], [])


def test_a_run_that_ends_here_lets_the_lowest_ticket_of_its_key_ask_before_all_that_wait() -> None:
    bench = Bench(slots=6)
    bench.deliver("a")
    refuse(bench, "a", ticket=1)
    bench.loop.advance(0.11)  # it has a place now
    bench.deliver("late", "soon", "other key", "plain")
    refuse(bench, "late", ticket=3)
    refuse(bench, "soon", ticket=2)
    refuse(bench, "other key", ticket=1, place="q")
    bench.pool.slots = 2
    bench.deliver("waits for a slot")

    bench.end("a")
    bench.loop.turn()

    assert bench.started[6:] == ["soon"]


def test_a_run_that_ends_has_had_a_place_of_each_of_its_limits() -> None:
    bench = Bench(slots=5)
    bench.deliver("a", "b", "c")
    refuse(bench, "a", ticket=1, place="tenant a", more="all")
    bench.loop.advance(0.11)
    refuse(bench, "b", ticket=1, place="tenant b", more="all", seconds=0.4)
    refuse(bench, "c", ticket=2, place="all", more="tenant c", seconds=0.4)

    bench.end("a")
    bench.loop.turn()

    assert bench.started[4:] == ["c"]


def test_those_of_one_key_do_not_all_ask_while_a_run_here_has_a_place() -> None:
    bench = Bench(slots=5)
    bench.deliver("a", "b", "c", "d")
    refuse(bench, "a", ticket=1)
    bench.loop.advance(0.11)
    for ticket, task_id in enumerate("bcd", 2):
        refuse(bench, task_id, ticket=ticket, seconds=0.001)

    bench.loop.advance(LOOK_SECONDS * 0.9)
    assert bench.started[5:] == []
    bench.loop.advance(LOOK_SECONDS * 0.2)

    assert bench.started[5:] == ["b"]


@pytest.mark.parametrize(
    "fields", [{"seconds": 3.0}, {"ticket": 0}], ids=["for longer", "for a store that does not answer"]
)
def test_it_waits_in_the_broker(fields: dict[str, Any]) -> None:
    bench = Bench()
    bench.deliver("a")

    refuse(bench, "a", **{"ticket": 7, **fields})

    (message,) = bench.publisher.sent
    assert message.properties.headers.get("amqtask-tickets") == ({"concurrency": 7} if "ticket" not in fields else None)
    assert bench.frames == []
    bench.publisher.confirm()
    assert bench.frames == [("ack", 1, False)]


def test_it_goes_to_the_broker_when_its_turn_comes_and_no_slot_is_free() -> None:
    """Another worker may have one."""
    bench = Bench(slots=1)
    bench.deliver("a")
    refuse(bench, "a", ticket=7)
    bench.deliver("runs long")

    bench.loop.advance(0.11)

    assert bench.started == ["a", "runs long"]
    assert bench.publisher.sent[0].properties.headers["amqtask-tickets"] == {"concurrency": 7}


def test_they_have_room_beside_the_window_and_are_no_more_than_the_slots() -> None:
    bench = Bench(slots=2)
    for number in range(3 * LEAST):
        call = f"call {number}"
        bench.deliver(call)
        refuse(bench, call, ticket=1, seconds=0.4, place=call)
        bench.publisher.confirm_all()
        bench.pass_time(0.01)
        waiting = len(bench.operations.reserved())
        assert waiting == 1 or bench.consumer.windows["q"] >= 2 + waiting

    assert waiting == LEAST
    for _ in range(3):
        bench.pass_time(10)
        bench.publisher.confirm_all()
    assert bench.consumer.windows["q"] == 2


def test_what_was_acked_early_does_not_wait_here() -> None:
    bench = Bench()
    bench.deliver("a", task="early")

    refuse(bench, "a", ticket=1)

    assert len(bench.publisher.sent) == 1


@pytest.mark.parametrize("by", ["the worker stops", "its queue is paused"])
def test_it_is_given_back_when(by: str) -> None:
    bench = Bench()
    bench.deliver("a")
    refuse(bench, "a", ticket=1)

    if by == "the worker stops":
        bench.worker.quiet()
    else:
        bench.operations.pause("q")
    bench.loop.advance(1)

    assert (bench.started, bench.frames) == (["a"], [("nack", 1, True)])


def test_a_queue_that_is_paused_keeps_nothing_here() -> None:
    bench = Bench()
    bench.deliver("a")
    bench.operations.pause("q")

    refuse(bench, "a", ticket=1)

    assert len(bench.publisher.sent) == 1


def test_it_is_dropped_with_its_connection() -> None:
    bench = Bench()
    bench.deliver("a")
    refuse(bench, "a", ticket=1)

    bench.lose_connection()
    bench.loop.advance(1)

    assert bench.started == ["a"]


def test_it_is_revoked_while_it_waits() -> None:
    bench = Bench()
    bench.deliver("a")
    refuse(bench, "a", ticket=1)
    bench.operations.revoke(["a"])

    bench.loop.advance(1)

    assert (bench.started, bench.frames) == (["a"], [("ack", 1, False)])


def test_it_is_revoked_while_it_asks() -> None:
    bench = Bench()
    bench.deliver("a")
    bench.operations.revoke(["a"])
    refuse(bench, "a", ticket=1)

    bench.loop.advance(1)

    assert (bench.started, bench.frames) == (["a"], [("ack", 1, False)])


def test_it_is_looked_at_whether_it_is_too_late_by_now() -> None:
    bench = Bench()
    bench.deliver("a", expires="2999-01-01T00:00:00+00:00")
    bench.pool.started[0].headers["expires"] = "2026-01-01T00:00:00+00:00"  # time passes
    refuse(bench, "a", ticket=1)

    bench.loop.advance(1)

    assert (bench.started, bench.frames) == (["a"], [("ack", 1, False)])


def test_a_failure_is_the_end_of_a_run_too() -> None:
    bench = Bench(slots=4)
    bench.deliver("a", "b")
    refuse(bench, "a", ticket=1)
    bench.loop.advance(0.11)
    refuse(bench, "b", ticket=2, seconds=0.4)

    bench.end("a", state=states.FAILURE)
    bench.loop.turn()

    assert bench.started == ["a", "b", "a", "b"]


def test_a_message_of_protocol_v1_keeps_its_tickets() -> None:
    bench = Bench()
    body = b'{"task": "t", "id": "a", "args": [], "kwargs": {}}'
    bench.deliver("a", task=None, body=body)
    refuse(bench, "a", ticket=7, seconds=3.0)
    (message,) = bench.publisher.sent

    bench.deliver("a", task=None, body=message.body, **message.properties.headers)

    assert bench.pool.started[1].headers["amqtask-tickets"] == {"concurrency": 7}

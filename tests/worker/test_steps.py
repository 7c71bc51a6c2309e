"""Chains that a worker goes on with by itself: one message is unanswered until the last of its steps has ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from amqtask import states
from amqtask.exceptions import Unroutable
from amqtask.execution.chain_steps import Perhaps, SharedFlag
from amqtask.execution.request import Answer, Request
from amqtask.protocol.message import Message, Properties
from amqtask.protocol.task import RUN_HEADER
from tests.worker.bench import Bench, result

RUN: dict[str, Any] = {RUN_HEADER: "run-1"}


def step(task_id: str, *, task: str = "t", queue: str = "q", exchange: str = "", **headers: Any) -> Message:
    """The message of a next step, as an outcome brings it."""
    own = {"task": task, "id": task_id, **RUN, **headers}
    return Message(b"[[], {}, {}]", Properties(content_type="application/json", headers=own), exchange, queue)


def go_on(bench: Bench, ended: str, message: Message) -> None:
    """One step ends, with the next; the turn ends."""
    bench.end(ended, publish=(message,), is_step=True)
    bench.loop.turn()


@pytest.fixture
def bench() -> Bench:
    """A worker that goes on with chains for a second."""
    return Bench(chain_seconds=1.0)


def test_the_next_step_runs_without_the_broker_and_the_last_one_answers(bench: Bench) -> None:
    bench.deliver("a", **RUN)
    go_on(bench, "a", step("b"))
    assert bench.frames == []
    go_on(bench, "b", step("c"))
    assert bench.frames == []

    bench.end("c")

    assert bench.started == ["a", "b", "c"]
    assert bench.publisher.sent == []
    assert bench.frames == [("ack", 1, False)]


def test_a_worker_is_told_not_to(bench: Bench) -> None:
    bench = Bench(chain_seconds=0.0)
    bench.deliver("a", **RUN)
    go_on(bench, "a", step("b"))

    assert [message.properties.headers["id"] for message in bench.publisher.sent] == ["b"]
    assert bench.frames == []
    bench.publisher.confirm()
    assert bench.frames == [("ack", 1, False)]


@pytest.mark.parametrize(
    "message",
    [
        step("b", queue="elsewhere"),
        step("b", exchange="topics"),
        step("b", task="early"),
        step("b", task="unknown"),
        step("b", eta="2050-01-01T00:00:00+00:00"),
        step("b", expires="2050-01-01T00:00:00+00:00"),
    ],
    ids=["queue", "exchange", "early ack", "unknown", "eta", "expires"],
)
def test_a_step_that_needs_the_broker_is_published(bench: Bench, message: Message) -> None:
    bench.deliver("a", **RUN)
    go_on(bench, "a", message)

    assert bench.publisher.sent == [message]
    assert bench.started == ["a"]


def test_a_step_that_must_wait_for_its_rate_limit_is_published(bench: Bench) -> None:
    bench.operations.set_rate_limit("t", "1/s")
    bench.deliver("a", **RUN)
    go_on(bench, "a", step("b"))

    assert bench.started == ["a"]
    assert len(bench.publisher.sent) == 1


def test_what_follows_otherwise_is_published(bench: Bench) -> None:
    bench.deliver("a", **RUN)
    bench.end("a", publish=(step("b"),))

    assert len(bench.publisher.sent) == 1


def test_after_a_while_others_get_their_turn(bench: Bench) -> None:
    bench.deliver("a", **RUN)
    go_on(bench, "a", step("b"))
    bench.pass_time(1.5)
    go_on(bench, "b", step("c"))

    assert [message.properties.headers["id"] for message in bench.publisher.sent] == ["c"]
    bench.publisher.confirm()
    assert bench.frames == [("ack", 1, False)]


def test_a_redelivered_one_goes_through_the_broker_so_that_it_counts_its_own_deliveries(bench: Bench) -> None:
    bench.deliver("a", redelivered=True, **RUN)
    go_on(bench, "a", step("b"))

    assert len(bench.publisher.sent) == 1


def test_a_revoked_step_does_not_run(bench: Bench) -> None:
    bench.operations.revoke(["b"])
    bench.deliver("a", **RUN)
    go_on(bench, "a", step("b"))

    assert bench.started == ["a"]
    assert bench.frames == [("ack", 1, False)]


def test_a_step_that_is_retried_leaves_by_the_broker(bench: Bench) -> None:
    bench.deliver("a", **RUN)
    go_on(bench, "a", step("b"))
    bench.end("b", state=states.RETRY, publish=(result(),))
    assert bench.frames == []

    bench.publisher.confirm()

    assert bench.frames == [("ack", 1, False)]


def test_a_step_that_is_dead_lettered_goes_there_itself(bench: Bench) -> None:
    bench.deliver("a", **RUN)
    go_on(bench, "a", step("b"))
    bench.end("b", state=states.FAILURE, answer=Answer.DEAD_LETTER, reason="rejected")
    (dead,) = bench.publisher.sent
    assert (dead.routing_key, dead.properties.headers["id"]) == ("q.dead", "b")
    assert bench.frames == []

    bench.publisher.confirm()

    assert bench.frames == [("ack", 1, False)]


def test_a_step_whose_process_died_gives_the_chain_back(bench: Bench) -> None:
    bench.deliver("a", **RUN)
    go_on(bench, "a", step("b"))
    bench.end("b", state=states.REJECTED, answer=Answer.REQUEUE, reason="killed")

    assert bench.frames == [("reject", 1, True)]


def test_a_worker_that_stops_publishes_the_next_step(bench: Bench) -> None:
    bench.deliver("a", **RUN)
    bench.worker.lifecycle.shutdown.warm("TERM")
    go_on(bench, "a", step("b"))

    assert [message.properties.headers["id"] for message in bench.publisher.sent] == ["b"]
    bench.publisher.confirm()
    assert ("ack", 1, False) in bench.frames


def test_a_step_that_waits_when_the_worker_stops_goes_back(bench: Bench) -> None:
    bench = Bench(slots=1, chain_seconds=1.0)
    bench.deliver("a", "x", **RUN)
    go_on(bench, "a", step("b"))
    assert bench.started == ["a", "x"]

    bench.worker.lifecycle.shutdown.warm("TERM")

    assert bench.frames == [("nack", 1, True)]


def test_the_redelivery_of_a_chain_whose_step_still_runs_is_answered_when_that_has_ended(bench: Bench) -> None:
    bench.deliver("a", **RUN)
    go_on(bench, "a", step("b"))
    bench.lose_connection()
    bench.deliver("a", redelivered=True, **RUN)
    assert bench.started == ["a", "b"]

    go_on(bench, "b", step("c"))
    assert [message.properties.headers["id"] for message in bench.publisher.sent] == ["c"]
    assert bench.frames == []
    bench.publisher.confirm()

    assert bench.frames == [("ack", 1, False)]
    assert bench.started == ["a", "b"]


def test_the_redelivery_of_a_chain_whose_last_ack_was_lost_is_answered(bench: Bench) -> None:
    bench.deliver("a", **RUN)
    go_on(bench, "a", step("b"))
    bench.end("b")
    assert bench.frames == [("ack", 1, False)]
    bench.lose_connection()

    bench.deliver("a", redelivered=True, **RUN)

    assert bench.frames == [("ack", 1, False)]
    assert bench.started == ["a", "b"]


def test_the_redelivery_of_a_chain_whose_step_waited_is_looked_at_again(bench: Bench) -> None:
    bench = Bench(slots=1, chain_seconds=1.0)
    bench.deliver("a", "x", **RUN)
    go_on(bench, "a", step("b"))
    bench.lose_connection()
    bench.end("x")

    bench.deliver("a", redelivered=True, **RUN)

    assert bench.started == ["a", "x", "a"]


def test_tasks_that_become_long_do_not_send_a_begun_chain_away() -> None:
    bench = Bench(slots=1, chain_seconds=1.0)
    bench.deliver("short")
    bench.end("short", runtime=0.0001)
    bench.pass_time(0.1)
    bench.deliver("a", "x", "y", **RUN)
    go_on(bench, "a", step("b"))
    assert bench.started == ["short", "a", "x"]
    bench.pass_time(2.0)
    bench.end("x", runtime=2.0)
    bench.pass_time(0.1)
    bench.end("y", runtime=2.0)
    bench.pass_time(0.6)

    assert bench.consumer.windows == {"q": 1}
    assert ("nack", 2, True) not in bench.frames
    assert bench.started[-1] == "b"


def test_a_step_that_cannot_be_published_fails_and_those_before_it_do_not_run_again(bench: Bench) -> None:
    bench.deliver("a", **RUN)
    go_on(bench, "a", step("b"))
    go_on(bench, "b", step("c", queue="gone"))
    for _ in range(5):
        bench.publisher.confirm(Unroutable("no queue"))
        bench.loop.advance(5.0)
    assert bench.frames == []
    assert bench.publisher.sent[-1].routing_key == "reply-queue"
    bench.publisher.confirm_all()

    assert bench.frames == [("ack", 1, False)]
    assert bench.started == ["a", "b"]


# -- slots that go on by themselves


def by_itself(task_id: str, number: int) -> Request:
    """The request of a step that a slot has begun."""
    return Request(number=number, id=task_id, task="t", headers={"task": "t", "id": task_id, **RUN}, queue="q")


def go_on_by_itself(bench: Bench, ended: str, begun: str, number: int) -> None:
    """What a pool tells of such a step, and then has."""
    found = by_itself(begun, number)
    bench.pool.running[number] = found
    bench.end(ended, publish=(step(begun),), is_step=True, going_on=found)
    bench.loop.turn()


def test_a_chain_that_a_slot_runs_is_answered_by_its_last_step(bench: Bench) -> None:
    bench.deliver("a", **RUN)
    go_on_by_itself(bench, "a", "b", -101)
    go_on_by_itself(bench, "b", "c", -102)
    assert [request.id for request in bench.operations.running()] == ["c"]
    assert bench.frames == []

    bench.end("c")

    assert bench.publisher.sent == []
    assert bench.frames == [("ack", 1, False)]
    assert bench.worker.ended == 3


def test_a_step_of_a_slot_that_is_dead_lettered_goes_there_itself(bench: Bench) -> None:
    bench.deliver("a", **RUN)
    go_on_by_itself(bench, "a", "b", -101)
    bench.end("b", state=states.FAILURE, answer=Answer.DEAD_LETTER, reason="rejected")
    (dead,) = bench.publisher.sent
    assert (dead.routing_key, dead.properties.headers["id"], dead.body) == ("q.dead", "b", b"[[], {}, {}]")

    bench.publisher.confirm()

    assert bench.frames == [("ack", 1, False)]


def test_a_step_that_a_slot_leaves_to_the_worker_runs_here_until_the_time_is_over(bench: Bench) -> None:
    bench.deliver("a", **RUN)
    go_on_by_itself(bench, "a", "b", -101)
    go_on(bench, "b", step("c"))
    assert bench.started == ["a", "c"]
    bench.pass_time(1.5)
    go_on(bench, "c", step("d"))

    assert [message.properties.headers["id"] for message in bench.publisher.sent] == ["d"]


def test_a_slot_says_until_when_a_chain_may_go_on(bench: Bench) -> None:
    bench.deliver("a", **RUN)
    begun = by_itself("b", -101)
    begun.until = bench.loop.now - 0.001
    bench.pool.running[begun.number] = begun
    bench.end("a", publish=(step("b"),), is_step=True, going_on=begun)
    go_on(bench, "b", step("c"))

    assert [message.properties.headers["id"] for message in bench.publisher.sent] == ["c"]


def test_the_redelivery_of_a_chain_that_a_slot_still_runs_waits_for_it(bench: Bench) -> None:
    bench.deliver("a", **RUN)
    go_on_by_itself(bench, "a", "b", -101)
    bench.lose_connection()
    bench.deliver("a", redelivered=True, **RUN)
    go_on_by_itself(bench, "b", "c", -102)
    assert bench.frames == []

    bench.end("c")

    assert bench.started == ["a"]
    assert bench.frames == [("ack", 1, False)]


def test_slots_that_look_by_themselves_go_on_when_ids_are_revoked_but_not_stamps() -> None:
    switch, perhaps = SharedFlag(is_on=False), Perhaps()
    bench = Bench(chain_seconds=1.0, slot_steps=switch, perhaps_revoked=perhaps)

    bench.operations.revoke(["x"])
    bench.operations.revoke(["root"], tree=True)
    bench.operations.learn_revoked({"y": 1.0}, {}, {"z": 1.0})

    assert switch.state[0]
    assert all(one in perhaps for one in ("x", "root", "y", "z"))
    assert sum(str(number) in perhaps for number in range(1000)) < 10
    bench.operations.revoke_stamps([("customer", "x")])
    assert not switch.state[0]


def test_slots_go_on_while_there_is_nothing_that_they_do_not_know() -> None:
    def switched(change: Callable[[Bench], object]) -> list[bool]:
        switch = SharedFlag(is_on=False)
        bench = Bench(chain_seconds=1.0, slot_steps=switch)
        bench.worker.steps.look()
        before = switch.state[0]
        change(bench)
        return [bool(before), bool(switch.state[0])]

    assert switched(lambda bench: bench.operations.revoke(["x"])) == [True, False]
    assert switched(lambda bench: bench.operations.learn_revoked({"x": 1.0}, {})) == [True, False]
    assert switched(lambda bench: bench.operations.set_rate_limit("t", "1/s")) == [True, False]
    assert switched(lambda bench: bench.operations.set_time_limits("t", soft=None, hard=None)) == [True, False]
    assert switched(lambda bench: bench.worker.lifecycle.shutdown.warm()) == [True, False]
    assert switched(lambda bench: bench.deliver("a")) == [True, True]

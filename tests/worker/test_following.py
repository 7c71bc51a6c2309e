"""What follows from a task: published until the broker has it, or told as failed; the task is not run again for it."""

from __future__ import annotations

from typing import Any

import pytest

from amqtask import states
from amqtask.exceptions import (
    AccessRefused,
    ConnectionBlocked,
    MessageRefused,
    MessageTooLarge,
    PublishError,
    PublishRefused,
    Unroutable,
)
from amqtask.execution.request import Answer
from amqtask.worker import lifecycle
from tests.worker.bench import Bench, follow_up, result

FULL = PublishRefused("the queue is full")
TOO_LARGE = MessageTooLarge("too large")
NO_QUEUE = Unroutable("no queue")


def refuse(bench: Bench, error: PublishError, seconds: float) -> int:
    """Refuse every publish for so many seconds; how many there were."""
    before = len(bench.publisher.sent)
    until = bench.loop.now + seconds
    while bench.loop.now < until:
        while bench.publisher.outstanding:
            bench.publisher.confirm(error)
        bench.loop.advance(0.25)
    return len(bench.publisher.sent) - before


def accept(bench: Bench) -> None:
    """Confirm the next attempt."""
    bench.loop.advance(5.0)
    bench.publisher.confirm_all()


@pytest.mark.parametrize("error", [FULL, ConnectionBlocked("alarm")])
def test_what_is_refused_for_now_is_published_again_and_its_task_is_not(error: PublishError) -> None:
    bench = Bench()
    bench.deliver("a")
    bench.end("a", publish=(follow_up(),))

    tries = refuse(bench, error, 3600.0)
    assert bench.frames == []
    assert 700 < tries < 800
    accept(bench)

    assert bench.frames == [("ack", 1, False)]
    assert bench.started == ["a"]
    assert bench.worker.following.held == 0


def test_tasks_whose_follow_ups_are_refused_for_good_do_not_keep_others_out() -> None:
    bench = Bench(slots=1)
    for number in range(50):
        bench.deliver(f"hostile-{number}")
        bench.end(f"hostile-{number}", publish=(follow_up(),))
        refuse(bench, FULL, 1.0)
    for _ in range(3):
        refuse(bench, FULL, 1.0)
        bench.pass_time(0.0)
    assert bench.worker.following.held == 50
    assert bench.consumer.windows["q"] > 50

    bench.deliver("good")
    bench.end("good")

    assert bench.frames == [("ack", 51, False)]


@pytest.mark.parametrize("prefetch", [None, 2])
def test_tasks_whose_results_are_not_confirmed_do_not_keep_others_out(prefetch: int | None) -> None:
    bench = Bench(slots=1, prefetch=prefetch)
    for number in range(45):
        bench.deliver(f"mute-{number}")
        bench.end(f"mute-{number}", result=result())
        if number in (3, 8, 21, 44):
            bench.pass_time(1.0)
            bench.pass_time(lifecycle.SILENT_SECONDS)
            bench.pass_time(1.0)
            bench.pass_time(1.0)
            assert bench.consumer.windows["q"] > number + 1

    accept(bench)
    bench.pass_time(1.0)
    bench.pass_time(1.0)
    assert bench.consumer.windows["q"] <= 2


def test_while_a_broker_answers_nothing_the_window_stays_and_with_its_next_answer_others_are_let_in() -> None:
    bench = Bench(slots=1)
    for number in range(8):
        bench.deliver(f"mute-{number}")
        bench.end(f"mute-{number}", result=result())
    before = bench.consumer.windows["q"]

    for _ in range(8):
        bench.pass_time(1.0)
        assert bench.consumer.windows["q"] == before
    bench.publisher.confirm()
    bench.pass_time(1.0)

    assert bench.consumer.windows["q"] > before + 6


def test_the_confirm_of_a_younger_message_lets_no_others_in() -> None:
    # As of a result, whose queue is on the node that has lost the others; a work queue's would need them.
    bench = Bench(slots=1)
    for number in range(8):
        bench.deliver(f"mute-{number}")
        bench.end(f"mute-{number}", result=result())
    before = bench.consumer.windows["q"]

    for _ in range(4):
        bench.pass_time(1.0)
        bench.publisher.confirm(which=-1)
        assert bench.consumer.windows["q"] == before


def test_a_broker_whose_last_answer_came_before_the_wait_was_seen_has_the_window_stay() -> None:
    bench = Bench(slots=1)
    for number in range(8):
        bench.deliver(f"mute-{number}")
        bench.end(f"mute-{number}", result=result())
    bench.pass_time(0.25)
    before = bench.consumer.windows["q"]
    bench.publisher.confirm()

    for _ in range(8):
        bench.pass_time(0.25)
        assert bench.consumer.windows["q"] == before


@pytest.mark.parametrize("error", [TOO_LARGE, PublishError("priority 300"), MessageRefused("user_id")])
def test_a_follow_up_that_never_can_be_published_fails_and_its_task_is_acked(error: PublishError) -> None:
    bench = Bench()
    bench.deliver("a")
    bench.end("a", publish=(follow_up("next"),), result=result())
    bench.publisher.confirm(error)
    step, own, failed = bench.publisher.sent
    assert (step.properties.headers["id"], own.routing_key, failed.routing_key) == (
        "next",
        "reply-queue",
        "reply-queue",
    )
    assert bench.frames == []

    bench.publisher.confirm_all()

    assert bench.frames == [("ack", 1, False)]
    assert bench.started == ["a"]


@pytest.mark.parametrize(("error", "seconds"), [(NO_QUEUE, 8), (AccessRefused("no right"), 40)])
def test_a_queue_or_a_right_that_is_missing_may_come_back_for_some_seconds(error: PublishError, seconds: float) -> None:
    bench = Bench()
    bench.deliver("a", "b")
    bench.end("a", publish=(follow_up(),))
    refuse(bench, error, 3.0)
    accept(bench)
    assert bench.frames == [("ack", 1, False)]

    bench.end("b", publish=(follow_up(),))
    refuse(bench, error, seconds)
    bench.publisher.confirm_all()

    assert bench.frames[1:] == [("ack", 2, False)]


def test_a_retry_that_never_can_be_published_is_its_tasks_failure_and_a_dead_letter() -> None:
    bench = Bench()
    bench.deliver("a")
    bench.end("a", state=states.RETRY, publish=(follow_up("a"),))
    bench.publisher.confirm(TOO_LARGE)
    dead = next(message for message in bench.publisher.sent if message.routing_key == "q.dead")
    assert "too large" in dead.properties.headers["x-amqtask-reason"]
    assert [message.routing_key for message in bench.publisher.sent].count("reply-queue") == 1
    bench.publisher.confirm_all()

    assert bench.frames == [("ack", 1, False)]
    assert bench.started == ["a"]


def test_a_dead_letter_that_is_refused_for_now_waits_and_its_message_stays_where_it_is() -> None:
    bench = Bench()
    bench.deliver("a")
    bench.end("a", state=states.FAILURE, answer=Answer.DEAD_LETTER, reason="rejected")
    refuse(bench, FULL, 600.0)
    assert bench.frames == []
    accept(bench)

    assert bench.frames == [("ack", 1, False)]


def test_a_dead_letter_that_never_can_be_copied_is_left_to_the_queues_own_policy() -> None:
    bench = Bench()
    bench.deliver("a")
    bench.end("a", state=states.FAILURE, answer=Answer.DEAD_LETTER, reason="rejected")
    bench.publisher.confirm(TOO_LARGE)
    bench.publisher.confirm(TOO_LARGE)

    assert bench.frames == [("reject", 1, False)]


def test_a_result_that_is_refused_for_a_minute_is_given_up() -> None:
    bench = Bench()
    bench.deliver("a", "b")
    bench.end("a", result=result())
    refuse(bench, FULL, 30.0)
    assert bench.frames == []
    accept(bench)
    assert bench.frames == [("ack", 1, False)]

    bench.end("b", result=result())
    refuse(bench, FULL, 70.0)

    assert bench.frames[1:] == [("ack", 2, False)]


def test_who_waits_for_a_result_that_is_too_large_is_told() -> None:
    bench = Bench()
    bench.deliver("a")
    bench.end("a", result=result())
    bench.publisher.confirm(TOO_LARGE)
    assert len(bench.publisher.sent) == 2
    assert bench.frames == []
    bench.publisher.confirm(TOO_LARGE)

    assert bench.frames == [("ack", 1, False)]


def test_an_eta_whose_delayed_copy_never_can_be_published_is_a_dead_letter() -> None:
    bench = Bench()
    bench.deliver("a", eta="2999-01-01T00:00:00+00:00")
    bench.publisher.confirm(TOO_LARGE)
    assert [message.routing_key for message in bench.publisher.sent[1:]] == ["reply-queue", "q.dead"]
    bench.publisher.confirm_all()

    assert bench.frames == [("ack", 1, False)]
    assert bench.started == []


def test_a_worker_that_stops_gives_back_what_it_cannot_finish_without_counting_it_as_failed() -> None:
    bench = Bench()
    bench.deliver("a")
    bench.end("a", publish=(follow_up(),))
    refuse(bench, FULL, 1.0)
    bench.worker.lifecycle.shutdown.warm()
    assert bench.frames == []
    refuse(bench, FULL, 20.0)

    assert bench.frames == [("nack", 1, True)]
    assert bench.worker.lifecycle.is_settled


def test_the_redelivery_of_a_task_whose_follow_up_is_held_is_answered_with_it() -> None:
    bench = Bench()
    bench.deliver("a")
    bench.end("a", publish=(follow_up(),))
    refuse(bench, FULL, 2.0)
    bench.lose_connection()
    bench.deliver("a", redelivered=True)
    assert bench.frames == []
    refuse(bench, FULL, 2.0)
    accept(bench)

    assert bench.frames == [("ack", 1, False)]
    assert bench.started == ["a"]


# -- a broker that acknowledges and publishes in one step


def replacing() -> Bench:
    """A worker on such a broker."""
    bench = Bench()
    bench.consumer.replaces = True
    return bench


def test_where_the_broker_can_an_answer_and_what_follows_are_one_step() -> None:
    bench = replacing()
    bench.deliver("a")
    bench.end("a", publish=(follow_up("b"), follow_up("c")))

    ((delivery, messages, on_done),) = bench.consumer.replaced
    assert (delivery.tag, bench.publisher.sent) == (1, [])
    assert [message.properties.headers["id"] for message in messages] == ["b", "c"]
    assert bench.worker.finisher.confirming
    on_done(True)

    assert not bench.worker.finisher.confirming
    assert not bench.worker.deliveries.outstanding - len(bench.frames)


def test_so_are_a_dead_letter_and_a_delay() -> None:
    bench = replacing()
    bench.deliver("a")
    bench.end("a", publish=(follow_up("errback"),), answer=Answer.DEAD_LETTER, reason="no")
    bench.deliver("b", eta="2100-01-01T00:00:00+00:00")

    first, second = (messages for _, messages, _ in bench.consumer.replaced)

    assert [message.routing_key for message in first][1:] == ["q.dead"]
    assert first[1].properties.headers["x-amqtask-reason"] == "no"
    assert [message.properties.headers["id"] for message in second] == ["b"]
    assert bench.publisher.sent == []


def test_what_such_a_broker_has_no_place_for_is_published_by_itself() -> None:
    bench = replacing()
    bench.deliver("a")
    bench.end("a", publish=(follow_up("b"),))
    bench.consumer.replaced[0][2](False)
    assert bench.frames == []
    refuse(bench, FULL, 10.0)
    accept(bench)

    assert bench.frames == [("ack", 1, False)]


def test_what_goes_back_to_its_queue_is_not_acknowledged_in_one_step() -> None:
    bench = replacing()
    bench.deliver("a")
    bench.end("a", publish=(follow_up("b"),), answer=Answer.REQUEUE)
    bench.publisher.confirm_all()

    assert bench.consumer.replaced == []
    assert bench.frames == [("reject", 1, True)]


@pytest.mark.parametrize("outcome", [{"result": result()}, {"publish": (follow_up(),), "result": result()}])
def test_an_outcome_with_a_result_for_its_caller_is_confirmed_first_on_every_broker(outcome: dict[str, Any]) -> None:
    bench = replacing()
    bench.deliver("a")
    bench.end("a", **outcome)
    assert bench.consumer.replaced == []
    bench.publisher.confirm_all()

    assert bench.frames == [("ack", 1, False)]

"""The life of a delivery, frame by frame: what the broker is told, and that it is told after everything else."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from amqtask import states
from amqtask.exceptions import MessageTooLarge, PublishError, Unroutable
from amqtask.execution.request import Answer
from amqtask.protocol.message import Delivery, OddHeaders, Properties
from amqtask.topology.declarations import QueueDefaults, work_queue
from amqtask.topology.delays import due_at
from amqtask.transport.contract import HostLeft
from tests.worker.bench import DEAD, Bench, result

DIED_BEFORE: dict[str, Any] = {"x-death": [{}]}


def test_a_task_is_acked_at_the_end_of_the_turn_in_which_it_ended() -> None:
    bench = Bench()
    bench.deliver("a")
    assert bench.frames == []

    bench.end("a")

    assert bench.frames == [("ack", 1, False)]


def test_tasks_that_end_in_one_turn_are_acked_by_one_frame() -> None:
    bench = Bench(slots=3)
    bench.deliver("a", "b", "c")
    for task_id in ("c", "a", "b"):
        bench.end(task_id)

    assert bench.frames == [("ack", 3, True)]


def test_a_result_is_confirmed_before_the_ack() -> None:
    bench = Bench()
    bench.deliver("a")
    bench.end("a", result=result())
    assert bench.frames == []

    bench.publisher.confirm()

    assert bench.frames == [("ack", 1, False)]


def test_a_retry_is_confirmed_before_the_ack() -> None:
    bench = Bench()
    bench.deliver("a")
    bench.end("a", state=states.RETRY, publish=(result(), result()), result=result())
    bench.publisher.confirm()
    bench.publisher.confirm()
    assert bench.frames == []

    bench.publisher.confirm()

    assert bench.frames == [("ack", 1, False)]


def test_a_result_that_nobody_waits_for_any_more_is_no_error() -> None:
    bench = Bench()
    bench.deliver("a")
    bench.end("a", result=result())
    bench.publisher.confirm(Unroutable("the caller has gone"))
    bench.publisher.confirm(PublishError("there is no such queue"))

    assert bench.frames == [("ack", 1, False)]


@pytest.mark.parametrize(
    ("answer", "frame"),
    [(Answer.REQUEUE, ("reject", 1, True)), (Answer.DROP, ("reject", 1, False))],
)
def test_the_other_answers_are_rejects(answer: Answer, frame: tuple[Any, ...]) -> None:
    bench = Bench()
    bench.deliver("a")
    bench.end("a", state=states.FAILURE, answer=answer)

    assert bench.frames == [frame]


def test_a_dead_letter_says_why_where_and_when_and_is_confirmed_before_the_ack() -> None:
    bench = Bench()
    bench.deliver("a", mine=1, **DIED_BEFORE)
    bench.end("a", state=states.FAILURE, answer=Answer.DEAD_LETTER, reason="rejected", summary="ValueError('x')")
    (dead,) = bench.publisher.sent
    assert bench.frames == []

    bench.publisher.confirm()

    assert bench.frames == [("ack", 1, False)]
    assert (dead.exchange, dead.routing_key, dead.body) == ("", "q.dead", b"[[], {}, {}]")
    headers = dead.properties.headers
    assert headers["x-amqtask-reason"] == "rejected"
    assert headers["x-amqtask-exception"] == "ValueError('x')"
    assert headers["x-amqtask-host"] == "w@h"
    assert headers["x-amqtask-attempts"] == 1
    assert headers["x-amqtask-queue"] == "q"
    assert headers["x-amqtask-died-at"]
    assert headers["mine"] == 1
    assert "x-death" not in headers


def test_a_missing_dead_letter_queue_is_declared() -> None:
    bench = Bench()
    bench.deliver("a")
    bench.end("a", state=states.FAILURE, answer=Answer.DEAD_LETTER, reason="rejected")
    bench.publisher.confirm(Unroutable("no queue"))
    assert bench.publisher.sent[-1].declare == (DEAD,)

    bench.publisher.confirm()

    assert bench.frames == [("ack", 1, False)]


def test_without_a_dead_letter_queue_the_queues_own_policy_decides() -> None:
    bench = Bench(dead_letter=None)
    bench.deliver("a")
    bench.end("a", state=states.FAILURE, answer=Answer.DEAD_LETTER, reason="rejected")

    assert bench.frames == [("reject", 1, False)]


def test_early_acks_go_out_before_the_task_runs_and_only_once() -> None:
    bench = Bench()
    bench.deliver("a", task="early")
    assert bench.frames == [("ack", 1, False)]
    assert bench.started == ["a"]

    bench.end("a")
    bench.deliver("b")
    bench.end("b")

    assert bench.frames == [("ack", 1, False), ("ack", 2, False)]


def test_an_early_acked_task_that_waits_is_not_acked_yet() -> None:
    bench = Bench(slots=1)
    bench.deliver("a", "b", task="early")

    assert bench.frames == [("ack", 1, False)]


def test_an_early_acked_task_that_is_revoked_while_it_waits_is_answered() -> None:
    bench = Bench(slots=1)
    bench.deliver("a")
    bench.deliver("b", task="early")
    bench.operations.revoke(["b"])

    bench.end("a")

    assert bench.frames == [("ack", 2, True)]
    assert bench.worker.deliveries.outstanding == 0


@pytest.mark.parametrize(
    "headers",
    [
        {"eta": "2999-01-01T00:00:00+00:00"},
        {"eta": "2999-01-01T00:00:00+00:00", "expires": "2999-01-02T00:00:00+00:00"},
    ],
)
def test_a_task_with_an_eta_goes_to_the_delay_levels_confirm_first_ack_second(headers: dict[str, Any]) -> None:
    bench = Bench()
    bench.deliver("a", **headers)
    (delayed,) = bench.publisher.sent
    assert (delayed.exchange.startswith("amqtask.delay."), delayed.routing_key) == (True, "q")
    assert bench.frames == []

    bench.publisher.confirm()

    assert bench.frames == [("ack", 1, False)]
    assert bench.started == []


def test_the_consumer_is_told_how_many_deliveries_of_one_queue_have_no_answer() -> None:
    bench = Bench(slots=2)
    bench.deliver("one", "two", "three")

    assert bench.worker.unanswered("q") == 3
    assert bench.worker.unanswered("another") == 0

    bench.end("one")
    bench.loop.turn()

    assert bench.worker.unanswered("q") == 2


def test_an_expired_task_is_acked_and_does_not_run() -> None:
    bench = Bench()
    bench.deliver("a", expires="2001-01-01T00:00:00+00:00")

    assert bench.frames == [("ack", 1, False)]
    assert bench.started == []


@pytest.mark.parametrize(
    ("delivered", "reason"),
    [
        ({"task": "nobody.knows"}, "NotRegistered"),
        ({"task": None}, "InvalidTaskError"),
        ({"task": None, "body": b"\xff"}, "Undecodable"),
        ({"task": 12}, "InvalidTaskError"),
        ({"eta": "tomorrow"}, "InvalidTaskError"),
        ({"redelivered": True, "x-delivery-count": 5}, "WorkerLostError"),
    ],
)
def test_what_cannot_be_run_is_dead_lettered_with_its_reason_and_result(delivered: dict[str, Any], reason: str) -> None:
    bench = Bench()
    bench.deliver("a", **delivered)
    result_message, dead = bench.publisher.sent
    assert result_message.routing_key == "reply-queue"
    assert dead.properties.headers["x-amqtask-reason"] == reason
    assert bench.frames == []

    bench.publisher.confirm_all()

    assert bench.frames == [("ack", 1, False)]
    assert bench.started == []


@pytest.mark.parametrize("error", [TimeoutError("the broker has not answered for 2 s"), ConnectionError("cut")])
def test_deliveries_to_connections_that_were_lost_are_not_counted_against_a_task(error: Exception) -> None:
    bench = Bench(silence_seconds=60.0)
    bench.lose_connection(error)
    counted: dict[str, Any] = {"x-delivery-count": 3}
    bench.deliver("a", redelivered=True, **counted)
    (later,) = bench.publisher.sent
    assert later.exchange.startswith("amqtask.delay")
    assert "x-delivery-count" not in later.properties.headers
    assert bench.frames == []

    bench.publisher.confirm()

    assert bench.frames == [("ack", 1, False)]


def test_while_connections_are_lost_a_task_runs_again_until_the_brokers_own_limit_is_near() -> None:
    bench = Bench(queue=work_queue("q", QueueDefaults(delivery_limit=5)))
    bench.lose_connection()
    counted: dict[str, Any] = {"x-delivery-count": 17}
    bench.deliver("runs", redelivered=True, **counted)
    assert bench.started == ["runs"]

    counted = {"x-delivery-count": 18}
    bench.deliver("anew", redelivered=True, **counted)
    (later,) = bench.publisher.sent
    assert later.exchange.startswith("amqtask.delay")
    assert bench.started == ["runs"]


def test_what_begins_anew_after_a_silent_connection_comes_back_within_seconds() -> None:
    bench = Bench(silence_seconds=180.0)
    bench.lose_connection(TimeoutError("the broker has not answered for 2 s"))
    counted: dict[str, Any] = {"x-delivery-count": 4}
    bench.deliver("a", redelivered=True, **counted)

    (later,) = bench.publisher.sent
    assert later.routing_key == "q"
    due = due_at(later.properties.headers)
    assert due is not None
    assert due < time.time() + 11


def test_a_count_of_deliveries_is_believed_by_a_worker_that_lost_no_connection() -> None:
    bench = Bench(queue=work_queue("q", QueueDefaults(delivery_limit=5)))
    counted: dict[str, Any] = {"x-delivery-count": 5}
    bench.deliver("a", redelivered=True, **counted)
    bench.publisher.confirm_all()

    assert bench.publisher.sent[-1].routing_key == "q.dead"
    assert bench.started == []


def test_a_task_that_begins_anew_too_often_is_dead_lettered() -> None:
    bench = Bench()
    bench.lose_connection()
    counted: dict[str, Any] = {"x-delivery-count": 5, "amqtask-begun-anew": 3}
    bench.deliver("a", redelivered=True, **counted)
    bench.publisher.confirm_all()

    assert [message.routing_key for message in bench.publisher.sent] == ["reply-queue", "q.dead"]
    assert bench.frames == [("ack", 1, False)]


def test_headers_that_break_the_reading_do_not_break_the_worker() -> None:
    class Hostile(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            if key == "timelimit":
                raise RuntimeError("unreadable")
            return super().get(key, default)

    bench = Bench()
    properties = Properties(headers=Hostile(task="t", id="a"))
    bench.worker.on_delivery(Delivery(b"", properties, "", "q", False, "q", 1, 1))
    bench.publisher.confirm_all()

    assert bench.frames == [("ack", 1, False)]


@pytest.mark.parametrize(
    "headers",
    [
        {"eta": "9" * 50_000},
        {"id": ["i"]},
        {"id": "a\nb"},
        {"shadow": {}, "task": 7},
        {"timelimit": [-5, float("nan")]},
    ],
)
def test_a_message_that_cannot_be_taken_is_answered_like_any_other(headers: dict[str, Any]) -> None:
    bench = Bench()
    bench.deliver("a")
    bench.worker.on_delivery(
        Delivery(b"[[], {}, {}]", Properties(headers={"task": "t", "id": "b", **headers}), "", "q", False, "q", 2, 1)
    )
    bench.deliver("c")
    bench.publisher.confirm_all()

    assert {"a", "c"} <= {request.id for request in [*bench.pool.started, *bench.worker.dispatcher]}


def test_odd_headers_are_refused_with_what_is_odd_about_them() -> None:
    bench = Bench()
    odd = OddHeaders("the header 'w': a time beyond the calendar", {"task": "t", "id": "a"})
    bench.worker.on_delivery(Delivery(b"[]", Properties(headers=odd), "", "q", False, "q", 1, 1))
    _, dead = bench.publisher.sent

    assert dead.properties.headers["x-amqtask-exception"] == odd.problem
    assert bench.started == []


def test_a_slot_reads_the_large_body_of_an_unknown_task() -> None:
    bench = Bench()
    bench.deliver("large", task="no.such", body=b" " * 5_000_000)
    bench.deliver("packed", task="no.such", compression="zlib")

    assert bench.started == ["large", "packed"]
    assert bench.publisher.sent == []


def test_a_dead_letter_that_the_broker_does_not_take_goes_with_its_reason_name_and_id_alone() -> None:
    bench = Bench()
    bench.deliver("a", task="no.such", own="header")
    dead = bench.publisher.sent[-1]
    bench.publisher.confirm()
    bench.publisher.confirm(MessageTooLarge("a frame that is too large"))
    bare = bench.publisher.sent[-1]

    reasons = {name for name in dead.properties.headers if name.startswith("x-amqtask-")}
    assert set(bare.properties.headers) == {*reasons, "task", "id"}
    assert (bare.body, bare.routing_key) == (dead.body, "q.dead")


def test_a_protocol_v1_task_runs() -> None:
    bench = Bench()
    bench.deliver("?", task=None, body=b'{"task": "t", "id": "old", "args": [1], "kwargs": {}}')

    assert bench.started == ["old"]


# -- revokes


def test_a_revoked_task_does_not_run() -> None:
    bench = Bench()
    bench.operations.revoke(["a"])
    bench.deliver("a", "b")

    assert bench.started == ["b"]
    assert bench.frames == [("ack", 1, False)]


def test_a_task_revoked_while_it_waits_does_not_run() -> None:
    bench = Bench(slots=1)
    bench.deliver("a", "b", "c")
    bench.operations.revoke(["b"])
    bench.end("a")

    assert bench.frames == [("ack", 2, True)]
    assert bench.started == ["a", "c"]


# -- lost connections


def test_what_waited_on_a_lost_connection_is_forgotten_and_what_ran_is_not_acked() -> None:
    bench = Bench(slots=1)
    bench.deliver("a", "b")
    bench.lose_connection()
    bench.end("a")

    assert bench.frames == []
    assert bench.started == ["a"]


def test_the_redelivery_of_an_ended_task_is_answered_and_not_run_again() -> None:
    bench = Bench(slots=1)
    bench.deliver("a")
    bench.lose_connection()
    bench.end("a")
    bench.deliver("a", redelivered=True)

    assert bench.frames == [("ack", 1, False)]
    assert bench.started == ["a"]


@pytest.mark.parametrize(
    ("error", "went_to"), [(HostLeft("it delivers nothing"), ["amqp://one"]), (ConnectionError("cut"), [])]
)
def test_the_other_connections_follow_to_the_host_that_the_consumer_has_left_another_one_for(
    error: Exception, went_to: list[str]
) -> None:
    bench = Bench()
    others: list[str] = []
    bench.worker.followers.append(lambda host, reason: others.append(host))

    bench.lose_connection(error)

    assert bench.publisher.went_to == others == went_to


def test_a_task_whose_ack_got_lost_with_the_connection_is_not_run_again() -> None:
    bench = Bench(slots=1)
    bench.deliver("a")
    bench.end("a")
    bench.loop.turn()
    bench.lose_connection()
    bench.deliver("a", redelivered=True)

    assert bench.frames == [("ack", 1, False)]
    assert bench.started == ["a"]


def test_the_redelivery_of_a_running_task_waits_for_its_outcome() -> None:
    bench = Bench(slots=2)
    bench.deliver("a")
    bench.lose_connection()
    bench.deliver("a", redelivered=True)
    assert bench.frames == []
    assert bench.started == ["a"]

    bench.end("a", result=result())
    assert bench.frames == []
    bench.publisher.confirm()

    assert bench.frames == [("ack", 1, False)]


def test_a_lost_childs_redelivery_runs_again_after_a_lost_connection() -> None:
    bench = Bench(slots=2)
    bench.deliver("a")
    bench.lose_connection()
    bench.end("a", state=states.FAILURE, answer=Answer.REQUEUE, reason="lost", summary="WorkerLostError()")
    bench.deliver("a", redelivered=True)

    assert bench.started == ["a", "a"]


def test_an_answer_is_never_given_on_another_channel() -> None:
    bench = Bench(slots=3)
    bench.deliver("a", "b", "c")
    bench.end("a", result=result())
    bench.lose_connection()
    bench.deliver("d", "e")
    bench.end("b")
    bench.end("c", state=states.FAILURE, answer=Answer.REQUEUE)
    bench.publisher.confirm_all()

    assert bench.frames == []


def test_a_channel_that_died_unsaid_is_noticed_before_anything_is_answered() -> None:
    bench = Bench(slots=3)
    bench.deliver("a", "b")
    bench.reconnect()
    bench.end("a")
    bench.worker.lifecycle.shutdown.warm()

    assert bench.frames == []


def test_a_requeue_with_a_pause_waits_in_the_delay_levels() -> None:
    bench = Bench()
    bench.deliver("a")
    bench.end("a", state=states.REJECTED, answer=Answer.REQUEUE, reason="the store is away", pause=5.0)
    (delayed,) = bench.publisher.sent
    assert (delayed.exchange.startswith("amqtask.delay."), delayed.routing_key) == (True, "q")
    bench.publisher.confirm()

    assert bench.frames == [("ack", 1, False)]


LOST = {
    "state": states.FAILURE,
    "answer": Answer.REQUEUE,
    "reason": "killed by SIGKILL",
    "summary": "WorkerLostError()",
}


def test_lost_children_of_a_queue_without_delivery_counts_are_counted_here() -> None:
    bench = Bench(delivery_limit=2)
    bench.deliver("a")
    bench.end("a", **LOST)
    bench.pass_time(0.5)
    bench.deliver("a", redelivered=True)
    bench.end("a", **LOST)

    assert bench.started == ["a", "a"]
    headers = bench.publisher.sent[-1].properties.headers
    assert headers["x-amqtask-attempts"] == 2
    assert headers["x-amqtask-exception"] == "delivered 2 times without an end: killed by SIGKILL"


def test_a_task_that_took_its_process_with_it_goes_back_after_a_pause_that_grows() -> None:
    bench = Bench(delivery_limit=5)
    pauses = []
    for attempt in range(4):
        counted: dict[str, Any] = {"x-delivery-count": attempt} if attempt else {}
        bench.deliver("a", redelivered=attempt > 0, **counted)
        bench.end("a", **LOST)
        began = bench.loop.now
        assert bench.frames == []
        while not bench.frames:
            bench.pass_time(0.25)
        assert bench.frames == [("reject", bench.tag, True)]
        bench.consumer.frames.clear()
        pauses.append(bench.loop.now - began)

    assert pauses == [0.5, 1.0, 2.0, 4.0]


def test_a_lost_task_that_waits_to_go_back_keeps_no_other_out_and_no_shutdown_waiting() -> None:
    bench = Bench(slots=1, delivery_limit=5)
    bench.deliver("a")
    bench.end("a", **LOST)
    bench.pass_time(0.1)
    assert bench.worker.windows.by_queue["q"].current == 2

    bench.worker.lifecycle.shutdown.warm()
    assert ("reject", 1, True) in bench.frames
    assert bench.worker.lifecycle.is_settled


# -- prefetch


def test_short_tasks_open_the_window() -> None:
    bench = Bench(slots=1)
    assert bench.consumer.windows == {"q": 1}
    bench.deliver("a")
    bench.end("a", runtime=0.0001)
    bench.deliver("b")
    bench.pass_time(0.02)

    assert bench.consumer.windows["q"] > 20


def test_long_tasks_close_the_window_and_what_waits_is_given_back() -> None:
    bench = Bench(slots=1)
    bench.deliver("a")
    bench.end("a", runtime=0.0001)
    bench.pass_time(0.02)
    bench.deliver("b", "c", "d")
    bench.deliver("e", redelivered=True)
    bench.pass_time(2.0)
    bench.end("b", runtime=2.0)
    bench.pass_time(0.1)
    bench.pass_time(0.25)

    assert ("nack", 4, True) in bench.frames
    assert bench.consumer.windows == {"q": 1}
    assert bench.started == ["a", "b", "c"]
    bench.end("c")
    bench.loop.turn()
    assert bench.started[-1] == "e"


def test_long_tasks_have_what_the_pool_has_not_begun_given_back() -> None:
    bench = Bench(slots=3)
    bench.deliver("a")
    bench.end("a", runtime=0.0001)
    bench.pass_time(0.02)
    bench.deliver("b", "c", "d")
    bench.pool.unbegun = [4]
    bench.pass_time(2.0)
    bench.end("b", runtime=2.0)
    bench.pass_time(0.1)
    bench.pass_time(0.25)

    assert ("nack", 4, True) in bench.frames


def test_a_pinned_window_does_not_change() -> None:
    bench = Bench(slots=1, prefetch=4)
    bench.deliver("a")
    bench.end("a", runtime=0.0001)
    bench.loop.advance(1.0)

    assert bench.consumer.windows == {"q": 4}


# -- stopping


def test_a_warm_stop_gives_back_what_waits_and_acks_what_ends() -> None:
    bench = Bench(slots=1)
    bench.deliver("a", "b", "c")
    bench.worker.lifecycle.shutdown.warm()
    assert bench.frames == [("nack", 2, True), ("nack", 3, True)]
    bench.deliver("late")
    assert bench.frames[-1] == ("nack", 4, True)
    assert not bench.loop.stopped

    bench.end("a", result=result())
    bench.publisher.confirm()

    assert bench.frames[-1] == ("ack", 1, False)
    assert bench.consumer.words == ["pause", "stop"]
    assert bench.loop.stopped
    assert bench.worker.lifecycle.shutdown.exit_code == 0


def test_a_warm_stop_gives_back_what_the_pool_has_not_begun() -> None:
    bench = Bench(slots=3)
    bench.deliver("a", "b")
    bench.deliver("c", task="early")
    bench.pool.unbegun = [2, 3]
    bench.worker.lifecycle.shutdown.warm()

    assert ("nack", 2, True) in bench.frames
    assert [request.id for request in bench.pool.running.values()] == ["a", "c"]  # c was acked when it was accepted


def test_a_cold_stop_gives_back_what_runs() -> None:
    bench = Bench(slots=1)
    bench.deliver("a")
    bench.worker.lifecycle.shutdown.cold()

    assert bench.frames == [("nack", 1, True)]
    assert bench.loop.stopped
    assert bench.worker.lifecycle.shutdown.exit_code == 1


def test_a_cold_stop_waits_for_results_on_their_way() -> None:
    bench = Bench(slots=1)
    bench.deliver("a")
    bench.end("a", result=result())
    bench.worker.lifecycle.shutdown.cold()
    assert not bench.loop.stopped

    bench.publisher.confirm()
    bench.loop.turn()

    assert bench.frames == [("ack", 1, False)]
    assert bench.loop.stopped


def test_everything_received_is_answered_exactly_once() -> None:
    """Any order of ends and answers, over one channel: each tag gets one frame's worth of answer."""
    for seed in range(30):
        rng = random.Random(seed)
        bench = Bench(slots=4, prefetch=50)
        count = 60
        for number in range(count):
            task = rng.choice(["t", "t", "t", "early", "nobody.knows"])
            bench.deliver(f"{number}", task=task)
            while bench.pool.running and rng.random() < 0.5:
                victim = rng.choice([request.id for request in bench.pool.running.values()])
                answer = rng.choice([Answer.ACK, Answer.ACK, Answer.REQUEUE, Answer.DEAD_LETTER, Answer.DROP])
                bench.end(victim, answer=answer, result=result() if rng.random() < 0.5 else None)
                if rng.random() < 0.5:
                    bench.publisher.confirm_all()
                bench.loop.turn()
        while bench.pool.running:
            bench.end(next(iter(bench.pool.running.values())).id)
            bench.loop.turn()
        bench.publisher.confirm_all()

        answered: list[int] = []
        open_tags = set(range(1, count + 1))
        for kind, tag, flag in bench.frames:
            tags = {other for other in open_tags if other <= tag} if kind == "ack" and flag else {tag}
            assert tags <= open_tags, f"seed {seed}: {kind} {tag} was answered before"
            open_tags -= tags
            answered += tags
        assert open_tags == set(), f"seed {seed}"


def test_a_window_with_rate_limited_tasks_has_room_for_them() -> None:
    bench = Bench(slots=1)
    bench.operations.set_rate_limit("t", "2/s")
    bench.deliver("a", "b")
    bench.end("a", runtime=1.0)
    bench.pass_time(0.1)

    assert bench.consumer.windows["q"] == 5


def test_a_worker_that_stops_does_not_wait_for_ever_for_a_confirm() -> None:
    bench = Bench(slots=1)
    bench.deliver("a")
    bench.end("a", result=result())
    bench.loop.turn()
    bench.worker.lifecycle.shutdown.warm("TERM")
    bench.pass_time(10)
    assert not bench.loop.stopped

    bench.pass_time(10)
    bench.loop.advance(3)

    assert bench.loop.stopped
    assert bench.frames == []  # the broker gives it to somebody else


def test_a_worker_that_stops_waits_as_long_as_confirms_come() -> None:
    bench = Bench(slots=1)
    for task_id in "abc":
        bench.deliver(task_id)
        bench.end(task_id, result=result())
        bench.loop.turn()
    bench.worker.lifecycle.shutdown.warm("TERM")
    for _ in range(3):
        bench.pass_time(10)
        assert not bench.loop.stopped
        bench.publisher.confirm()
    bench.pass_time(0)
    bench.loop.advance(3)

    assert bench.loop.stopped


def test_a_warm_shutdown_says_what_it_waits_for(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(slots=7)
    bench.deliver(*"abcdefg")
    bench.worker.lifecycle.shutdown.warm("SIGINT")

    assert "waits for 7 tasks: t[a] (0 s), t[b] (0 s), t[c] (0 s), t[d] (0 s), t[e] (0 s) and 2 more" in caplog.text
    for task_id in "abcdefg":
        bench.end(task_id, result=result() if task_id == "g" else None)
    assert bench.worker.lifecycle.waits_for == "the broker's confirms (results, retries, dead letters): 1 to come"

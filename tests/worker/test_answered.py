"""What a worker remembers of deliveries whose channel died."""

from __future__ import annotations

from amqtask.execution.outcome import Answer
from amqtask.execution.request import Request
from amqtask.worker.redeliveries import Answered


def request(number: int, task_id: str = "a", retries: int = 0) -> Request:
    return Request(number=number, id=task_id, task="t", headers={"retries": retries}, redelivered=True)


def test_a_redelivery_of_an_ended_orphan_gets_its_answer() -> None:
    answered = Answered()
    orphan = request(1)
    answered.adopt([orphan], [])
    answered.ended(orphan, Answer.ACK)

    assert answered.recall(request(2)) is Answer.ACK


def test_a_redelivery_of_a_running_orphan_is_parked_until_it_ends() -> None:
    answered = Answered()
    orphan, redelivery = request(1), request(2)
    answered.adopt([orphan], [])

    assert answered.recall(redelivery) is None
    assert answered.park(redelivery)
    assert answered.ended(orphan, Answer.ACK) == [redelivery]
    assert answered.parked == 0


def test_a_retry_with_the_same_id_is_another_run() -> None:
    answered = Answered()
    orphan = request(1)
    answered.adopt([orphan], [])
    answered.ended(orphan, Answer.ACK)

    assert answered.recall(request(2, retries=1)) is None
    assert not answered.park(request(3, retries=1))


def test_an_orphan_that_wants_to_be_requeued_runs_again() -> None:
    answered = Answered()
    orphan = request(1)
    answered.adopt([orphan], [])
    answered.ended(orphan, Answer.REQUEUE)

    assert answered.recall(request(2)) is None


def test_a_second_lost_channel_voids_what_was_parked_on_it() -> None:
    answered = Answered()
    orphan = request(1)
    answered.adopt([orphan], [])
    answered.park(request(2))
    answered.adopt([orphan], [])

    assert answered.ended(orphan, Answer.ACK) == []
    assert answered.recall(request(3)) is Answer.ACK


def test_acks_that_may_not_have_arrived_count_as_answers() -> None:
    answered = Answered()
    answered.acked({"id": "a", "retries": 0})
    answered.adopt([], [request(1, "b")])

    assert answered.recall(request(2, "a")) is Answer.ACK
    assert answered.recall(request(3, "b")) is None


def test_an_id_that_was_used_twice_is_run_rather_than_skipped() -> None:
    answered = Answered()
    running, waiting = request(1, "a"), request(2, "a")
    answered.acked({"id": "b", "retries": 0})
    answered.adopt([running], [waiting, request(3, "b")])

    assert not answered.park(request(4, "a"))
    assert answered.ended(running, Answer.ACK) == []
    assert answered.recall(request(5, "a")) is None
    assert answered.recall(request(6, "b")) is None


def test_an_answer_is_forgotten_when_its_id_was_used_again() -> None:
    answered = Answered()
    answered.acked({"id": "a", "retries": 0})
    answered.adopt([], [])
    answered.adopt([], [request(1, "a")])

    assert answered.recall(request(2, "a")) is None


def test_an_answer_is_remembered_for_minutes_only() -> None:
    now = [0.0]
    answered = Answered(clock=lambda: now[0])
    answered.acked({"id": "a", "retries": 0})
    answered.adopt([], [])
    now[0] = 599.0
    assert answered.recall(request(1, "a")) is Answer.ACK
    now[0] = 601.0

    assert answered.recall(request(1, "a")) is None


def test_only_the_newest_are_remembered() -> None:
    answered = Answered(limit=2)
    for number in range(3):
        orphan = request(number, f"id-{number}")
        answered.adopt([orphan], [])
        answered.ended(orphan, Answer.ACK)

    assert answered.recall(request(9, "id-0")) is None
    assert answered.recall(request(9, "id-2")) is Answer.ACK

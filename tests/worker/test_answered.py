"""What a worker remembers of deliveries whose channel died."""

from __future__ import annotations

from amqtask.execution.request import Answer, Request
from amqtask.worker.deliveries import Redeliveries


def request(number: int, task_id: str = "a", retries: int = 0) -> Request:
    return Request(number=number, id=task_id, task="t", headers={"retries": retries}, redelivered=True)


def test_a_redelivery_of_an_ended_orphan_gets_its_answer() -> None:
    redeliveries = Redeliveries()
    orphan = request(1)
    redeliveries.adopt([orphan], [])
    redeliveries.ended(orphan, Answer.ACK)

    assert redeliveries.recall(request(2)) is Answer.ACK


def test_a_redelivery_of_a_running_orphan_is_parked_until_it_ends() -> None:
    redeliveries = Redeliveries()
    orphan, redelivery = request(1), request(2)
    redeliveries.adopt([orphan], [])

    assert redeliveries.recall(redelivery) is None
    assert redeliveries.park(redelivery)
    assert redeliveries.ended(orphan, Answer.ACK) == [redelivery]
    assert redeliveries.parked == 0


def test_a_retry_with_the_same_id_is_another_run() -> None:
    redeliveries = Redeliveries()
    orphan = request(1)
    redeliveries.adopt([orphan], [])
    redeliveries.ended(orphan, Answer.ACK)

    assert redeliveries.recall(request(2, retries=1)) is None
    assert not redeliveries.park(request(3, retries=1))


def test_an_orphan_that_wants_to_be_requeued_runs_again() -> None:
    redeliveries = Redeliveries()
    orphan = request(1)
    redeliveries.adopt([orphan], [])
    redeliveries.ended(orphan, Answer.REQUEUE)

    assert redeliveries.recall(request(2)) is None


def test_a_second_lost_channel_voids_what_was_parked_on_it() -> None:
    redeliveries = Redeliveries()
    orphan = request(1)
    redeliveries.adopt([orphan], [])
    redeliveries.park(request(2))
    redeliveries.adopt([orphan], [])

    assert redeliveries.ended(orphan, Answer.ACK) == []
    assert redeliveries.recall(request(3)) is Answer.ACK


def test_acks_that_may_not_have_arrived_count_as_answers() -> None:
    redeliveries = Redeliveries()
    redeliveries.acked({"id": "a", "retries": 0})
    redeliveries.adopt([], [request(1, "b")])

    assert redeliveries.recall(request(2, "a")) is Answer.ACK
    assert redeliveries.recall(request(3, "b")) is None


def test_an_id_that_was_used_twice_is_run_rather_than_skipped() -> None:
    redeliveries = Redeliveries()
    running, waiting = request(1, "a"), request(2, "a")
    redeliveries.acked({"id": "b", "retries": 0})
    redeliveries.adopt([running], [waiting, request(3, "b")])

    assert not redeliveries.park(request(4, "a"))
    assert redeliveries.ended(running, Answer.ACK) == []
    assert redeliveries.recall(request(5, "a")) is None
    assert redeliveries.recall(request(6, "b")) is None


def test_an_answer_is_forgotten_when_its_id_was_used_again() -> None:
    redeliveries = Redeliveries()
    redeliveries.acked({"id": "a", "retries": 0})
    redeliveries.adopt([], [])
    redeliveries.adopt([], [request(1, "a")])

    assert redeliveries.recall(request(2, "a")) is None


def test_an_answer_is_remembered_for_minutes_only() -> None:
    now = [0.0]
    redeliveries = Redeliveries(clock=lambda: now[0])
    redeliveries.acked({"id": "a", "retries": 0})
    redeliveries.adopt([], [])
    now[0] = 599.0
    assert redeliveries.recall(request(1, "a")) is Answer.ACK
    now[0] = 601.0

    assert redeliveries.recall(request(1, "a")) is None


def test_only_the_newest_are_remembered() -> None:
    redeliveries = Redeliveries(limit=2)
    for number in range(3):
        orphan = request(number, f"id-{number}")
        redeliveries.adopt([orphan], [])
        redeliveries.ended(orphan, Answer.ACK)

    assert redeliveries.recall(request(9, "id-0")) is None
    assert redeliveries.recall(request(9, "id-2")) is Answer.ACK


def test_messages_without_an_id_are_not_taken_for_each_other() -> None:
    redeliveries = Redeliveries()
    running = request(1, "")
    redeliveries.adopt([running], [])

    assert not redeliveries.park(request(2, ""))
    redeliveries.ended(running, Answer.ACK)
    assert redeliveries.recall(request(3, "")) is None

from __future__ import annotations

from amqtask.execution.request import Request
from amqtask.worker.finisher import Lost
from tests.worker.fakes import HandLoop


def test_lost_runs_are_counted_per_task_id_within_bounds() -> None:
    lost = Lost(
        HandLoop(),
        give_back=lambda request: None,
        delivery_limit=lambda queue: 5,
        remembered=2,
    )
    requests = {task_id: Request(number=1, id=task_id, task="t", headers={}, body=b"") for task_id in "abc"}
    for task_id in "aabc":
        lost.is_last(requests[task_id])

    assert [lost.attempts(request) for request in requests.values()] == [0, 1, 1]


def test_messages_without_an_id_are_not_counted_for_each_other() -> None:
    lost = Lost(HandLoop(), give_back=lambda request: None, delivery_limit=lambda queue: 5)
    kills, innocent = (Request(number=1, id="", task="t", headers={}, body=body) for body in (b"[1]", b"[2]"))
    for _ in range(4):
        lost.is_last(kills)

    assert [lost.attempts(request) for request in (kills, innocent)] == [4, 0]


def test_a_senders_count_of_deliveries_is_not_the_brokers() -> None:
    """In a classic queue it would have run for ever, and killed a process each time."""
    lost = Lost(
        HandLoop(),
        give_back=lambda request: None,
        delivery_limit=lambda queue: 5,
        is_counting=lambda queue: queue == "quorum",
    )
    for queue in ("classic", "quorum"):
        request = Request(number=1, id=queue, task="t", headers={"x-delivery-count": 4}, queue=queue, attempts=4)
        lost.is_last(request)

        assert lost.attempts(request) == {"classic": 1, "quorum": 4}[queue]

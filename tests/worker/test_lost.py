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
    for task_id in ("a", "a", "b", "c"):
        lost.is_last(Request(number=1, id=task_id, task="t", headers={}, body=b""))

    assert [lost.count(task_id) for task_id in "abc"] == [0, 1, 1]


def test_a_senders_count_of_deliveries_is_not_the_brokers() -> None:
    """In a classic queue it would have run for ever, and killed a process each time."""
    lost = Lost(
        HandLoop(),
        give_back=lambda request: None,
        delivery_limit=lambda queue: 5,
        is_counting=lambda queue: queue == "quorum",
    )
    for queue in ("classic", "quorum"):
        lost.is_last(Request(number=1, id=queue, task="t", headers={"x-delivery-count": "x"}, queue=queue))

    assert [lost.count(queue) for queue in ("classic", "quorum")] == [1, 0]

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

from __future__ import annotations

import pytest

from amqtask.execution.request import Request
from amqtask.protocol.entities import Queue, arguments
from amqtask.worker import finisher
from amqtask.worker.finisher import Lost
from amqtask.worker.options import WorkQueue, WorkQueues
from tests.worker.fakes import HandLoop


def lost_of(*queues: Queue) -> Lost:
    return Lost(HandLoop(), WorkQueues([WorkQueue(queue, None) for queue in queues], 5), lambda request, answer: None)


def test_lost_runs_are_counted_per_task_id_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finisher, "REMEMBERED", 2)
    lost = lost_of()
    requests = {task_id: Request(number=1, id=task_id, task="t", headers={}, body=b"") for task_id in "abc"}
    for task_id in "aabc":
        lost.is_last(requests[task_id])

    assert [lost.attempts(request) for request in requests.values()] == [0, 1, 1]


def test_messages_without_an_id_are_not_counted_for_each_other() -> None:
    lost = lost_of()
    kills, innocent = (Request(number=1, id="", task="t", headers={}, body=body) for body in (b"[1]", b"[2]"))
    for _ in range(4):
        lost.is_last(kills)

    assert [lost.attempts(request) for request in (kills, innocent)] == [4, 0]


def test_a_senders_count_of_deliveries_is_not_the_brokers() -> None:
    """In a classic queue it would have run for ever, and killed a process each time."""
    lost = lost_of(Queue("classic", arguments=arguments({"x-queue-type": "classic"})), Queue("quorum"))
    for queue in ("classic", "quorum"):
        request = Request(number=1, id=queue, task="t", headers={"x-delivery-count": 4}, queue=queue, attempts=4)
        lost.is_last(request)

        assert lost.attempts(request) == {"classic": 1, "quorum": 4}[queue]

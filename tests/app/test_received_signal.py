"""`task_received` tells of tasks that are to run; of others `task_unknown` and `task_revoked` do, as in Celery."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from amqtask import AmqTask, signals
from amqtask.exceptions import TaskRevokedError
from amqtask.testing.worker import start_worker


@pytest.fixture
def heard() -> Iterator[Counter[tuple[str, str]]]:
    """How often each signal came, by the task's name."""
    counted: Counter[tuple[str, str]] = Counter()

    def received(request: Any, **_: object) -> None:
        counted["received", request.name] += 1

    def unknown(name: str, **_: object) -> None:
        counted["unknown", name] += 1

    def revoked(sender: Any, **_: object) -> None:
        counted["revoked", getattr(sender, "name", sender)] += 1

    receivers: Any = (
        (signals.task_received, received),
        (signals.task_unknown, unknown),
        (signals.task_revoked, revoked),
    )
    for signal, receiver in receivers:
        signal.connect(receiver)
    yield counted
    for signal, receiver in receivers:
        signal.disconnect(receiver)


def test_task_received_is_for_what_is_to_run(heard: Counter[tuple[str, str]]) -> None:
    app = AmqTask("heard", broker="memory://", backend="cache+memory://", set_as_current=False)
    for name in ("plain", "later", "tired", "unwanted"):
        app.task(name=name)(lambda: None)

    with start_worker(app, pool="threads", concurrency=1):
        app.control.revoke("no", reply=True, limit=1)
        results = [
            app.send_task("plain"),
            app.send_task("later", countdown=0.05, expires=60),
            app.send_task("tired", expires=-1),
            app.send_task("unwanted", task_id="no"),
            app.send_task("nobody.knows"),
        ]
        for result in results:
            result.get(timeout=60, propagate=False)
        for result in results[2:4]:
            with pytest.raises(TaskRevokedError):
                result.get(timeout=60)

    assert heard == {
        ("received", "plain"): 1,
        ("received", "later"): heard["received", "later"],
        ("revoked", "tired"): 1,
        ("revoked", "unwanted"): 1,
        ("unknown", "nobody.knows"): 1,
    }
    assert heard["received", "later"] >= 1

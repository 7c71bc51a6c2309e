"""One tenant's backlog and another's few calls, on RabbitMQ and on Redis: the order in which they run."""

from __future__ import annotations

import importlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.workers import WorkerProcess, eventually, run_cli

NAMES = ("FAIR_BROKER", "FAIR_QUEUE")


@pytest.fixture(params=["rabbitmq", "redis"])
def fair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the application."""
    monkeypatch.setenv(
        "FAIR_BROKER", request.getfixturevalue("broker_url" if request.param == "rabbitmq" else "redis_url")
    )
    monkeypatch.setenv("FAIR_QUEUE", f"fair-{uuid.uuid4().hex[:8]}")
    module: Any = importlib.reload(importlib.import_module("integration.apps.fair"))
    yield module
    with module.app.broker.admin() as admin:
        for queue in module.app.queues.consumed:
            admin.delete(queue.name)
        admin.delete(f"{module.app.conf.task_default_queue}.dead")
    module.app.close()


def test_a_tenant_with_a_backlog_does_not_move_another_s_calls_by_more_than_twice(fair: Any, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    environment = {name: os.environ[name] for name in NAMES}
    fair.app.finalize()
    plan = fair.serve.fair_plan
    other = next(name for name in map(str, range(100)) if plan.shard((name,), {}, 4) != plan.shard(("big",), {}, 4))
    with fair.app.pipeline():
        for _ in range(500):
            fair.serve.delay("big", str(journal))
    for _ in range(10):
        fair.serve.delay(other, str(journal))

    with WorkerProcess("integration.apps.fair", "-P", "solo", environment=environment) as worker:
        eventually(lambda: journal.exists() and journal.read_text().split().count(other) == 10)
        assert worker.stop() == 0
    runs = journal.read_text().split()
    position = max(number for number, tenant in enumerate(runs) if tenant == other)
    assert position < 2 * 10 + 5

    code, printed = run_cli("-A", "integration.apps.fair", "purge", "-f", "--json", environment=environment)
    assert code == 0, printed
    assert sum(json.loads(printed)["purged"].values()) == 510 - len(runs)

"""`amqtask worker -Q cma_queue -P <pool> -c 5` on each pool: its queue's tasks run, other queues' tasks stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from amqtask import AmqTask
from integration.conftest import Broker
from integration.waiting import PATIENT
from integration.workers import WorkerProcess

POOLS = ("prefork", "threads", "solo", "eventlet", "gevent", "asyncio")


@pytest.mark.parametrize("pool", POOLS)
def test_a_worker_runs_its_queue_and_leaves_others_alone(pool: str, rabbit: Broker) -> None:
    mine, other = rabbit.queue("cma_queue"), rabbit.queue("other")
    app = AmqTask("client", broker=rabbit.url, backend="rpc://", **PATIENT)
    app.conf.task_routes = {"sample.pid": {"queue": other}, "sample.*": {"queue": mine}}
    for_others = [app.send_task("sample.pid") for _ in range(3)]

    with WorkerProcess("integration.apps.sample", "-Q", mine, "-P", pool, "-c", "5") as worker:
        sums = [app.send_task("sample.add", (n, n)) for n in range(20)]
        awaited = [app.send_task("sample.add_async", (n, 1)) for n in range(20)]
        assert [result.get(timeout=90) for result in sums] == [n + n for n in range(20)]
        assert [result.get(timeout=90) for result in awaited] == [n + 1 for n in range(20)]
        code = worker.stop()

    assert code == 0
    assert rabbit.count(mine) == 0
    assert rabbit.count(other) == len(for_others)
    app.close()


@pytest.mark.parametrize("pool", POOLS)
def test_a_failing_task_gives_its_own_exception_back(pool: str, rabbit: Broker) -> None:
    queue = rabbit.queue()
    app = AmqTask("client", broker=rabbit.url, backend="rpc://", **PATIENT)

    with WorkerProcess("integration.apps.sample", "-Q", queue, "-P", pool, "-c", "2") as worker:
        result = app.send_task("sample.fail", ("as told",), queue=queue)
        with pytest.raises(ValueError, match="as told") as caught:
            result.get(timeout=90)
        worker.stop()

    assert result.state == "FAILURE"
    assert "sample.py" in (result.traceback or "")
    assert caught.value.__cause__ is not None
    app.close()


@pytest.mark.parametrize("pool", POOLS)
def test_a_retry_waits_in_the_broker_and_runs_again(pool: str, rabbit: Broker, tmp_path: Path) -> None:
    queue, file = rabbit.queue(), tmp_path / "runs"
    app = AmqTask("client", broker=rabbit.url, backend="rpc://", **PATIENT)

    with WorkerProcess("integration.apps.sample", "-Q", queue, "-P", pool, "-c", "2") as worker:
        result = app.send_task("sample.retry", (str(file), 2), queue=queue)
        assert result.get(timeout=90) == 2
        worker.stop()

    assert file.read_text().split() == ["0", "1", "2"]
    app.close()

"""`amqtask worker -Q cma_queue -P <pool> -c 5` on each pool: its queue's tasks run, other queues' tasks stay."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from amqtask import AmqTask
from integration.conftest import Broker
from integration.waiting import PATIENT, eventually
from integration.workers import WorkerProcess

POOLS = ("prefork", "threads", "solo", "eventlet", "gevent", "asyncio")


@pytest.mark.parametrize("pool", POOLS)
def test_a_worker_runs_its_queue_and_leaves_others_alone(pool: str, rabbit: Broker, tmp_path: Path) -> None:
    mine, other, file = rabbit.queue("cma_queue"), rabbit.queue("other"), tmp_path / "runs"
    app = AmqTask("client", broker=rabbit.url, backend="rpc://", **PATIENT)
    app.conf.task_routes = {"sample.pid": {"queue": other}, "sample.*": {"queue": mine}}
    for_others = [app.send_task("sample.pid") for _ in range(3)]

    with WorkerProcess("integration.apps.sample", "-Q", mine, "-P", pool, "-c", "5") as worker:
        sums = [app.send_task("sample.add", (n, n)) for n in range(20)]
        awaited = [app.send_task("sample.add_async", (n, 1)) for n in range(20)]
        failed = app.send_task("sample.fail", ("as told",))
        retried = app.send_task("sample.retry", (str(file), 2))
        assert [result.get(timeout=90) for result in sums] == [n + n for n in range(20)]
        assert [result.get(timeout=90) for result in awaited] == [n + 1 for n in range(20)]
        with pytest.raises(ValueError, match="as told") as caught:
            failed.get(timeout=90)
        assert retried.get(timeout=90) == 2
        code = worker.stop()

    assert code == 0
    assert rabbit.count(mine) == 0
    assert rabbit.count(other) == len(for_others)
    # A failing task gives its own exception back.
    assert failed.state == "FAILURE"
    assert "sample.py" in (failed.traceback or "")
    assert caught.value.__cause__ is not None
    # A retry waits in the broker, and runs again.
    assert file.read_text().split() == ["0", "1", "2"]
    app.close()


@pytest.mark.parametrize("task", ["fork", "fork_in_coroutine"])
@pytest.mark.parametrize("pool", ["eventlet", "gevent", "threads"])
def test_a_process_that_a_task_forks_runs_nothing_of_the_worker(
    pool: str, task: str, rabbit: Broker, tmp_path: Path
) -> None:
    queue = rabbit.queue()
    app = AmqTask("client", broker=rabbit.url, backend="rpc://", **PATIENT)

    with WorkerProcess("integration.apps.forking", "-Q", queue, "-P", pool, "-c", "10") as worker:
        waiting = [app.send_task("integration.apps.forking.wait", (str(tmp_path), n), queue=queue) for n in range(4)]
        eventually(lambda: len(lines_of(tmp_path / "began")) == 4)
        forking = app.send_task(f"integration.apps.forking.{task}", (str(tmp_path),), queue=queue)
        eventually(lambda: len(lines_of(tmp_path / "forked")) == 1)
        (tmp_path / "go").touch()
        assert [result.get(timeout=90) for result in waiting] == [0, 1, 2, 3]
        later = app.send_task("integration.apps.forking.wait", (str(tmp_path), 4), queue=queue)
        assert later.get(timeout=90) == 4
        (tmp_path / "end").touch()
        assert forking.get(timeout=90) == 0
        assert worker.stop() == 0

    assert sorted(lines_of(tmp_path / "went")) == [f"{n} {worker.pid}" for n in range(5)]
    app.close()


def test_a_thread_that_a_task_left_does_not_keep_the_worker_from_ending(rabbit: Broker) -> None:
    queue = rabbit.queue()
    app = AmqTask("client", broker=rabbit.url, backend="rpc://", **PATIENT)

    with WorkerProcess("integration.apps.forking", "-Q", queue, "-P", "solo") as worker:
        app.send_task("integration.apps.forking.leave_a_thread", queue=queue).get(timeout=90)
        worker.signal(signal.SIGTERM)
        worker.await_log("waits for threads that the program started, at most 30 s: left")
        worker.signal(signal.SIGTERM)
        worker.await_log("ends at SIGTERM")
        assert worker.wait() == 0

    app.close()


def lines_of(file: Path) -> list[str]:
    """None while the file is not there."""
    return file.read_text().splitlines() if file.exists() else []

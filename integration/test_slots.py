"""One worker divides its slots among its queues, on RabbitMQ and on Redis."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.exceptions import TaskRevokedError
from integration.waiting import LONG, PATIENT
from integration.workers import WorkerProcess, eventually

SAMPLE = "integration.apps.sample"


class Divided:
    """Two queues of a test's own, and workers for them."""

    def __init__(self, broker: str) -> None:
        self.reports, self.web = (f"{name}-{uuid.uuid4().hex[:12]}" for name in ("reports", "web"))
        self.app = AmqTask("client", broker=broker, set_as_current=False)
        backend = "rpc://" if broker.startswith("amqp") else broker
        self.app.conf.update(PATIENT, result_backend=backend)
        self.environment = {"AMQTASK_BROKER_URL": broker, "SAMPLE_BACKEND": backend}

    def worker(self, *options: str) -> WorkerProcess:
        name = f"{uuid.uuid4().hex[:8]}@test"
        return WorkerProcess(SAMPLE, "-n", name, *options, environment=self.environment)

    def waiting(self, queue: str, folder: Path, name: str) -> Any:
        """A task that runs until the file `release` is there."""
        arguments = (str(folder / name), str(folder / "release"))
        return self.app.send_task("sample.wait_for", arguments, queue=queue)

    def close(self) -> None:
        with self.app.broker.admin() as admin:
            for queue in (self.reports, self.web):
                admin.delete(queue)
                admin.delete(f"{queue}.dead")
        self.app.close()


@pytest.fixture(params=["rabbitmq", "redis"])
def divided(request: pytest.FixtureRequest) -> Iterator[Divided]:
    made = Divided(request.getfixturevalue("broker_url" if request.param == "rabbitmq" else "redis_url"))
    yield made
    made.close()


def test_a_full_queue_leaves_the_other_slots_to_the_other_queue(divided: Divided, tmp_path: Path) -> None:
    with divided.worker("-P", "threads", "-c", "3", "-Q", f"{divided.reports}:1,{divided.web}") as worker:
        results = [divided.waiting(divided.reports, tmp_path, f"report{number}") for number in range(3)]
        eventually(lambda: list(tmp_path.glob("report*")))
        results += [divided.waiting(divided.web, tmp_path, f"page{number}") for number in range(2)]
        eventually(lambda: len(list(tmp_path.glob("page*"))) == 2)
        assert len(list(tmp_path.glob("report*"))) == 1

        (tmp_path / "release").touch()
        assert [result.get(timeout=LONG) for result in results] == ["released"] * 5
        assert worker.stop() == 0


@pytest.mark.parametrize("divided", ["rabbitmq"], indirect=True)
def test_two_pools_of_one_worker_run_side_by_side(divided: Divided, tmp_path: Path) -> None:
    pools = f"prefork:1={divided.reports},asyncio:20={divided.web}"
    with divided.worker("-P", pools, "-Q", f"{divided.reports},{divided.web}") as worker:
        control = divided.app.control
        report = divided.waiting(divided.reports, tmp_path, "report")
        eventually((tmp_path / "report").exists)
        pages = [divided.app.send_task("sample.add_async", (1, number), queue=divided.web) for number in range(50)]
        assert [page.get(timeout=LONG) for page in pages] == [1 + number for number in range(50)]

        (active,) = (control.inspect(timeout=LONG, limit=1).active() or {}).values()
        assert [(task["pool"], task["worker_pid"]) for task in active] == [("prefork", worker.children[0])]
        (stats,) = (control.inspect(timeout=LONG, limit=1).stats() or {}).values()
        assert {name: told["max-concurrency"] for name, told in stats["pool"]["pools"].items()} == {
            "prefork": 1,
            "asyncio": 20,
        }

        # The process that replaces the ended one is forked beside the other pool's thread.
        control.revoke(report.id, terminate=True)
        with pytest.raises(TaskRevokedError):
            report.get(timeout=LONG)
        assert divided.app.send_task("sample.add", (1, 1), queue=divided.reports).get(timeout=LONG) == 2
        assert worker.stop() == 0

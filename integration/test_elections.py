"""Of several workers that hear of an election one calls its task."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from amqtask import AmqTask
from integration.conftest import Broker
from integration.waiting import PATIENT
from integration.workers import WorkerProcess, eventually

SAMPLE = "integration.apps.sample"
POOLS = ["solo", "threads", "gevent"]


@pytest.fixture
def app(rabbit: Broker) -> Iterator[AmqTask]:
    with AmqTask("client", broker=rabbit.url, **PATIENT) as made:
        made.conf.task_default_queue = rabbit.queue("elections")
        yield made


def test_of_three_workers_one_calls_the_task_of_each_election(app: AmqTask, tmp_path: Path) -> None:
    queue, file = app.conf.task_default_queue, tmp_path / "called"
    elections = [f"{queue}-{number}" for number in range(5)]
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                WorkerProcess(
                    SAMPLE, "-Q", queue, "-P", pool, "-n", f"{pool}@{queue}", "-l", "INFO",
                    environment={"SAMPLE_QUEUE": queue},
                )
            )
            for pool in POOLS
        ]  # fmt: skip
        eventually(lambda: len(app.control.ping([f"{pool}@{queue}" for pool in POOLS], timeout=1.0)) == len(POOLS))
        for election in elections:
            app.control.election(election, "task", app.signature("sample.leave", (str(file), election)))

        def said(pattern: str) -> list[str]:
            return [found for worker in workers for found in re.findall(pattern, worker.log)]

        eventually(lambda: len(said(r"election (\S+): (?:this worker is elected|it is not this worker)")) == 15)
        eventually(lambda: file.exists() and len(file.read_text().split()) >= len(elections))

        assert sorted(said(r"election (\S+): this worker is elected")) == elections
        assert sorted(file.read_text().split()) == elections

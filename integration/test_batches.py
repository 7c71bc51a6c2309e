"""Batches on RabbitMQ and Redis: drained in whole ones, and given back, each call of them, when a process or a worker dies."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amqtask import states
from integration.workers import WorkerProcess


@pytest.fixture
def batched(load_application: Callable[[str], Any]) -> Any:
    """The module of the application."""
    return load_application("batched")


def test_what_dies_with_a_process_or_worker_comes_again_and_only_the_killer_is_given_up(
    batched: Any, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name.startswith("BATCHED_")}
    kill = tmp_path / "kill the worker"
    kill.touch()
    calls = [batched.add.delay(number, 1) for number in range(60)]
    with WorkerProcess("integration.apps.batched", "-c", "2", environment=environment).start(wait=False) as worker:
        assert worker.wait() != 0
    with WorkerProcess("integration.apps.batched", "-c", "2", environment=environment) as worker:
        assert [call.get(timeout=90) for call in calls] == [number + 1 for number in range(60)]
        sizes = [int(line) for line in (tmp_path / "runs").read_text().split()]
        assert max(sizes) == 20

        calls = [batched.add.delay(number, 1) for number in range(5)]
        killer = batched.add.delay()
        assert [call.get(timeout=90) for call in calls] == [number + 1 for number in range(5)]
        with pytest.raises(Exception, match="SIGKILL"):
            killer.get(timeout=90)
        assert killer.state == states.FAILURE
        assert worker.stop() == 0

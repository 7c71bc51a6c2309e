"""A worker is killed between the commit of a task with inbox=True and its ack: its effect is there once, and what follows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from integration.workers import WorkerProcess


@pytest.fixture
def bank(load_application: Callable[[str], Any]) -> Iterator[Any]:
    """The module of the application, with an empty database."""
    module = load_application("inbox")
    module.metadata.create_all(module.engine)
    yield module
    module.engine.dispose()


def test_a_worker_killed_between_commit_and_ack_leaves_one_effect(bank: Any, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name.startswith("INBOX_")}
    kill = tmp_path / "kill the worker"
    result = (bank.pay.s(5) | bank.thank.s()).apply_async()

    for _ in range(2):  # in the first task, and in the second
        kill.touch()
        with WorkerProcess("integration.apps.inbox", "-c", "1", environment=environment).start(wait=False) as worker:
            assert worker.wait() != 0
    with WorkerProcess("integration.apps.inbox", "-c", "1", environment=environment) as worker:
        assert result.get(timeout=90) == "thanked for 5"
        assert "has run and been committed before" in worker.log
        worker.stop()
    with bank.engine.connect() as connection:
        assert connection.execute(select(bank.bookings.c.what)).scalars().all() == ["paid 5", "thanked for 5"]

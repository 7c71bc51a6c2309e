"""A time limit that the chosen pool would not enforce is refused when the worker is put together."""

from __future__ import annotations

import pytest

from amqtask import AmqTask
from amqtask.assembly import build_worker
from amqtask.exceptions import LimitUnsupported
from amqtask.pool import find_pool, limits_of
from amqtask.worker.options import WorkerOptions


def make_app() -> AmqTask:
    return AmqTask("limits", broker="amqp://localhost//", set_as_current=False)


def wait() -> None:
    """The threads and asyncio pools run it in a thread, which takes no exception from outside."""


@pytest.mark.parametrize("pool", ["asyncio", "threads"])
def test_a_soft_limit_of_a_task_that_runs_in_a_thread_is_refused(pool: str) -> None:
    app = make_app()
    app.task(name="limits.wait", soft_time_limit=5)(wait)
    with pytest.raises(
        LimitUnsupported, match=f"task limits.wait has a soft time limit of 5 s, but the {pool} pool has"
    ):
        build_worker(app, WorkerOptions(pool=pool))


def test_async_tasks_have_limits_that_threads_have_not() -> None:
    pool = find_pool("asyncio")
    assert limits_of(pool, is_async=True) == {"soft", "hard"}
    assert limits_of(pool, is_async=False) == {"hard"}

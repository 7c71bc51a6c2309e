"""What does not end when it is told to: named in the log, and its slot is free for others."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amqtask import states
from amqtask.backends.contract import StoreDefaults
from amqtask.execution.request import Outcome
from amqtask.pool import PoolOptions
from amqtask.protocol.result import ResultMessage
from amqtask.protocol.task import RUN_HEADER
from amqtask.testing.loop import PlainLoop
from amqtask.testing.tasks import PlainTask, add, add_async, make_executor, request
from amqtask_pools import asyncio as asyncio_pool
from amqtask_pools._hub import HubMonitor

TASKS = (PlainTask(add),)


def test_a_coroutine_that_swallows_its_hard_limit_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ends = threading.Event()

    async def deaf() -> None:
        while not ends.is_set():
            try:
                await asyncio.sleep(0.01)
            except BaseException:
                continue

    monkeypatch.setattr(asyncio_pool, "GRACE", 0.1)
    loop, outcomes = PlainLoop(), list[Outcome]()
    executor = make_executor(PlainTask(deaf, "deaf"), PlainTask(add))
    pool = asyncio_pool.AsyncioPool(executor, loop, outcomes.extend, PoolOptions(slots=1))
    pool.start()
    pool.submit(request(1, "deaf", hard_limit=0.1))
    loop.run_until(lambda: outcomes)
    pool.submit(request(2, "add", 1, 1))
    loop.run_until(lambda: len(outcomes) == 2)
    ends.set()
    pool.stop()
    loop.close()

    assert [(each.number, each.state) for each in outcomes] == [(1, states.FAILURE), (2, states.SUCCESS)]
    assert "task deaf[id-1] does not end" in caplog.text


class Broken(StoreDefaults):
    """A result store with a server of its own, whose answers nobody can read."""

    blocks = True
    keeps_runs = True

    def message_for(self, *_: Any) -> None:
        return None

    def store(self, result: ResultMessage) -> None:
        """Gone."""

    def find(self, task_id: str) -> ResultMessage:
        raise ValueError(f"what is stored of {task_id} is not a result")


def test_a_coroutine_whose_store_fails_in_an_unforeseen_way_ends_and_its_slot_is_free() -> None:
    loop, outcomes = PlainLoop(), list[Outcome]()
    executor = make_executor(PlainTask(add_async), store=Broken())
    pool = asyncio_pool.AsyncioPool(executor, loop, outcomes.extend, PoolOptions(slots=1))
    pool.start()
    pool.submit(request(1, "add_async", 1, 1, redelivered=True, headers={RUN_HEADER: "run"}))
    loop.run_until(lambda: outcomes, 20.0)
    pool.stop()
    loop.close()

    assert [(each.state, each.summary) for each in outcomes] == [
        (states.FAILURE, "ValueError('what is stored of id-1 is not a result')")
    ]


class NativeHub:
    """What HubMonitor asks of a hub, where nothing is patched."""

    native_sleep = staticmethod(time.sleep)
    native_ident = staticmethod(threading.get_ident)

    def start_native_thread(self, function: Callable[[], None]) -> None:
        threading.Thread(target=function, daemon=True).start()


def test_a_task_that_keeps_the_hub_is_named_with_its_place(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    reported = threading.Event()

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            reported.set()

    def run(request: Any) -> bool:
        return reported.wait(60)

    # Behind caplog's handler, which is the root logger's too: what it hears, caplog has heard.
    logger = logging.getLogger()
    handler = Heard(logging.WARNING)
    handler.addFilter(logging.Filter("amqtask.pools"))
    logger.addHandler(handler)
    loop, hub = PlainLoop(), NativeHub()
    watch = HubMonitor(hub, loop, run.__code__, blocked_after=0.2)  # type: ignore[arg-type] # it asks for no more than that
    watch.start()
    is_heard = run(request(7, "add", 1, 1))
    watch.stop()
    logger.removeHandler(handler)
    loop.close()

    assert is_heard
    assert "task add[id-7] has kept the hub" in caplog.text
    assert "test_given_up.py" in caplog.text

"""Coroutines without a loop, and interrupted where they wait."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable
from typing import Any

import pytest

from amqtask.exceptions import SoftTimeLimitExceeded, Terminated
from amqtask.execution import coroutines
from amqtask.execution.coroutines import CoroutineRunner, Interruptible


def test_loops_are_used_again() -> None:
    async def which() -> int:
        return id(asyncio.get_running_loop())

    runner = CoroutineRunner()
    assert runner(which()) == runner(which())
    runner.close()


def test_what_a_task_leaves_running_is_cancelled() -> None:
    left: list[asyncio.Task[Any]] = []

    async def start() -> None:
        left.append(asyncio.create_task(asyncio.sleep(60)))

    runner = CoroutineRunner()
    runner(start())
    assert left[0].cancelled()
    runner.close()


def test_what_a_task_leaves_running_is_cancelled_again_when_it_misses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def misses_one() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(60)

    async def start() -> int:
        left.append(asyncio.create_task(misses_one()))
        await asyncio.sleep(0)
        return id(asyncio.get_running_loop())

    monkeypatch.setattr(coroutines, "GRACE", 0.05)
    left: list[asyncio.Task[Any]] = []
    runner = CoroutineRunner()
    assert runner(start()) == runner(start())
    assert all(task.cancelled() for task in left)
    runner.close()


def test_what_never_ends_is_left_behind_with_its_loop(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def never_ends() -> None:
        while not is_over:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                continue

    async def start() -> asyncio.AbstractEventLoop:
        left.append(asyncio.create_task(never_ends()))
        await asyncio.sleep(0)
        return asyncio.get_running_loop()

    monkeypatch.setattr(coroutines, "GRACE", 0.05)
    is_over: list[bool] = []
    left: list[asyncio.Task[Any]] = []
    runner = CoroutineRunner()
    first = runner(start())
    assert first.is_closed()
    assert "never_ends" in caplog.text

    is_over.append(True)
    assert runner(start()) is not first
    runner.close()
    # What asyncio says of a task that it cannot end is the runner's word too.
    left[0]._log_destroy_pending = False  # type: ignore[attr-defined]
    left[0].get_coro().close()


def test_a_forked_child_makes_its_own_loop() -> None:
    async def which() -> int:
        return id(asyncio.get_running_loop())

    runner = CoroutineRunner()
    before = runner(which())
    child = os.fork()
    if child == 0:
        os._exit(0 if runner(which()) != before else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert runner(which()) == before
    runner.close()


def test_a_signal_in_the_loop_itself_is_raised_in_the_coroutine() -> None:
    async def wait() -> str:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            await asyncio.sleep(60)
        except SoftTimeLimitExceeded:
            await asyncio.sleep(0)
            return "cleaned up"
        return "not interrupted"

    def ring(*_: Any) -> None:
        raise SoftTimeLimitExceeded(0.05)

    before = signal.signal(signal.SIGALRM, ring)
    runner = CoroutineRunner()
    try:
        assert runner(wait()) == "cleaned up"
    finally:
        signal.signal(signal.SIGALRM, before)
        runner.close()


def interrupted(waiting: Any, error: BaseException) -> Any:
    """Run a coroutine and raise `error` in it once it waits."""
    value, ended = asyncio.run(_interrupted(waiting, error))
    if ended is not None:
        raise ended
    return value


async def _interrupted(waiting: Any, error: BaseException) -> tuple[Any, BaseException | None]:
    running = Interruptible(waiting)

    async def drive(awaitable: Awaitable[Any]) -> tuple[Any, BaseException | None]:
        # A value, as in the pools: before Python 3.11 a task keeps nothing of the cancellation that ends it.
        try:
            return await awaitable, None
        except BaseException as ended:
            return None, ended

    running.task = asyncio.ensure_future(drive(running))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    running.interrupt(error)
    found: tuple[Any, BaseException | None] = await running.task
    return found


async def say_the_limit() -> str:
    try:
        await asyncio.sleep(60)
    except SoftTimeLimitExceeded as error:
        return str(error.args[0])
    return "not interrupted"


def test_an_interruption_is_the_error_itself() -> None:
    assert interrupted(say_the_limit(), SoftTimeLimitExceeded(3.0)) == "3.0"


@pytest.mark.parametrize("has_task", [True, False])
def test_an_interruption_before_it_begins_comes_where_it_first_waits(has_task: bool) -> None:
    async def main() -> Any:
        async def drive() -> Any:
            return await running

        running = Interruptible(say_the_limit())
        task = asyncio.ensure_future(drive())
        if has_task:
            running.task = task
        running.interrupt(SoftTimeLimitExceeded(3.0))
        running.task = task
        return await task

    assert asyncio.run(main()) == "3.0"


def test_an_interruption_cancels_what_the_coroutine_waits_for() -> None:
    children: list[asyncio.Task[Any]] = []

    async def wait() -> None:
        children.extend(asyncio.create_task(asyncio.sleep(60)) for _ in range(2))
        await asyncio.gather(*children)

    with pytest.raises(SoftTimeLimitExceeded):
        interrupted(wait(), SoftTimeLimitExceeded(3.0))
    assert all(child.cancelled() for child in children)


def test_except_exception_does_not_hold_a_termination() -> None:
    async def wait() -> str:
        try:
            await asyncio.sleep(60)
        except Exception:
            return "held"
        return "not interrupted"

    with pytest.raises(Terminated):
        interrupted(wait(), Terminated("now"))


def test_a_task_may_go_on_after_an_interruption() -> None:
    async def wait() -> str:
        try:
            await asyncio.sleep(60)
        except SoftTimeLimitExceeded:
            await asyncio.wait_for(asyncio.sleep(0), 10)
        return "went on"

    assert interrupted(wait(), SoftTimeLimitExceeded(3.0)) == "went on"

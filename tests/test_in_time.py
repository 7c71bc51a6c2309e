"""Awaiting that ends in time, and keeps no cancellation to itself."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from amqtask.ground.deadlines import arrival, cancel_all, ended

PATIENCE = 60.0


async def deaf() -> None:
    """Goes on for as long as anybody waits."""
    while True:
        try:
            await asyncio.sleep(PATIENCE)
        except asyncio.CancelledError:
            if asyncio.get_running_loop() in over:
                raise


over: set[asyncio.AbstractEventLoop] = set()


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """`asyncio.run`, which has the last word with what is deaf."""

    async def and_then() -> Any:
        try:
            return await asyncio.wait_for(main, PATIENCE)
        finally:
            over.add(asyncio.get_running_loop())

    try:
        return asyncio.run(and_then())
    finally:
        over.clear()


@pytest.mark.parametrize(
    ("wait", "turns"),
    [
        (lambda future: arrival(future, PATIENCE), 0),
        (lambda future: ended(future, PATIENCE), 0),
        (lambda future: ended(future, PATIENCE), 1),
    ],
)
def test_a_cancellation_is_not_lost_when_the_result_comes_in_the_same_moment(
    wait: Callable[[asyncio.Future[str]], Coroutine[Any, Any, Any]], turns: int
) -> None:
    async def main() -> bool:
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        waiting = asyncio.ensure_future(wait(future))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        future.set_result("here")
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        return waiting.cancelled()

    assert run(main())


def test_what_arrives_is_returned_and_what_does_not_is_a_timeout() -> None:
    async def main() -> str:
        loop = asyncio.get_running_loop()
        with pytest.raises(asyncio.TimeoutError):
            await arrival(loop.create_future(), 0.01)
        future: asyncio.Future[str] = loop.create_future()
        loop.call_soon(future.set_result, "here")
        return await arrival(future, 0)

    assert run(main()) == "here"


def test_the_deadline_is_kept_though_something_does_not_end() -> None:
    assert run(ended(deaf(), 0.01)) is None


def test_a_cancellation_is_passed_on_though_something_does_not_end() -> None:
    async def main() -> bool:
        waiting = asyncio.ensure_future(ended(deaf(), PATIENCE))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        return waiting.cancelled()

    assert run(main())


def test_what_succeeds_when_nobody_wants_it_any_more_is_given_back() -> None:
    async def opens() -> str:
        try:
            await asyncio.sleep(PATIENCE)
        except asyncio.CancelledError:
            return "a connection"
        return "too late"

    async def main() -> list[str]:
        given_back: list[str] = []
        waiting = asyncio.ensure_future(ended(opens(), PATIENCE, given_back.append))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        found = await ended(opens(), 0.01, given_back.append)
        assert found is not None
        assert found.result() == "a connection"
        return given_back

    assert run(main()) == ["a connection"]


def test_nothing_begins_after_its_deadline() -> None:
    begun: list[str] = []

    async def begin() -> None:
        begun.append("it")

    assert run(ended(begin(), 0)) is None
    assert begun == []


def test_cancelled_tasks_have_ended_when_it_returns_and_their_errors_are_nobodys() -> None:
    async def fails(end: Awaitable[None]) -> None:
        try:
            await end
        finally:
            await asyncio.sleep(0)
            raise ValueError("on its way out")

    async def main() -> list[Any]:
        said: list[Any] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: said.append(context))
        tasks = [asyncio.ensure_future(fails(asyncio.sleep(PATIENCE))) for _ in range(3)]
        await asyncio.sleep(0)
        await cancel_all(tasks)
        assert all(task.done() for task in tasks)
        del tasks
        await asyncio.sleep(0)
        return said

    assert run(main()) == []

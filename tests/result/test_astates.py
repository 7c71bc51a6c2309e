"""`async for state, info in result.astates()`, and what an event loop does not wait for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.contrib.asgi import connected, lifespan
from amqtask.exceptions import BackendNotConfigured, TimeoutError
from amqtask.testing.worker import start_worker


class Shop:
    """Tasks that go on when the test says so."""

    def __init__(self) -> None:
        self.app = AmqTask("shop", broker="memory://", backend="cache+memory://", set_as_current=False)
        self.go_on = threading.Semaphore(0)

        @self.app.task(bind=True, name="shop.climb")
        def climb(task: Any, steps: int) -> int:
            for step in range(steps):
                task.update_state(state="PROGRESS", meta={"step": step})
                assert self.go_on.acquire(timeout=60)
            return steps

        @self.app.task(name="shop.fail")
        def fail() -> None:
            raise KeyError("gone")

        self.climb, self.fail = climb, fail


@pytest.fixture
def shop() -> Iterator[Shop]:
    made = Shop()
    yield made
    made.app.close()


def test_each_state_is_seen_and_the_final_one_ends_it(shop: Shop) -> None:
    async def watch() -> list[Any]:
        seen = []
        async for state, info in (await shop.climb.adelay(3)).astates(timeout=60, interval=0.01):
            seen.append((state, info))
            if state == "PROGRESS":
                shop.go_on.release()
        return seen

    with start_worker(shop.app):
        seen = asyncio.run(watch())

    assert [entry for entry in seen if entry[0] != "PENDING"] == [
        *(("PROGRESS", {"step": step}) for step in range(3)),
        ("SUCCESS", 3),
    ]


def test_a_failure_is_a_state_and_raises_nothing(shop: Shop) -> None:
    async def watch() -> list[Any]:
        return [entry async for entry in (await shop.fail.adelay()).astates(timeout=60)]

    with start_worker(shop.app):
        state, error = asyncio.run(watch())[-1]

    assert state == "FAILURE"
    assert isinstance(error, KeyError)


def test_what_is_known_already_is_all_there_is(shop: Shop) -> None:
    async def watch(result: Any) -> list[Any]:
        return [entry async for entry in result.astates()]

    assert asyncio.run(watch(shop.climb.apply((0,)))) == [("SUCCESS", 0)]


def test_the_first_state_is_known_before_a_worker_has_it_and_time_is_limited(shop: Shop) -> None:
    async def watch() -> list[Any]:
        seen: list[Any] = []
        states = (await shop.fail.adelay()).astates(timeout=2.0, interval=0.01)
        try:
            async for entry in states:
                seen.append(entry)
        except TimeoutError as late:
            seen.append(str(late).partition(" task ")[0])
        return seen

    assert asyncio.run(watch()) == [("PENDING", None), "no result of"]


def test_without_a_store_there_are_no_states() -> None:
    app = AmqTask("shop", broker="memory://", set_as_current=False)

    async def watch() -> None:
        async for _ in app.AsyncResult("one").astates():
            raise AssertionError

    with pytest.raises(BackendNotConfigured):
        asyncio.run(watch())


@pytest.mark.parametrize("block", [connected, lambda app: lifespan(app)("the service")])
def test_a_service_has_the_application_while_it_lives(shop: Shop, block: Any) -> None:
    async def serve() -> Any:
        async with block(shop.app):
            with start_worker(shop.app):
                shop.go_on.release()
                return await (await shop.climb.adelay(1)).aget(timeout=60)

    assert asyncio.run(serve()) == 1

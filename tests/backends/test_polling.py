"""Stores that are asked: who waits is told of results and of errors, and nobody is asked for nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence

import pytest

from amqtask import states
from amqtask.backends.contract import BackendOptions
from amqtask.backends.polling import PollingBackend
from amqtask.exceptions import BackendUnreachable, TimeoutError
from amqtask.protocol.result import ResultMessage
from amqtask.testing.suites.backend import PATIENCE, eventually


class Store(PollingBackend):
    """In this process; may be away."""

    def __init__(self) -> None:
        super().__init__(BackendOptions(url="here://", transport_options=(("polling_interval", 0.02),)))
        self.results: dict[str, ResultMessage] = {}
        self.is_away = False
        self.asked: list[set[str]] = []

    def read(self, task_ids: Sequence[str]) -> list[ResultMessage]:
        self.asked.append(set(task_ids))
        if self.is_away:
            raise BackendUnreachable("it is away")
        return [self.results[task_id] for task_id in task_ids if task_id in self.results]

    def store(self, result: ResultMessage) -> None:
        self.results[result.task_id] = result

    def forget(self, task_id: str) -> None:
        self.results.pop(task_id, None)


def done(task_id: str, date_done: str = "") -> ResultMessage:
    return ResultMessage(task_id, states.SUCCESS, task_id, date_done=date_done)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "amqtask results"]


@pytest.fixture
def store() -> Iterator[Store]:
    made = Store()
    yield made
    made.close()
    assert not threads()


def test_of_results_that_one_question_finds_the_first_that_ended_comes_first(store: Store) -> None:
    store.store(done("late", "2026-01-01T00:00:02+00:00"))
    store.store(done("early", "2026-01-01T00:00:01+00:00"))

    assert [task_id for task_id, _ in store.iter_ready(["late", "early"], timeout=0)] == ["early", "late"]


def test_one_thread_asks_for_all_and_ends_with_the_last(store: Store) -> None:
    seen: list[str] = []
    for name in ("first", "second"):
        store.add_callback(name, lambda result: seen.append(result.task_id))
    eventually(lambda: {"first", "second"} in store.asked)
    assert len(threads()) == 1

    store.store(done("first"))
    store.store(done("second"))

    eventually(lambda: sorted(seen) == ["first", "second"])
    eventually(lambda: not threads())


def test_a_callback_outlives_a_store_that_is_away(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.is_away = True
    called = threading.Event()
    store.add_callback("it", lambda result: called.set())
    eventually(lambda: "it is away" in caplog.text)

    store.store(done("it"))
    store.is_away = False

    assert called.wait(PATIENCE)


def test_a_coroutine_is_told_that_the_store_is_away(store: Store) -> None:
    store.is_away = True

    with pytest.raises(BackendUnreachable, match="it is away"):
        asyncio.run(store.await_result("it", timeout=PATIENCE))


def test_nobody_asks_for_a_coroutine_that_has_given_up(store: Store) -> None:
    with pytest.raises(TimeoutError):
        asyncio.run(store.await_result("it", timeout=0.01))

    eventually(lambda: not threads())


def test_a_closed_store_calls_nobody(store: Store) -> None:
    called = threading.Event()
    store.add_callback("it", lambda result: called.set())

    store.close()
    store.store(done("it"))

    assert not threads()
    assert not called.is_set()


def test_a_coroutine_is_told_that_the_store_was_closed(store: Store) -> None:
    async def main() -> BaseException | None:
        waiting = asyncio.ensure_future(store.await_result("it", timeout=None))
        while not store.asked:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(store.close)
        await asyncio.wait({waiting}, timeout=PATIENCE)
        return waiting.exception()

    with pytest.raises(BackendUnreachable, match="was closed"):
        raise asyncio.run(main()) or AssertionError("it has a result")

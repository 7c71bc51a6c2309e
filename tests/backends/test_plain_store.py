"""A store that derives from nothing of ours and has only what no store may leave out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest

from amqtask.backends.contract import BackendOptions, ResultBackend
from amqtask.backends.memory import MemoryBackend
from amqtask.backends.registry import open_backend
from amqtask.protocol.message import Message
from amqtask.protocol.result import ResultMessage
from amqtask.testing.suites.backend import BackendSuite


class PlainStore:
    supports_autoexpire = True

    def __init__(self, options: BackendOptions) -> None:
        self._memory = MemoryBackend(options)

    def message_for(self, result: ResultMessage, reply_to: str | None, correlation_id: str | None) -> Message | None:
        return None

    def store(self, result: ResultMessage) -> None:
        self._memory.store(result)

    def reply_to(self) -> str:
        return ""

    def prepare(self, task_ids: Sequence[str], timeout: float | None = None) -> None: ...

    def hold(self, task_id: str, holder: object) -> None:
        self._memory.hold(task_id, holder)

    def find(self, task_id: str) -> ResultMessage | None:
        return self._memory.find(task_id)

    def wait(self, task_id: str, *, timeout: float | None) -> ResultMessage:
        return self._memory.wait(task_id, timeout=timeout)

    async def await_result(self, task_id: str, *, timeout: float | None) -> ResultMessage:
        return await self._memory.await_result(task_id, timeout=timeout)

    def iter_ready(self, task_ids: Sequence[str], *, timeout: float | None) -> Iterator[tuple[str, ResultMessage]]:
        return self._memory.iter_ready(task_ids, timeout=timeout)

    def add_callback(self, task_id: str, callback: Callable[[ResultMessage], None]) -> None:
        self._memory.add_callback(task_id, callback)

    def forget(self, task_id: str) -> None:
        self._memory.forget(task_id)

    def cleanup(self) -> None: ...

    def close(self) -> None: ...


class MisspeltStore(PlainStore):
    keep_runs = True

    def store_brefly(self, result: ResultMessage) -> None: ...


class CountingStore(PlainStore):
    """One that counts the parts of chords, too."""

    def add_chord_part(self, group_id: str, index: int | None, part: ResultMessage, body_id: str = "") -> None: ...


class TestPlainStore(BackendSuite):
    is_shared = False

    def make(self) -> ResultBackend:
        return opened(PlainStore)


def opened(store: type[PlainStore]) -> ResultBackend:
    url = f"{__name__}:{store.__name__}"
    backend = open_backend(url, BackendOptions(url=url))
    assert backend is not None
    return backend


def test_an_opened_store_is_of_its_own_class_and_has_all_members() -> None:
    backend = opened(PlainStore)

    assert isinstance(backend, PlainStore)
    assert (backend.blocks, backend.keeps_runs, backend.counts_chords) == (False, False, False)
    assert backend.reply_queue is None


def test_a_store_that_counts_chords_need_not_say_so() -> None:
    assert opened(CountingStore).counts_chords


def test_a_store_that_derives_from_the_contract_is_not_changed() -> None:
    backend = open_backend("cache+memory://", BackendOptions(url="cache+memory://"))

    assert type(backend) is MemoryBackend


def test_the_suite_takes_a_store_that_nobody_has_opened() -> None:
    class Suite(TestPlainStore):
        def make(self) -> ResultBackend:
            return PlainStore(BackendOptions(url="plain://"))  # type: ignore[return-value] # it leaves out what it may

    backend = next(Suite.backend.__wrapped__(Suite()))  # type: ignore[attr-defined] # what a fixture is of

    assert not backend.keeps_runs
    assert isinstance(backend, PlainStore)


def test_the_suite_names_a_member_that_is_misspelt() -> None:
    class Suite(TestPlainStore):
        def make(self) -> ResultBackend:
            return opened(MisspeltStore)

    with pytest.raises(AssertionError, match="'keep_runs': 'keeps_runs'"):
        Suite().test_no_member_of_the_contract_is_misspelt()
    assert not opened(MisspeltStore).keeps_runs

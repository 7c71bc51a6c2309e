"""The conformance suite for result backends: subclass BackendSuite, make one, and let pytest collect it.

    class TestMyBackend(BackendSuite):
        def make(self) -> ResultBackend:
            return MyBackend(BackendOptions(url="mine://"))

A backend whose results travel as messages overrides `publish` too. `make_expiring` and `make_unreachable` add the tests of
stores that forget and of stores that are away; `is_shared = False` leaves out those of results that other processes read.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from amqtask import states
from amqtask.backends.contract import ResultBackend, StoreDefaults
from amqtask.exceptions import BackendNotConfigured, BackendUnreachable, EncodeError, TimeoutError
from amqtask.ground.plugins import completed, misspelt
from amqtask.protocol.message import Message
from amqtask.protocol.result import ResultMessage, exception_as_dict, now_iso
from amqtask.protocol.task import RUN_HEADER
from amqtask.result import AsyncResult
from amqtask.results import GroupResult, ResultSet

if TYPE_CHECKING:
    from amqtask.result import UntypedResult

PATIENCE = 60.0


def eventually(predicate: Callable[[], object], timeout: float = PATIENCE) -> None:
    """Wait until a condition holds, which another process or thread brings about."""
    deadline = time.monotonic() + timeout
    while not predicate():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.002)


class BackendSuite:
    """The promises of every result backend."""

    # Whether a process reads what another one stored.
    is_shared: ClassVar[bool] = True

    def make(self) -> ResultBackend:
        """A backend; `close` is called after the test."""
        raise NotImplementedError

    def publish(self, message: Message) -> None:
        """Publish a result that travels as a message."""
        raise NotImplementedError

    def make_expiring(self, seconds: float) -> ResultBackend | None:
        """A backend whose results are kept for so long; None: they are kept as long as somebody holds them."""
        return None

    def make_unreachable(self) -> ResultBackend | None:
        """A backend whose server is not there, with the password `secret` in its URL and little patience; None: none."""
        return None

    @pytest.fixture
    def backend(self) -> Iterator[ResultBackend]:
        backend = _as_opened(self.make())
        backend.prepare(())
        yield backend
        backend.close()

    def store(self, backend: ResultBackend, task_id: str, status: str = states.SUCCESS, value: object = None) -> None:
        """Store a result as a worker does at the end of a task."""
        date_done = now_iso() if status in states.READY_STATES else None
        traceback = "Traceback (most recent call last): …" if status == states.FAILURE else None
        self.keep(backend, ResultMessage(task_id, status, value, traceback, date_done=date_done))

    def keep(self, backend: ResultBackend, result: ResultMessage) -> None:
        """Store a result with all its fields, as a worker does."""
        task_id = result.task_id
        message = backend.message_for(result, backend.reply_to(), task_id)
        if message is None:
            backend.store(result)
        else:
            self.publish(message)

    # -- the class

    def test_no_member_of_the_contract_is_misspelt(self) -> None:
        backend = self.make()
        backend.close()
        assert misspelt(type(backend), ResultBackend) == {}, "a member, and which one of the contract it looks like"

    # -- one result

    def test_nothing_is_known_of_a_task_that_did_not_report(self, backend: ResultBackend) -> None:
        assert backend.find(_id()) is None

    def test_a_stored_result_is_waited_for_and_found(self, backend: ResultBackend) -> None:
        task_id = _id()
        value = {"when": datetime(2026, 1, 2, tzinfo=timezone.utc), "sum": Decimal("1.10"), "raw": b"\xff", "list": [1]}

        self.store(backend, task_id, value=value)

        result = backend.wait(task_id, timeout=PATIENCE)
        assert (result.task_id, result.status, result.result) == (task_id, states.SUCCESS, value)
        assert result.date_done is not None
        stored = backend.find(task_id)
        assert stored is not None
        assert stored.result == value

    def test_a_result_wakes_up_who_waits_for_it(self, backend: ResultBackend) -> None:
        task_id = _id()
        waiting = _Waiting(lambda: backend.wait(task_id, timeout=PATIENCE))

        self.store(backend, _id(), value="another")
        self.store(backend, task_id, value="mine")

        assert waiting.outcome().result == "mine"

    def test_waiting_ends_at_the_timeout(self, backend: ResultBackend) -> None:
        task_id = _id()

        with pytest.raises(TimeoutError, match=task_id):
            backend.wait(task_id, timeout=0.05)

    def test_a_result_that_is_here_is_found_without_any_time_to_wait(self, backend: ResultBackend) -> None:
        task_id = _id()
        self.store(backend, task_id, value=1)
        eventually(lambda: backend.find(task_id))

        assert backend.wait(task_id, timeout=0).result == 1

    def test_a_failure_comes_back_as_its_own_exception_with_the_remote_traceback(self, backend: ResultBackend) -> None:
        task_id = _id()
        self.store(backend, task_id, states.FAILURE, exception_as_dict(KeyError("no such key")))
        result = AsyncResult[object](task_id, backend)

        with pytest.raises(KeyError, match="no such key") as caught:
            result.get(timeout=PATIENCE)

        assert "Traceback (most recent call last)" in str(caught.value.__cause__)
        assert result.state == states.FAILURE

    def test_a_value_that_cannot_be_written_is_refused_by_name(self, backend: ResultBackend) -> None:
        with pytest.raises(EncodeError, match="set"):
            self.store(backend, _id(), value={1, 2})

    def test_forgetting_drops_the_result(self, backend: ResultBackend) -> None:
        task_id = _id()
        self.store(backend, task_id, value=1)
        backend.wait(task_id, timeout=PATIENCE)

        backend.forget(task_id)

        assert backend.find(task_id) is None

    def test_a_result_comes_with_all_that_is_known_of_its_task(self, backend: ResultBackend) -> None:
        extended = {
            "name": "shop.pay", "args": [1, {"when": datetime(2026, 1, 2, tzinfo=timezone.utc)}], "kwargs": {"by": "card"},
            "worker": "w@host", "retries": 2, "queue": "shop", "stamped_headers": ["tenant"], "tenant": "acme",
        }  # fmt: skip
        child = [[_id(), None], None]
        result = ResultMessage(_id(), states.SUCCESS, 1, children=[child], date_done=now_iso(), extra=extended)

        self.keep(backend, result)

        stored = backend.wait(result.task_id, timeout=PATIENCE)
        assert stored.extra == extended
        assert stored.children == [child]
        assert stored.date_done is not None
        assert abs(datetime.fromisoformat(stored.date_done) - datetime.now(timezone.utc)).total_seconds() < 60

    def test_a_store_that_says_so_tells_the_runs_of_a_chain_apart(self, backend: ResultBackend) -> None:
        if not backend.keeps_runs:
            pytest.skip("it does not say so: each step of a chain goes through the broker")
        result = ResultMessage(_id(), states.SUCCESS, 1, date_done=now_iso(), extra={RUN_HEADER: "run-1"})

        self.keep(backend, result)

        stored = backend.find(result.task_id)
        assert stored is not None
        assert (stored.status, stored.result, stored.extra) == (states.SUCCESS, 1, {RUN_HEADER: "run-1"})

    def test_a_failure_is_kept_whatever_is_in_its_traceback(self, backend: ResultBackend) -> None:
        task_id = _id()
        error = exception_as_dict(ValueError("odd"))

        self.keep(backend, ResultMessage(task_id, states.FAILURE, error, "line 1: \x00 'ü 😀", date_done=now_iso()))

        assert "'ü 😀" in (backend.wait(task_id, timeout=PATIENCE).traceback or "")

    # -- states

    def test_a_state_on_the_way_is_seen_and_does_not_end_a_wait(self, backend: ResultBackend) -> None:
        task_id = _id()
        self.store(backend, task_id, states.STARTED, {"pid": 1})
        result = AsyncResult[object](task_id, backend)
        eventually(lambda: result.state == states.STARTED)
        assert result.info == {"pid": 1}
        waiting = _Waiting(lambda: result.get(timeout=PATIENCE))

        self.store(backend, task_id, "PROGRESS", {"done": 50})
        eventually(lambda: backend.find(task_id) is not None and result.state != states.STARTED)
        self.store(backend, task_id, value="end")

        assert waiting.outcome() == "end"

    def test_a_success_is_never_overwritten(self, backend: ResultBackend) -> None:
        task_id = _id()
        self.store(backend, task_id, value="first")
        self.store(backend, task_id, states.FAILURE, exception_as_dict(ValueError("the second run")))
        self.store(backend, task_id, states.RETRY, exception_as_dict(ValueError("the third run")))
        later_id = _id()
        self.store(backend, later_id)
        backend.wait(later_id, timeout=PATIENCE)  # so all before it have arrived

        stored = backend.find(task_id)

        assert stored is not None
        assert (stored.status, stored.result) == (states.SUCCESS, "first")

    def test_results_that_are_stored_together_are_as_if_each_was_stored(self, backend: ResultBackend) -> None:
        if not backend.stores_together:
            pytest.skip("it stores one result after the other")
        for _ in range(2):  # the first time there may be no connection yet
            done, begun, *others = [_id() for _ in range(52)]
            self.store(backend, done, value="first")
            self.store(backend, begun, states.STARTED, {"pid": 1})
            ids = [done, begun, *others, others[0]]
            results = [ResultMessage(task_id, states.SUCCESS, number) for number, task_id in enumerate(ids)]
            waiting = _Waiting(partial(backend.wait, others[-1], timeout=PATIENCE))

            backend.store_packed([(result.task_id, backend.packed(result)) for result in results])

            assert waiting.outcome().result == 51
            stored = [backend.find(task_id) for task_id in ids]
            assert [result and result.result for result in stored] == ["first", *range(1, 52), 2]
        with pytest.raises(EncodeError, match="cannot be written"):
            backend.packed(ResultMessage(_id(), states.SUCCESS, object()))

    def test_of_many_that_store_at_once_the_success_stays(self, backend: ResultBackend) -> None:
        ids = [_id() for _ in range(10)]
        error = exception_as_dict(ValueError("another run"))

        def run(number: int) -> None:
            for task_id in ids:
                if number == 2:
                    self.store(backend, task_id, value="first")
                else:
                    self.store(backend, task_id, states.FAILURE, error)

        for running in [_Waiting(lambda number=number: run(number)) for number in range(5)]:  # type: ignore[misc]
            running.outcome()

        def is_success(task_id: str) -> bool:
            stored = backend.find(task_id)
            return stored is not None and stored.status == states.SUCCESS

        for task_id in ids:
            eventually(lambda task_id=task_id: is_success(task_id))  # type: ignore[misc]

    # -- groups and chords

    def test_a_group_is_kept_until_it_is_deleted_or_refused_by_name(self, backend: ResultBackend) -> None:
        members = [AsyncResult[int](_id(), backend) for _ in range(2)]
        group = GroupResult(_id(), members, backend)
        if type(backend).save_group is StoreDefaults.save_group:
            with pytest.raises(BackendNotConfigured, match="does not keep groups"):
                group.save()
            return

        group.save()
        group.save()
        restored = GroupResult.restore(group.id, backend=backend)
        group.delete()

        assert restored is not None
        assert (restored.id, restored.results) == (group.id, members)
        assert GroupResult.restore(group.id, backend=backend) is None

    def test_the_parts_of_a_chord_are_counted_once(self, backend: Any) -> None:
        if not backend.counts_chords:
            pytest.skip("chords are joined in the broker")
        group_id = _id()
        backend.set_chord_size(group_id, 1)
        for _ in range(2):
            backend.add_to_chord(group_id, "added")
            assert backend.add_chord_part(group_id, 0, ResultMessage("first", states.SUCCESS, 1)) is None

        everything = backend.add_chord_part(group_id, None, ResultMessage("added", states.SUCCESS, 2))
        redelivered = backend.add_chord_part(group_id, None, ResultMessage("added", states.SUCCESS, 2))
        by_another = backend.add_chord_part(group_id, 0, ResultMessage("first", states.SUCCESS, 1))

        assert [part.result for part in everything] == [1, 2]
        assert redelivered == everything, "it may have died before the body was published"
        if self.is_shared:
            assert by_another is None, "that is for who completed it"
        backend.end_chord(group_id)
        assert backend.add_chord_part(group_id, None, ResultMessage("added", states.SUCCESS, 2)) is None

    def test_who_does_not_know_a_chords_body_cannot_add_to_it_or_end_it(self, backend: Any) -> None:
        if not backend.counts_chords:
            pytest.skip("chords are joined in the broker")
        group_id = _id()
        backend.set_chord_size(group_id, 2, "body")
        part = ResultMessage("first", states.SUCCESS, 1)
        for stranger in ("", "other"):
            assert (
                backend.add_chord_part(group_id, 0, ResultMessage(f"thief {stranger}", states.SUCCESS), stranger)
                is None
            )
            assert (
                backend.add_chord_part(group_id, 1, ResultMessage(f"thief2 {stranger}", states.SUCCESS), stranger)
                is None
            )
            backend.end_chord(group_id, stranger)
        assert backend.add_chord_part(group_id, 0, part, "body") is None
        everything = backend.add_chord_part(group_id, 1, ResultMessage("second", states.SUCCESS, 2), "body")
        assert [member.result for member in everything or ()] == [1, 2]
        backend.end_chord(group_id, "body")
        assert backend.add_chord_part(group_id, 0, part, "body") is None

    # -- other processes, time, and servers that are away

    def test_another_process_reads_what_was_stored(self, backend: ResultBackend) -> None:
        if not self.is_shared:
            pytest.skip("its results are for one process")
        parent_id, child_id = _id(), _id()
        self.store(backend, parent_id, value="from the parent")

        def child() -> None:
            assert backend.wait(parent_id, timeout=PATIENCE).result == "from the parent"
            self.store(backend, child_id, value="from the child")

        assert in_a_child(child) == 0
        assert backend.wait(child_id, timeout=PATIENCE).result == "from the child"
        self.store(backend, _id(), value="the parent's connections still work")

    def test_results_go_when_they_expire(self) -> None:
        backend = self.make_expiring(1.0)
        if backend is None:
            pytest.skip("its results are kept as long as somebody holds them")
        backend = _as_opened(backend)
        done, started = _id(), _id()
        began = time.monotonic()
        self.store(backend, done, value=1)
        self.store(backend, started, states.STARTED, {"pid": 1})
        backend.cleanup()
        is_there = backend.find(done) is not None
        # A machine that stood still meanwhile is no failure.
        assert is_there or time.monotonic() - began >= 1.0, "it is not old yet"

        def is_gone() -> bool:
            if not backend.supports_autoexpire:
                backend.cleanup()
            return backend.find(done) is None and backend.find(started) is None

        eventually(is_gone)
        backend.close()

    def test_cleaning_up_leaves_what_has_not_expired(self, backend: ResultBackend) -> None:
        task_id = _id()
        self.store(backend, task_id, value=1)
        backend.wait(task_id, timeout=PATIENCE)

        backend.cleanup()

        assert backend.find(task_id) is not None

    def test_a_server_that_is_away_is_a_named_error_without_the_password(self) -> None:
        backend = self.make_unreachable()
        if backend is None:
            pytest.skip("it has no server of its own")
        result = AsyncResult[Any](_id(), backend)

        for ask in (
            lambda: result.state,
            lambda: result.get(timeout=PATIENCE),
            lambda: asyncio.run(result.aget(timeout=PATIENCE)),
            lambda: self.store(backend, result.id),
        ):
            with pytest.raises(BackendUnreachable) as caught:
                ask()
            assert "secret" not in str(caught.value)
        backend.close()

    # -- many

    def test_many_results_come_in_the_order_in_which_they_are_ready(self, backend: ResultBackend) -> None:
        ids = [_id() for _ in range(5)]
        self.store(backend, ids[3], value=3)
        arrived: list[object] = []
        for task_id, result in backend.iter_ready(ids, timeout=PATIENCE):
            arrived.append((task_id, result.result))
            following = {3: 0, 0: 4, 4: 1, 1: 2}.get(result.result)
            if following is not None:
                self.store(backend, ids[following], value=following)

        assert arrived == [(ids[index], index) for index in (3, 0, 4, 1, 2)]

    def test_results_that_are_missing_at_the_timeout_are_counted(self, backend: ResultBackend) -> None:
        ids = [_id() for _ in range(3)]
        self.store(backend, ids[1], value=1)
        eventually(lambda: backend.find(ids[1]))
        arriving = backend.iter_ready(ids, timeout=0.3)

        assert next(arriving)[0] == ids[1]
        with pytest.raises(TimeoutError, match="2 of 3"):
            next(arriving)

    def test_one_look_finds_what_is_ready_and_does_not_wait(self, backend: ResultBackend) -> None:
        results = ResultSet([AsyncResult[object](_id(), backend) for _ in range(4)])
        for result in results.results[:3]:
            self.store(backend, result.id, value=1)

        eventually(lambda: results.completed_count() == 3)

        assert not results.ready()
        self.store(backend, results.results[3].id, value=1)
        assert results.get(timeout=PATIENCE) == [1, 1, 1, 1]
        assert results.successful()

    def test_hundreds_of_results_are_read_one_after_the_other(self, backend: ResultBackend) -> None:
        results = [AsyncResult[object](_id(), backend) for _ in range(200)]
        for number, result in enumerate(results):
            self.store(backend, result.id, value=number)

        assert [result.get(timeout=PATIENCE) for result in results] == list(range(200))

    def test_threads_wait_side_by_side(self, backend: ResultBackend) -> None:
        ids = [_id() for _ in range(8)]
        waiting = [_Waiting(lambda task_id=task_id: backend.wait(task_id, timeout=PATIENCE)) for task_id in ids]  # type: ignore[misc]

        for number, task_id in reversed(list(enumerate(ids))):
            self.store(backend, task_id, value=number)

        assert [waiter.outcome().result for waiter in waiting] == list(range(8))

    # -- callbacks and coroutines

    def test_a_callback_is_called_once_however_early_it_was_asked_for(self, backend: ResultBackend) -> None:
        early, late = _id(), _id()
        called: list[Any] = []
        calls = threading.Semaphore(0)

        def note(result: UntypedResult) -> None:
            called.append(result.get())
            calls.release()

        self.store(backend, late, value="late")
        backend.wait(late, timeout=PATIENCE)
        AsyncResult[object](late, backend).then(note)
        AsyncResult[object](early, backend).then(note)
        self.store(backend, early, value="early")
        self.store(backend, early, value="early, again")

        assert calls.acquire(timeout=PATIENCE)
        assert calls.acquire(timeout=PATIENCE)
        assert sorted(called) == ["early", "late"]

    def test_a_callback_that_fails_does_not_keep_others_from_being_called(self, backend: ResultBackend) -> None:
        called = threading.Event()
        first, second = _id(), _id()
        AsyncResult[object](first, backend).then(lambda result: 1 / 0)
        AsyncResult[object](second, backend).then(lambda result: called.set())

        self.store(backend, first)
        self.store(backend, second)

        assert called.wait(PATIENCE)

    def test_coroutines_await_results_side_by_side(self, backend: ResultBackend) -> None:
        results = ResultSet([AsyncResult[object](_id(), backend) for _ in range(20)])

        async def main() -> list[object]:
            self.store(backend, results[0].id, value=0)
            waiting = asyncio.ensure_future(results.aget(timeout=PATIENCE))
            await asyncio.sleep(0)
            for number, result in enumerate(results.results[1:], 1):
                await asyncio.to_thread(self.store, backend, result.id, value=number)
            return await waiting

        assert asyncio.run(main()) == list(range(20))

    def test_awaiting_ends_at_the_timeout_and_leaves_nothing_behind(self, backend: ResultBackend) -> None:
        task_id = _id()

        async def main() -> object:
            with pytest.raises(TimeoutError, match=task_id):
                await AsyncResult[object](task_id, backend).aget(timeout=0.05)
            await asyncio.to_thread(self.store, backend, task_id, value="late")
            return await AsyncResult[object](task_id, backend)

        assert asyncio.run(main()) == "late"

    def test_awaiting_may_end_at_any_moment(self, backend: ResultBackend) -> None:
        """In the midst of connecting and subscribing too, where a store's client may take a cancellation for itself."""

        async def main() -> int:
            ended = 0
            for step in range(100):
                waiting = asyncio.ensure_future(AsyncResult[object](_id(), backend).aget(timeout=step * 0.0002))
                await asyncio.wait({waiting}, timeout=PATIENCE)
                ended += waiting.done() and isinstance(waiting.exception(), TimeoutError)
            return ended

        assert asyncio.run(main()) == 100

    def test_awaiting_leaves_nothing_behind_however_it_is_cancelled(self, backend: ResultBackend) -> None:
        """At its own end too, which may take a store's client some time."""

        async def main() -> set[asyncio.Task[object]]:
            before = asyncio.all_tasks()
            for step in range(150):
                seconds = step % 30 * 0.0003
                waiting = asyncio.ensure_future(AsyncResult[object](_id(), backend).aget(timeout=seconds))
                await asyncio.sleep(seconds + step % 4 * 0.0003)
                waiting.cancel()
                await asyncio.wait({waiting}, timeout=PATIENCE)
                assert waiting.done()
            return asyncio.all_tasks() - before

        assert asyncio.run(main()) == set()

    def test_awaiting_a_chain_or_a_group_leaves_nothing_behind(self, backend: ResultBackend) -> None:
        async def main() -> tuple[set[asyncio.Task[object]], list[str]]:
            problems: list[str] = []
            asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(str(context)))
            before = asyncio.all_tasks()
            first = AsyncResult[object](_id(), backend)
            for waits in (AsyncResult[object](_id(), backend, parent=first), ResultSet([first, first])):
                with pytest.raises(TimeoutError):
                    await waits.aget(timeout=0.01)
            return asyncio.all_tasks() - before, problems

        assert asyncio.run(main()) == (set(), [])


def _as_opened(backend: ResultBackend) -> ResultBackend:
    """The backend with what `open_backend` adds to one that derives from nothing of ours."""
    backend_class = completed(type(backend), StoreDefaults)
    if type(backend) is not backend_class:
        backend.__class__ = backend_class
    return backend


def _id() -> str:
    return str(uuid.uuid4())


def in_a_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child; returns its exit code."""
    with warnings.catch_warnings():
        # Python 3.12 and later warn of threads beside a fork; clients of stores have some, and that is what this is about.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - the parent sees the exit code
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class _Waiting:
    """A call that blocks, on a thread of its own."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._outcome: object = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self._outcome = self._call()

    def outcome(self) -> Any:
        """What the call returned."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "it still waits"
        return self._outcome

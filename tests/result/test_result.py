"""What a caller can do with results, against the in-process store."""

from __future__ import annotations

import asyncio
import copy
import json
import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest

from amqtask import AmqTask, states
from amqtask.backends.contract import BackendOptions
from amqtask.backends.memory import MemoryBackend
from amqtask.exceptions import BackendNotConfigured, TaskRevokedError, TimeoutError
from amqtask.execution.context import Context, current
from amqtask.protocol.result import RemoteError, ResultMessage, exception_as_dict, now_iso
from amqtask.result import (
    AsyncResult,
    EagerResult,
    GroupResult,
    ResultSet,
    allow_join_result,
    result_from_tuple,
)
from amqtask.testing.worker import start_worker


class Store(MemoryBackend):
    """The in-process store, with a worker's words."""

    def __init__(self) -> None:
        super().__init__(BackendOptions(url="cache+memory://"))

    def succeed(self, task_id: str, value: Any = None, **more: Any) -> None:
        self.store(ResultMessage(task_id, states.SUCCESS, value, date_done=now_iso(), **more))

    def fail(self, task_id: str, error: BaseException) -> None:
        self.store(ResultMessage(task_id, states.FAILURE, exception_as_dict(error), "the remote traceback"))


@pytest.fixture
def store() -> Store:
    return Store()


def in_a_task(call: Callable[[], Any], *, is_eager: bool = False) -> Any:
    context = Context()
    context.id, context.is_eager = "outer", is_eager
    token = current.set(context)
    try:
        return call()
    finally:
        current.reset(token)


# -- one


def test_a_result_is_pending_until_the_worker_reports(store: Store) -> None:
    result = AsyncResult[int]("a", store)

    assert (result.state, result.status, result.result, result.ready()) == (states.PENDING, states.PENDING, None, False)
    assert not result.successful()
    assert not result.failed()


def test_a_result_that_came_has_all_that_the_worker_said(store: Store) -> None:
    store.succeed("a", 5, children=[(("child", None), None)], extra={"name": "add", "queue": "q", "retries": 1})
    result = AsyncResult[int]("a", store)

    assert result.get(timeout=0) == 5
    assert result.successful()
    assert result.info == 5
    assert (result.name, result.queue, result.retries) == ("add", "q", 1)
    assert result.date_done is not None
    assert result.date_done.tzinfo is not None
    assert result.children == [AsyncResult("child", store)]


def test_a_callback_gets_id_and_value(store: Store) -> None:
    store.succeed("a", 5)
    called: list[Any] = []

    AsyncResult[int]("a", store).get(callback=lambda task_id, value: called.append((task_id, value)))

    assert called == [("a", 5)]


def test_a_failure_is_raised_or_returned(store: Store) -> None:
    store.fail("a", ZeroDivisionError("division by zero"))
    result = AsyncResult[int]("a", store)

    with pytest.raises(ZeroDivisionError, match="division by zero") as caught:
        result.get()

    assert "the remote traceback" in str(caught.value.__cause__)
    assert isinstance(result.get(propagate=False), ZeroDivisionError)
    assert isinstance(result.result, ZeroDivisionError)
    assert result.traceback == "the remote traceback"
    assert result.failed()
    with pytest.raises(ZeroDivisionError):
        result.maybe_throw()
    assert isinstance(result.maybe_throw(propagate=False), ZeroDivisionError)


def test_an_exception_of_an_unknown_class_keeps_its_name(store: Store) -> None:
    described = {"exc_type": "OutOfCheese", "exc_message": ["none left"], "exc_module": "not.imported.here"}
    store.store(ResultMessage("a", states.FAILURE, described))

    with pytest.raises(RemoteError, match="none left") as caught:
        AsyncResult[int]("a", store).get()

    assert type(caught.value).__name__ == "OutOfCheese"


def test_a_revoked_task_raises_that(store: Store) -> None:
    store.store(ResultMessage("a", states.REVOKED, exception_as_dict(TaskRevokedError("expired"))))

    with pytest.raises(TaskRevokedError, match="expired"):
        AsyncResult[int]("a", store).get()


def test_a_state_on_the_way_has_its_meta_and_a_retry_its_cause(store: Store) -> None:
    result = AsyncResult[int]("a", store)
    store.store(ResultMessage("a", "PROGRESS", {"done": 3}))
    assert (result.state, result.info) == ("PROGRESS", {"done": 3})

    store.store(ResultMessage("a", states.RETRY, exception_as_dict(OSError("not yet"))))

    assert isinstance(result.info, OSError)
    assert not result.ready()
    assert result.maybe_throw() is not None


def test_without_a_backend_asking_says_what_to_set() -> None:
    result = AsyncResult[int]("a", None)

    for ask in (result.get, result.ready, lambda: result.state, lambda: asyncio.run(result.aget()), result.forget):
        with pytest.raises(BackendNotConfigured, match="result_backend"):
            ask()


def test_revoking_goes_through_what_was_given(store: Store) -> None:
    told: list[Any] = []
    result = AsyncResult[int]("a", store, revoke=lambda *args, **kwargs: told.append((args, kwargs)))

    result.revoke(terminate=True, signal="SIGKILL")

    assert told == [(("a",), {"terminate": True, "signal": "SIGKILL", "wait": False, "timeout": None})]
    result.revoke_by_stamped_headers({"customer": "x"}, wait=True)
    assert told[1][1] == {
        "terminate": False, "signal": None, "wait": True, "timeout": None, "headers": {"customer": "x"}
    }  # fmt: skip
    with pytest.raises(BackendNotConfigured, match="nobody"):
        AsyncResult[int]("a", store).revoke()


def test_several_are_revoked_with_one_message(store: Store) -> None:
    told: list[Any] = []

    def revoke(ids: Any, **options: Any) -> None:
        told.append((ids, options["terminate"], options["wait"]))

    inner = GroupResult("inner", [AsyncResult[int](name, store, revoke=revoke) for name in "bc"])
    outer = GroupResult("outer", [AsyncResult[int]("a", store, revoke=revoke), inner])

    outer.revoke(terminate=True, wait=True)

    assert told == [(["a", "b", "c"], True, True)]


def test_then_tells_success_from_failure(store: Store) -> None:
    told: list[str] = []
    AsyncResult[int]("a", store).then(lambda r: told.append(f"{r.id} ended"), lambda r: told.append(f"{r.id} failed"))
    AsyncResult[int]("b", store).then(lambda r: told.append(f"{r.id} ended"), lambda r: told.append(f"{r.id} failed"))

    store.succeed("a")
    store.fail("b", ValueError())

    assert told == ["a ended", "b failed"]


def test_a_forgotten_result_is_pending_again(store: Store) -> None:
    store.succeed("a", 1)
    result = AsyncResult[int]("a", store)
    assert result.ready()

    result.forget()

    assert result.state == states.PENDING


def test_results_are_equal_by_id_and_travel_as_tuples(store: Store) -> None:
    first = AsyncResult[int]("first", store)
    last = AsyncResult[int]("last", store, parent=first)

    travelled = result_from_tuple(json.loads(json.dumps(last.as_tuple())), store)

    assert travelled == last
    assert travelled.parent == first
    assert last.as_list() == ["last", "first"]
    assert len({last, travelled}) == 1


# -- a chain


def test_the_error_of_an_earlier_step_is_the_error_of_the_chain(store: Store) -> None:
    first = AsyncResult[int]("first", store)
    last = AsyncResult[int]("last", store, parent=AsyncResult("middle", store, parent=first))
    store.fail("first", ValueError("the first step"))

    with pytest.raises(ValueError, match="the first step"):
        last.get(timeout=60)
    with pytest.raises(ValueError, match="the first step"):
        asyncio.run(last.aget(timeout=60))


def test_one_timeout_covers_the_whole_chain(store: Store) -> None:
    last = AsyncResult[int]("last", store, parent=AsyncResult("first", store))

    with pytest.raises(TimeoutError, match="first"):
        last.get(timeout=0.01)


def test_collecting_follows_what_tasks_published(store: Store) -> None:
    store.succeed("a", 1, children=[(("b", None), None), (("c", None), None)])
    store.succeed("b", 2, children=[(("d", None), None)])
    store.succeed("c", 3)
    store.succeed("d", 4)

    assert [(str(result), value) for result, value in AsyncResult[int]("a", store).collect()] == [
        ("a", 1),
        ("b", 2),
        ("c", 3),
        ("d", 4),
    ]
    assert AsyncResult[int]("a", store).get_leaf() == 4


# -- within a task


def test_waiting_within_a_task_is_refused(store: Store) -> None:
    store.succeed("a", 1)
    result = AsyncResult[int]("a", store)

    for ask in (result.get, ResultSet([result]).get, lambda: asyncio.run(result.aget())):
        with pytest.raises(RuntimeError, match="within a task"):
            in_a_task(ask)


def test_waiting_within_a_task_can_be_allowed(store: Store) -> None:
    store.succeed("a", 1)
    result = AsyncResult[int]("a", store)

    def allowed() -> int:
        with allow_join_result():
            return result.get()

    assert in_a_task(allowed) == 1
    assert in_a_task(lambda: result.get(disable_sync_subtasks=False)) == 1
    assert in_a_task(result.get, is_eager=True) == 1
    assert in_a_task(result.ready)
    assert in_a_task(EagerResult("e", 7, states.SUCCESS).get) == 7


# -- many


def test_values_come_in_the_order_of_the_calls(store: Store) -> None:
    results = ResultSet([AsyncResult[int](name, store) for name in "abc"])
    for name in "cab":
        store.succeed(name, name.upper())

    assert results.get(timeout=0) == ["A", "B", "C"]
    assert results.join() == ["A", "B", "C"]
    assert list(results.iterate()) == ["A", "B", "C"]


def test_the_first_failure_that_comes_is_raised_at_once(store: Store) -> None:
    results = ResultSet([AsyncResult[int](name, store) for name in "abc"])
    store.fail("c", ValueError("c"))

    with pytest.raises(ValueError, match="c"):
        results.get(timeout=60)
    with pytest.raises(ValueError, match="c"):
        asyncio.run(results.aget(timeout=60))
    with pytest.raises(ValueError, match="c"):
        results.maybe_throw()
    assert results.failed()
    assert results.waiting()


def test_failures_are_values_on_request(store: Store) -> None:
    results = ResultSet([AsyncResult[int](name, store) for name in "ab"])
    store.fail("b", ValueError("b"))
    store.succeed("a", 1)

    values = results.get(propagate=False)
    awaited = asyncio.run(results.aget(propagate=False))

    assert values[0] == awaited[0] == 1
    assert isinstance(values[1], ValueError)
    assert isinstance(awaited[1], ValueError)


def test_counting_and_states_of_many(store: Store) -> None:
    group = GroupResult("g", [AsyncResult[int]("a", store), ResultSet([AsyncResult[int]("b", store)])])
    assert (group.completed_count(), group.ready(), group.waiting()) == (0, False, True)

    store.succeed("a", 1)
    assert (group.completed_count(), group.successful()) == (1, False)
    store.succeed("b", 2)

    assert (group.completed_count(), group.successful(), group.failed()) == (2, True, False)
    assert group.get() == [1, [2]]


def test_who_waited_in_vain_is_told_for_how_long(store: Store) -> None:
    with pytest.raises(TimeoutError, match=r"no result of task a within 0\.01 s$"):
        AsyncResult[int]("a", store).get(timeout=0.01)


def test_one_timeout_covers_all(store: Store) -> None:
    results = ResultSet([AsyncResult[int](name, store) for name in "ab"])
    store.succeed("a")

    with pytest.raises(TimeoutError, match="1 of 2 results"):
        results.get(timeout=0.01)


def test_results_are_iterated_as_they_come(store: Store) -> None:
    results = ResultSet([AsyncResult[str](name, store) for name in "abc"])
    store.succeed("b", "b")
    seen = []
    for value in results.iterate(timeout=60):
        seen.append(value)
        following = {"b": "c", "c": "a"}.get(value)
        if following:
            threading.Thread(target=store.succeed, args=(following, following)).start()

    assert seen == ["b", "c", "a"]
    assert [task_id for task_id, _ in results.iter_native()] == ["a", "b", "c"]


def test_a_set_changes_like_a_set(store: Store) -> None:
    a, b = AsyncResult[int]("a", store), AsyncResult[int]("b", store)
    results = ResultSet([a])
    results.add(b)
    results.add(AsyncResult[int]("b", store))
    results.update([a])
    assert len(results) == 2
    results.remove(a)
    results.discard(a)

    assert list(results) == [b]
    with pytest.raises(KeyError):
        results.remove(a)
    results.clear()
    assert results.get() == []
    assert results.ready()


def test_a_group_travels_as_a_tuple(store: Store) -> None:
    group = GroupResult("g", [AsyncResult[int]("a", store)], parent=AsyncResult[int]("p", store))

    travelled = result_from_tuple(json.loads(json.dumps(group.as_tuple())), store)

    assert isinstance(travelled, GroupResult)
    assert (travelled.id, travelled.results, travelled.parent) == ("g", group.results, group.parent)


def test_a_step_after_a_chord_does_not_ask_for_the_header(store: Store) -> None:
    header = GroupResult("g", [AsyncResult[int]("a", store)])
    last = AsyncResult[int]("last", store, parent=header)
    store.succeed("last", 3)

    assert last.get(timeout=60) == 3


def test_a_step_whose_own_result_is_there_does_not_wait_for_a_parent_that_keeps_none(store: Store) -> None:
    last = AsyncResult[int]("last", store, parent=AsyncResult[int]("ignored", store))
    store.succeed("last", 3)

    assert last.get(timeout=60) == 3


# -- eager


def test_an_eager_result_has_its_value_or_error() -> None:
    good = EagerResult[int]("a", 3, states.SUCCESS, name="add")
    bad = EagerResult[int]("b", KeyError("x"), states.FAILURE, "trace")

    assert (good.get(), good.result, good.name, asyncio.run(good.aget())) == (3, 3, "add", 3)
    assert good.ready()
    with pytest.raises(KeyError):
        bad.get()
    assert isinstance(bad.get(propagate=False), KeyError)
    assert bad.traceback == "trace"
    good.forget()
    assert good.get() == 3


def test_a_callback_may_ask_for_the_value_whoever_has_stored_it() -> None:
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with AmqTask("then", broker="memory://", backend="cache+memory://", set_as_current=False) as app:
        begin = threading.Event()
        task = app.task(name="one")(lambda: (begin.wait(60), 1)[1])
        with start_worker(app, pool="threads"):
            task.delay().then(lambda result: told.put(result.get()))
            begin.set()
            assert told.get(timeout=60) == 1


def test_a_task_that_publishes_itself_under_its_own_id_is_collected_once() -> None:
    store = Store()
    store.succeed("poll", 1, children=[(("poll", None), None), (("other", None), None)])
    store.succeed("other", 2, children=[(("poll", None), None)])
    result: AsyncResult[int] = AsyncResult("poll", store)

    assert [(each.id, value) for each, value in result.collect(timeout=1.0)] == [("poll", 1), ("other", 2)]
    assert [each.id for _, each in result.iterdeps(intermediate=True)] == ["poll", "other"]
    assert result.get_leaf() == 2


# -- what callers and others may do to results


class _Whole:
    """A number of another library's (numpy's): none of Python's, but it can be added to them."""

    def __radd__(self, other: float) -> float:
        return other + 0

    def __bool__(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("timeout", "error"), [(float("nan"), ValueError), ("5", TypeError), (-1, TimeoutError), (_Whole(), TimeoutError)]
)
def test_a_timeout_that_is_no_time_ends_no_wait_late(timeout: Any, error: type[Exception]) -> None:
    store = Store()
    result = AsyncResult[int]("one", store, parent=AsyncResult("zero", store))
    for wait in (
        AsyncResult[int]("one", store).get,
        result.get,
        lambda timeout: result.get(timeout, on_interval=lambda: None),
        ResultSet([result, AsyncResult("two", store)]).get,
        lambda timeout: list(GroupResult("g", [result]).iter_native(timeout)),
    ):
        with pytest.raises(error):
            wait(timeout=timeout)


def test_parents_in_a_circle_end_no_wait_late() -> None:
    store = Store()
    first, second = AsyncResult[int]("first", store), AsyncResult[int]("second", store)
    first.parent, second.parent = second, first
    alone = AsyncResult[int]("alone", store)
    alone.parent = alone

    for result in (first, alone):
        with pytest.raises(TimeoutError):
            result.get(timeout=0.01)
    assert (first.as_list(), alone.as_list()) == (["first", "second"], ["alone"])
    store.succeed("alone", 7)
    assert alone.get(timeout=5) == 7
    store.fail("second", ValueError("x"))
    with pytest.raises(ValueError, match="x"):
        first.get(timeout=5)


def test_parents_in_a_circle_and_long_rows_of_them_are_forgotten_written_and_copied() -> None:
    store = Store()
    first, second = AsyncResult[int]("first", store), AsyncResult[int]("second", store)
    first.parent, second.parent = second, first
    last = AsyncResult[int]("0", store)
    for number in range(1, 5000):
        last = AsyncResult[int](str(number), store, parent=last)
    for task_id in ("first", "second", "0", "4999"):
        store.succeed(task_id)

    first.forget()
    last.forget()

    assert [store.find(task_id) for task_id in ("first", "second", "0", "4999")] == [None] * 4
    assert first.as_tuple() == (("first", (("second", None), None)), None)
    assert last.as_tuple()[0][0] == "4999"
    assert copy.deepcopy(first).as_list() == ["first", "second"]


@pytest.mark.parametrize("odd", ["soon", 17, 1.5, [1], {"a": 1, "b": 2}, True], ids=repr)
def test_what_others_wrote_into_a_result_breaks_nothing(odd: Any) -> None:
    meta = {"task_id": "one", "status": "FAILURE", "result": odd, "traceback": odd, "date_done": odd}
    more = dict.fromkeys(("name", "args", "kwargs", "worker", "retries", "queue"), odd)
    result = AsyncResult[int]("one", Store())
    # As a store of keys and values reads it.
    children = [odd, [odd, odd], [[odd, odd], odd], "two"]
    result.final_meta = ResultMessage.from_meta({**meta, **more, "children": children})

    assert result.date_done is None
    assert (result.name, result.args, result.kwargs, result.worker, result.retries, result.queue) == (odd,) * 6
    assert "two" in [child.id for child in result.children or ()]
    assert isinstance(result.get(timeout=5, propagate=False), Exception)
    assert repr(result.traceback)


def test_children_that_are_no_list_or_without_end_are_none() -> None:
    no_list, endless = AsyncResult[int]("one", Store()), AsyncResult[int]("two", Store())
    deep: Any = [["x", None], None]
    for _ in range(5000):
        deep = [["x", deep], None]
    no_list.final_meta = ResultMessage("one", states.SUCCESS, children=17)  # type: ignore[arg-type]
    endless.final_meta = ResultMessage("two", states.SUCCESS, children=[deep])
    assert (no_list.children, endless.children) == (None, None)


@pytest.mark.parametrize("odd", [None, 17, [], [1, 2], ["a"], ["a", 5], [[None, None], None], {"a": 1}], ids=repr)
def test_what_is_no_result_as_data_is_named(odd: Any) -> None:
    with pytest.raises(ValueError, match=r"no result as as_tuple\(\) describes it"):
        result_from_tuple(odd, Store())

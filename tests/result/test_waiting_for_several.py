"""Who waits for several results, or for a chain: what is told meanwhile, and what belongs together."""

from __future__ import annotations

import copy
import pickle
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from amqtask import AmqTask, chain, group, states
from amqtask.exceptions import TaskRevokedError, TimeoutError
from amqtask.result import AsyncResult, EagerResult, GroupResult, ResultSet, result_from_tuple
from amqtask.testing.worker import start_worker
from tests.result.test_result import Store

WAIT = 30


class Enough(Exception):
    """Raised by who does not want to wait any more."""


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture(scope="module")
def app() -> Iterator[AmqTask]:
    app = AmqTask("several", broker="memory://", backend="cache+memory://")

    @app.task(name="one")
    def one() -> int:
        return 1

    @app.task(name="more")
    def more(number: int) -> int:
        return number + 1

    @app.task(name="parent")
    def parent(fails: bool) -> None:
        one.delay()
        if fails:
            raise ValueError("on purpose")

    with start_worker(app, pool="threads", concurrency=2):
        yield app


# -- what is told meanwhile


def results_of(kind: str, store: Store) -> Any:
    if kind == "one":
        return AsyncResult[int]("a", store)
    if kind == "chain":
        return AsyncResult[int]("a", store, parent=AsyncResult[int]("before", store))
    return GroupResult("g", [AsyncResult[int]("a", store), GroupResult("inner", [AsyncResult[int]("b", store)])])


@pytest.mark.parametrize("kind", ["one", "chain", "group"])
def test_who_waits_is_called_again_and_again_and_may_end_the_wait(store: Store, kind: str) -> None:
    calls: list[int] = []

    def called() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Enough

    with pytest.raises(Enough):
        results_of(kind, store).get(timeout=WAIT, interval=0.01, on_interval=called)


@pytest.mark.parametrize("kind", ["one", "chain", "group"])
def test_a_wait_that_is_called_meanwhile_ends_at_its_timeout(store: Store, kind: str) -> None:
    with pytest.raises(TimeoutError, match=r"0\.02 s"):
        results_of(kind, store).get(timeout=0.02, interval=0.01, on_interval=lambda: None)


def test_each_step_of_a_chain_is_told(app: AmqTask) -> None:
    told: list[Any] = []
    result = chain(app.tasks["one"].s(), app.tasks["more"].s(), app.tasks["more"].s()).delay()

    assert result.get(WAIT, on_message=told.append, interval=0.01) == 3

    assert told[-1]["task_id"] == result.id
    assert {meta["task_id"] for meta in told} <= set(result.as_list())


def test_each_member_of_a_group_is_told_once(store: Store) -> None:
    told: list[Any] = []
    store.succeed("a", 1)
    store.succeed("b", 2)

    assert results_of("group", store).get(WAIT, on_message=told.append) == [1, [2]]

    assert sorted(meta["task_id"] for meta in told) == ["a", "b"]


def test_the_error_of_an_earlier_step_may_be_a_timeout_of_its_own(store: Store) -> None:
    store.fail("before", TimeoutError("no answer of the shop within 3 s"))

    with pytest.raises(TimeoutError, match="of the shop"):
        results_of("chain", store).get(timeout=WAIT)


# -- `then`


def test_then_of_several_is_called_once_when_the_last_has_ended(store: Store) -> None:
    told: list[Any] = []
    results = results_of("group", store)
    assert results.then(lambda ended: told.append(ended.get())) is results

    store.succeed("a", 1)
    assert told == []
    store.succeed("b", 2)

    assert told == [[1, [2]]]


def test_then_of_several_tells_a_failure(store: Store) -> None:
    told: list[str] = []
    results_of("group", store).then(lambda _: told.append("ended"), lambda _: told.append("failed"))

    store.fail("a", ValueError())
    store.succeed("b", 2)

    assert told == ["failed"]


def test_then_of_what_has_ended_is_called_now() -> None:
    told: list[Any] = []
    eager: EagerResult[int] = EagerResult("e", 7, states.SUCCESS)

    eager.then(lambda result: told.append(result.get()))
    ResultSet([eager]).then(lambda results: told.append(results.get()))
    ResultSet([]).then(lambda results: told.append(len(results)))

    assert told == [7, [7], 0]


# -- the same task twice


def test_a_task_may_be_among_several_results_twice(store: Store) -> None:
    results = ResultSet([AsyncResult[int]("a", store), AsyncResult[int]("a", store)])
    assert not results.ready()

    store.succeed("a", 1)

    assert results.ready()
    assert not results.waiting()
    assert results.successful()
    assert results.completed_count() == 2
    assert results.get(timeout=0) == [1, 1]
    assert list(results.iterate()) == [1, 1]


# -- what a task led to


def test_what_a_failed_task_led_to_is_known(app: AmqTask) -> None:
    result = app.tasks["parent"].delay(True)

    values = [value for _, value in result.collect(WAIT, propagate=False)]

    assert isinstance(values[0], ValueError)
    assert values[1:] == [1]
    assert len(result.graph) == 2
    with pytest.raises(ValueError, match="on purpose"):
        list(result.collect(WAIT))


def test_what_is_known_now_is_told_without_waiting(store: Store) -> None:
    store.succeed("a", 1, children=[(("child", None), None)])
    result = AsyncResult[int]("a", store)

    assert [str(one) for _, one in result.iterdeps(intermediate=True)] == ["a", "child"]
    assert len(result.build_graph(intermediate=True)) == 2


# -- as values


def test_several_results_are_pickled_and_copied(app: AmqTask) -> None:
    app.set_current()
    results = group(app.tasks["one"].s(), app.tasks["one"].s()).delay()

    for again in (pickle.loads(pickle.dumps(results)), copy.deepcopy(results), copy.copy(results)):
        assert again == results
        assert again.id == results.id
        assert again.results is not results.results
        assert again.get(WAIT) == [1, 1]
    assert pickle.loads(pickle.dumps(ResultSet(results.results))) == ResultSet(results.results)


def test_a_group_of_nothing_is_a_result_all_the_same(store: Store) -> None:
    nothing = GroupResult("g", [], store)

    assert nothing
    assert AsyncResult[int]("a", store, parent=nothing).as_list() == ["a", "g"]


def test_forgetting_drops_the_steps_before_it(store: Store) -> None:
    members = GroupResult("g", [AsyncResult[int]("b", store)])
    result = AsyncResult[int]("a", store, parent=members)
    for name in "ab":
        store.succeed(name)

    result.forget()

    assert store.find("a") is store.find("b") is None


def test_an_id_may_be_a_uuid_and_not_nothing(store: Store) -> None:
    number = uuid.uuid4()
    store.succeed(str(number), 1)

    assert AsyncResult[int](number, store).get(timeout=0) == 1  # type: ignore[arg-type] # as a model's field has it
    with pytest.raises(ValueError, match="not None"):
        AsyncResult[int](None, store)  # type: ignore[arg-type]


def test_a_result_of_old_programs_is_a_pair(store: Store) -> None:
    assert result_from_tuple(["some-id", None], store) == AsyncResult[int]("some-id", store)


def test_an_eager_result_that_is_revoked_says_so() -> None:
    eager: EagerResult[int] = EagerResult("e", 7, states.SUCCESS)

    eager.revoke()

    assert eager.state == states.REVOKED
    assert isinstance(eager.result, TaskRevokedError)
    with pytest.raises(TaskRevokedError):
        eager.get()


def test_an_eager_result_can_be_cancelled_alone_or_with_others() -> None:
    alone, member = (EagerResult[int](name, 7, states.SUCCESS) for name in "ab")

    alone.cancel()
    GroupResult("g", [member]).cancel()

    assert (alone.state, member.state) == (states.REVOKED, states.REVOKED)


def test_results_of_several_applications_are_waited_for_together(store: Store) -> None:
    other = Store()
    store.succeed("a", 1)
    other.succeed("b", 2)
    store.succeed("c", 3)

    def several() -> ResultSet:
        return ResultSet([AsyncResult("a", store), AsyncResult("b", other), AsyncResult("c", store)])

    assert several().get(timeout=5.0) == [1, 2, 3]
    assert several().join(timeout=5.0) == [1, 2, 3]
    assert several().completed_count() == 3
    missing = ResultSet([AsyncResult("a", store), AsyncResult("nowhere", other)])
    with pytest.raises(TimeoutError):
        missing.get(timeout=0.05)

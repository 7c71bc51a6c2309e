"""Runs that ask for other runs: retries with other arguments, and calls that a task makes inline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from amqtask import AmqTask, states
from amqtask.exceptions import MaxRetriesExceededError, Retry, Terminated
from amqtask.execution.request import Abandoned, HardLimitReached
from amqtask.testing.tasks import make_executor, request
from amqtask.testing.worker import start_worker


@pytest.fixture(scope="module")
def app() -> Iterator[AmqTask]:
    """With a task that retries with what it is told, and a worker."""
    app = AmqTask("again", broker="memory://", backend="cache+memory://")

    @app.task(name="again", bind=True, default_retry_delay=0)
    def again(self: Any, x: int, y: int = 2, *, told: Any = None) -> list[int]:
        if not self.request.retries:
            raise self.retry(**(self.request.headers.get("told") or {}))
        return [x, y]

    @app.task(name="kinds", bind=True, default_retry_delay=0)
    def kinds(self: Any, only: int, /, named: int, *rest: int, **more: int) -> list[Any]:
        if not self.request.retries:
            raise self.retry(**self.request.headers["told"])
        return [only, named, list(rest), more]

    with start_worker(app, pool="threads", concurrency=1):
        yield app


@pytest.mark.parametrize("inline", [False, True])
def test_a_new_value_takes_the_place_of_one_argument_whatever_its_kind(app: AmqTask, inline: bool) -> None:
    task = app.tasks["kinds"]
    run = task.apply if inline else task.apply_async
    told = {"told": {"kwargs": {"named": 7, "more": 8}}}

    assert run((1, 2, 3, 4), headers=told).get(timeout=60) == [1, 7, [3, 4], {"more": 8}]


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize(
    ("args", "kwargs", "told", "found"),
    [
        ((), {"x": 1}, {"args": [5]}, [5, 2]),
        ((), {"x": 1, "y": 3}, {"args": [5]}, [5, 3]),
        ((1,), {"y": 3}, {"args": [5, 6]}, [5, 6]),
        ((1,), {}, {"kwargs": {"x": 5}}, [5, 2]),
        ((1, 3), {}, {"kwargs": {"x": 5}}, [5, 3]),
        ((1, 3), {}, {"kwargs": {"y": 6}}, [1, 6]),
        ((1,), {"y": 3}, {"args": [5], "kwargs": {"y": 6}}, [5, 6]),
        ((1,), {"y": 3}, {}, [1, 3]),
    ],
)
def test_new_arguments_of_a_retry_take_the_place_of_the_old_ones(
    app: AmqTask, args: Any, kwargs: Any, told: Any, found: list[int], inline: bool
) -> None:
    task = app.tasks["again"]
    run = task.apply if inline else task.apply_async

    assert run(args, kwargs, headers={"told": told}).get(timeout=60) == found


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"coutdown": 5}, r"task again: retry\(\) has no option 'coutdown'"),
        ({"time_limit": "long"}, "task again: time_limit wants"),
        ({"priority": 300}, "task again: priority wants"),
        ({"args": 5}, "task again: args is a list or a tuple"),
        ({"kwargs": [1]}, "task again: kwargs is a dictionary"),
    ],
)
def test_what_no_retry_can_have_is_an_error_of_the_task(app: AmqTask, told: Any, said: str, inline: bool) -> None:
    task = app.tasks["again"]
    run = task.apply if inline else task.apply_async

    with pytest.raises((TypeError, ValueError), match=said):
        run((1,), headers={"told": told}).get(timeout=60)


@pytest.mark.parametrize("inline", [False, True])
def test_the_cause_of_a_retry_may_be_a_text(app: AmqTask, inline: bool) -> None:
    task = app.tasks["again"]
    run = task.apply if inline else task.apply_async

    assert run((1,), headers={"told": {"exc": "not yet"}}).get(timeout=60) == [1, 2]
    with pytest.raises(MaxRetriesExceededError, match="not yet"):
        run((1,), headers={"told": {"exc": "not yet", "max_retries": 0}}).get(timeout=60)


def test_a_retry_that_a_task_raises_by_itself_comes_after_the_tasks_delay() -> None:
    app = AmqTask("raising", broker="memory://", backend="cache+memory://")

    @app.task(bind=True, default_retry_delay=0)
    def raising(self: Any) -> int:
        if not self.request.retries:
            raise Retry
        return int(self.request.retries)

    with start_worker(app, pool="threads", concurrency=1):
        assert raising.delay().get(timeout=60) == 1


def test_a_task_that_is_run_by_another_is_its_child() -> None:
    app = AmqTask("families", broker="memory://")

    @app.task(name="leaf", bind=True)
    def leaf(self: Any) -> list[Any]:
        return [self.request.id, self.request.parent_id, self.request.root_id]

    @app.task(name="branch", bind=True)
    def branch(self: Any) -> list[Any]:
        return [*leaf.apply().get(), self.request.id, self.request.parent_id, self.request.root_id]

    @app.task(name="root", bind=True)
    def root(self: Any) -> list[Any]:
        return [*branch.apply().get(), self.request.id, self.request.parent_id, self.request.root_id]

    _, leafs_parent, leafs_root, branch_id, branchs_parent, branchs_root, root_id, parent, roots_root = (
        root.apply().get()
    )

    assert (parent, roots_root) == (None, root_id)
    assert (branchs_parent, branchs_root) == (root_id, root_id)
    assert (leafs_parent, leafs_root) == (branch_id, root_id)


def test_a_soft_limit_above_the_hard_one_is_refused_whoever_says_them() -> None:
    app = AmqTask("limits", broker="memory://")

    @app.task(name="limited", soft_time_limit=20, time_limit=10)
    def limited() -> None: ...

    @app.task(name="bounded", time_limit=10)
    def bounded() -> None: ...

    for call in (limited.delay, lambda: bounded.apply_async(soft_time_limit=11)):
        with pytest.raises(ValueError, match="soft_time_limit must be less than or equal to time_limit"):
            call()
    limited.apply_async(time_limit=30)


@pytest.mark.parametrize("end", [HardLimitReached(1), Abandoned(), Terminated("revoked")])
def test_a_task_that_is_ended_while_it_runs_another_ends_as_a_whole(end: Terminated) -> None:
    app = AmqTask("ended", broker="memory://", backend="cache+memory://")
    went_on: list[str] = []

    @app.task(name="inner")
    def inner() -> None:
        raise end  # as its pool does, wherever the task is

    @app.task(name="between")
    def between() -> None:
        inner.apply()
        went_on.append("between")

    @app.task(name="outer")
    def outer() -> None:
        between.apply()
        went_on.append("outer")

    app.finalize()
    tasks: Any = app.tasks.values()
    outcome = make_executor(*tasks).execute(request(1, "outer"))

    assert went_on == []
    assert outcome.state in (states.FAILURE, states.REVOKED, states.REJECTED)

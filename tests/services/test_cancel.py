"""A workflow is cancelled with one message: what waits, what is still to come, and what its tasks would call."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from amqtask import AmqTask, chain, chord, group
from amqtask.exceptions import TaskRevokedError, Terminated
from amqtask.execution.chain_steps import MOST, Stops
from amqtask.result import GroupResult
from amqtask.testing.worker import start_worker


class Flow:
    """An application whose tasks note that they ran."""

    def __init__(self) -> None:
        self.app = AmqTask("flow", broker="memory://", backend="cache+memory://", set_as_current=False)
        self.ran: list[str] = []
        self.began, self.may_go = threading.Event(), threading.Event()
        self.children: list[Any] = []
        app, ran = self.app, self.ran

        @app.task(name="flow.note")
        def note(*what: Any) -> str:
            ran.append(str(what[-1]))
            return str(what[-1])

        @app.task(name="flow.call")
        def call() -> None:
            self.began.set()
            self.may_go.wait(60)
            self.children.append(note.delay("child"))

        self.note, self.call = note, call

    def active(self) -> set[str]:
        """The ids of the tasks that run."""
        answers = self.app.control.inspect(limit=1).active() or {}
        return {task["id"] for tasks in answers.values() for task in tasks}

    def assert_only_others_run(self) -> None:
        assert self.note.delay("other").get(timeout=60) == "other"
        assert self.ran == ["other"]


@pytest.fixture
def flow() -> Iterator[Flow]:
    made = Flow()
    yield made
    made.app.close()


def assert_cancelled(*results: Any) -> None:
    for result in results:
        with pytest.raises(TaskRevokedError, match="cancelled"):
            result.get(timeout=60, follow_parents=False)
        assert result.state == "REVOKED"


def test_the_later_steps_of_a_chain(flow: Flow) -> None:
    last = chain(flow.note.si("a"), flow.note.si("b"), flow.note.si("c")).apply_async()
    last.cancel()

    with start_worker(flow.app):
        assert_cancelled(last, last.parent, last.parent.parent)
        flow.assert_only_others_run()


@pytest.mark.parametrize("backend", ["cache+memory://", "rpc://"])
def test_the_members_and_the_body_of_a_chord(flow: Flow, backend: str) -> None:
    flow.app.conf.result_backend = backend
    body = chord([flow.note.si(str(number)) for number in range(5)], flow.note.si("body")).apply_async()
    asyncio.run(body.acancel())

    with start_worker(flow.app):
        assert_cancelled(body, *body.parent.results)
        flow.assert_only_others_run()


def test_a_group_of_chains(flow: Flow) -> None:
    started = group((chain(flow.note.si("a"), flow.note.si("b")) for _ in range(3)), app=flow.app).apply_async()
    started.cancel()

    with start_worker(flow.app):
        assert_cancelled(*started.results)
        flow.assert_only_others_run()


def test_a_group_that_was_restored(flow: Flow) -> None:
    started = group((flow.note.si("a") for _ in range(2)), app=flow.app).apply_async()
    started.save()
    restored = GroupResult.restore(started.id, app=flow.app)
    assert restored is not None
    restored.cancel()

    with start_worker(flow.app):
        assert_cancelled(*started.results)
        flow.assert_only_others_run()


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_what_a_running_task_calls(flow: Flow, pool: str) -> None:
    calling = flow.call.delay()
    with start_worker(flow.app, pool=pool):
        assert flow.began.wait(60)
        calling.cancel(wait=pool == "threads")
        flow.may_go.set()
        calling.get(timeout=60)
        assert_cancelled(flow.children[0])
        flow.assert_only_others_run()


def test_what_runs_is_left_alone_without_terminate_and_is_all_that_is_meant_without_tree(flow: Flow) -> None:
    last = chain(flow.note.si("a"), flow.note.si("b")).apply_async()
    last.cancel(tree=False)

    with start_worker(flow.app):
        assert last.parent.get(timeout=60) == "a"
        with pytest.raises(TaskRevokedError, match="revoked"):
            last.get(timeout=60)


def test_all_of_one_root_by_its_id_alone(flow: Flow) -> None:
    last = chain(flow.note.si("a"), flow.note.si("b")).apply_async()
    flow.app.control.cancel(last.parent.id)

    with start_worker(flow.app):
        assert_cancelled(last, last.parent)


@pytest.mark.parametrize("pool", ["threads", "solo", "asyncio"])
def test_a_running_task_sees_that_it_is_cancelled(flow: Flow, pool: str) -> None:
    began = threading.Event()

    @flow.app.task(name="flow.look", bind=True)
    def look(self: Any) -> str:
        was_cancelled = self.is_cancelled()
        began.set()
        while not self.is_cancelled():
            threading.Event().wait(0.005)  # the task's work
        return f"{was_cancelled}, then {self.is_cancelled()}"

    @flow.app.task(name="flow.end", bind=True)
    def end(self: Any) -> None:
        while not self.is_cancelled():
            threading.Event().wait(0.005)
        raise Terminated("it was cancelled")

    with start_worker(flow.app, pool=pool, concurrency=1):
        looking, ending = look.delay(), end.delay()
        assert began.wait(60)
        looking.cancel()
        assert looking.get(timeout=60) == "False, then True"
        while ending.id not in flow.active():
            pass
        ending.cancel(tree=False)
        with pytest.raises(TaskRevokedError, match="it was cancelled"):
            ending.get(timeout=60)
        flow.assert_only_others_run()


def test_a_coroutine_is_cancelled_and_may_clean_up(flow: Flow) -> None:
    began = threading.Event()

    @flow.app.task(name="flow.wait")
    async def wait(*, goes_on: bool) -> str:
        began.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            flow.ran.append("cleaned up")
            if not goes_on:
                raise
        return "went on"

    with start_worker(flow.app, pool="asyncio", concurrency=2):
        results: list[Any] = [wait.delay(goes_on=goes_on) for goes_on in (True, False)]
        for result in results:
            while result.id not in flow.active():
                pass
            assert began.wait(60)
        for result in results:
            result.cancel()
        assert results[0].get(timeout=60) == "went on"
        with pytest.raises(TaskRevokedError, match="cancelled"):
            results[1].get(timeout=60)
    assert flow.ran == ["cleaned up"] * 2


def test_outside_of_a_task_nothing_is_cancelled(flow: Flow) -> None:
    assert flow.note.is_cancelled() is False


def test_only_the_number_that_was_asked_is_found() -> None:
    stops = Stops()
    assert 1 not in stops
    for number in (1, 256, -(7 << 32) - 1, 2**70 + 3):
        stops.add(number)
        assert number in stops
    assert not any(number in stops for number in (2, 255, 257, 65536, 1 << 32))
    for number in range(1000, 1000 + MOST):
        stops.add(number)
    assert 1 not in stops
    assert all(number in stops for number in (1000, 999 + MOST))

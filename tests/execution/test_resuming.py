"""A redelivered message of a chain: what the result store knows to have run is not run again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from amqtask import states
from amqtask.backends.contract import StoreDefaults
from amqtask.exceptions import BackendUnreachable
from amqtask.execution.executor import Executor
from amqtask.execution.request import Answer, Outcome, Request
from amqtask.protocol.message import Message
from amqtask.protocol.result import ResultMessage
from amqtask.protocol.task import RUN_HEADER
from amqtask.testing.tasks import PlainTask, make_executor, request

RUN = "run-1"
Execute = Callable[[Executor, Request], Outcome]


class Server(StoreDefaults):
    """A store with a server of its own that gives back what it was given."""

    blocks = True
    keeps_runs = True

    def __init__(self) -> None:
        self.results: dict[str, ResultMessage] = {}
        self.is_away = False

    def message_for(self, result: ResultMessage, reply_to: str | None, correlation_id: str | None) -> Message | None:
        return None

    def store(self, result: ResultMessage) -> None:
        self.results[result.task_id] = result

    def find(self, task_id: str) -> ResultMessage | None:
        if self.is_away:
            raise BackendUnreachable("away")
        return self.results.get(task_id)

    def knows(self, task_id: str, value: Any, *, run: str = RUN, state: str = states.SUCCESS) -> None:
        self.results[task_id] = ResultMessage(task_id, state, value, extra={RUN_HEADER: run})


class Forgetful(Server):
    """One that keeps only what it has columns for."""

    keeps_runs = False


def at_once(executor: Executor, found: Request) -> Outcome:
    return executor.execute(found)


def on_a_loop(executor: Executor, found: Request) -> Outcome:
    async def elsewhere(function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.to_thread(function, *arguments)

    return asyncio.run(executor.aexecute(found, elsewhere))


@pytest.fixture(params=[at_once, on_a_loop])
def execute(request: pytest.FixtureRequest) -> Execute:
    """How the executor is called."""
    found: Execute = request.param
    return found


def step(task_id: str, **options: Any) -> dict[str, Any]:
    return {"task": f"task-{task_id}", "args": [], "kwargs": {}, "options": {"task_id": task_id, **options}}


def chain_of(*steps: dict[str, Any]) -> dict[str, Any]:
    """The embed of a message that is followed by these, in their order."""
    return {"chain": list(reversed(steps))}


class Case:
    """A task that counts its runs, and a store."""

    def __init__(self, store: Server | None = None) -> None:
        self.store = store or Server()
        self.runs = 0
        self.executor = make_executor(PlainTask(self.run, "t"), store=self.store)

    def run(self) -> str:
        self.runs += 1
        return "value"

    def request(
        self, *, embed: dict[str, Any] | None = None, run: str | None = RUN, redelivered: bool = True
    ) -> Request:
        headers = {RUN_HEADER: run} if run else {}
        return request(1, "t", embed=embed, headers=headers, redelivered=redelivered)


def published(outcome: Outcome) -> tuple[str, Any, list[Any]]:
    """The task, its first argument and the ids of the steps behind it."""
    (message,) = outcome.publish
    body = json.loads(message.body)
    return message.routing_key, body["args"][0], [each["options"]["task_id"] for each in reversed(body["chain"])]


def test_the_step_after_the_last_one_that_is_known_is_published(execute: Execute) -> None:
    case = Case()
    case.store.knows("id-1", 1)
    case.store.knows("b", 2)
    case.store.knows("c", 3)

    outcome = execute(case.executor, case.request(embed=chain_of(step("b"), step("c"), step("d"), step("e"))))

    assert case.runs == 0
    assert published(outcome) == ("task-d", 3, ["e"])
    assert outcome.answer is Answer.ACK
    assert not outcome.is_step


def test_when_all_have_run_there_is_nothing_to_do(execute: Execute) -> None:
    case = Case()
    case.store.knows("id-1", 1)
    case.store.knows("b", 2)

    outcome = execute(case.executor, case.request(embed=chain_of(step("b"))))

    assert (case.runs, outcome.publish, outcome.answer) == (0, (), Answer.ACK)


@pytest.mark.parametrize(
    "case",
    [
        {"redelivered": False},
        {"run": "run-2"},
        {"run": None},
        {"embed": {**chain_of(step("b")), "callbacks": [step("callback")]}},
        {"embed": {"chain": None, "chord": step("body")}},
    ],
    ids=["first delivery", "another run under the same ids", "not ours", "callbacks", "part of a chord"],
)
def test_everything_else_runs(execute: Execute, case: dict[str, Any]) -> None:
    found = Case()
    found.store.knows("id-1", 1)

    execute(found.executor, found.request(**{"embed": chain_of(step("b")), **case}))

    assert found.runs == 1


@pytest.mark.parametrize("state", [states.FAILURE, states.RETRY, states.STARTED])
def test_a_task_that_has_not_ended_well_runs_again(execute: Execute, state: str) -> None:
    case = Case()
    case.store.knows("id-1", 1, state=state)

    execute(case.executor, case.request(embed=chain_of(step("b"))))

    assert case.runs == 1


@pytest.mark.parametrize(
    "second",
    [step("b", link=[step("callback")]), step("b", chord=step("body")), {**step("b"), "task": "celery.group"}],
    ids=["callbacks", "part of a chord", "composition"],
)
def test_a_step_of_which_more_follows_is_published_again(execute: Execute, second: dict[str, Any]) -> None:
    case = Case()
    case.store.knows("id-1", 1)
    case.store.knows("b", 2)

    outcome = execute(case.executor, case.request(embed=chain_of(second, step("c"))))

    assert case.runs == 0
    assert published(outcome) == (second["task"], 1, ["c"])


def test_a_store_that_is_away_is_asked_again_later(execute: Execute) -> None:
    case = Case()
    case.store.is_away = True

    outcome = execute(case.executor, case.request(embed=chain_of(step("b"))))

    assert (case.runs, outcome.answer, outcome.pause > 0) == (0, Answer.REQUEUE, True)


def test_the_result_of_a_step_bears_its_run_and_allows_the_next_one() -> None:
    case = Case()

    outcome = case.executor.execute(case.request(embed=chain_of(step("b")), redelivered=False))

    assert case.store.results["id-1"].extra == {RUN_HEADER: RUN}
    assert outcome.is_step


@pytest.mark.parametrize(
    "embed",
    [
        {"callbacks": [step("b")]},
        {**chain_of(step("b")), "callbacks": [step("callback")]},
        chain_of(step("b", chord=step("body"))),
        chain_of({**step("b"), "task": "celery.group"}),
    ],
    ids=["callback", "step and callback", "part of a chord", "composition"],
)
def test_what_could_not_be_resumed_is_no_step(embed: dict[str, Any]) -> None:
    case = Case()

    outcome = case.executor.execute(case.request(embed=embed, redelivered=False))

    assert outcome.publish
    assert not outcome.is_step


def test_with_a_store_that_cannot_tell_runs_apart_nothing_is_resumed() -> None:
    case = Case(Forgetful())
    case.store.knows("id-1", 1)

    outcome = case.executor.execute(case.request(embed=chain_of(step("b"))))

    assert (case.runs, outcome.is_step) == (1, False)
    assert RUN_HEADER not in case.store.results["id-1"].extra


def test_a_result_that_is_not_kept_is_no_step() -> None:
    store = Server()
    executor = make_executor(PlainTask(lambda: 1, "t", ignore_result=True), store=store)

    outcome = executor.execute(request(1, "t", embed=chain_of(step("b")), headers={RUN_HEADER: RUN}))

    assert outcome.publish
    assert not outcome.is_step

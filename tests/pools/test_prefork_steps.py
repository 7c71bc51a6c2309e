"""prefork: children that go on with a chain by themselves tell of each step before they begin it."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from amqtask import states
from amqtask.backends.contract import StoreDefaults
from amqtask.execution.chain_steps import OFF, Perhaps, SharedFlag, SlotSteps
from amqtask.execution.executor import Executor
from amqtask.execution.request import Answer, Outcome, Request
from amqtask.protocol.message import Message, Properties
from amqtask.protocol.result import ResultMessage
from amqtask.protocol.serialization import content_types
from amqtask.protocol.task import RUN_HEADER
from amqtask.testing.tasks import PlainComposer, PlainTask, request
from tests.pools.preforked import TASKS, Prefork


class Nowhere(StoreDefaults):
    """A store of which only the promise matters here: what it was given could be asked for."""

    blocks = True
    keeps_runs = True

    def message_for(self, result: ResultMessage, reply_to: str | None, correlation_id: str | None) -> None:
        return None

    def store(self, result: ResultMessage) -> None: ...

    def find(self, task_id: str) -> None:
        return None


class Chains(PlainComposer):
    """The next step as a task message to the queue `q`; its arguments are its own."""

    def compose_next(
        self, signature: Mapping[str, Any], result: Any, context: Any, chain: list[Any], *, is_bound: bool = True
    ) -> list[Message]:
        headers = {
            "task": signature["task"], "id": signature["options"]["task_id"], RUN_HEADER: "run", **signature["headers"],
        }  # fmt: skip
        body = json.dumps([signature["args"], {}, {"chain": chain}]).encode()
        properties = Properties(content_type="application/json", content_encoding="utf-8", headers=headers)
        return [Message(body, properties, routing_key=signature.get("queue", "q"))]


def executor(*tasks: PlainTask, seconds: float = 60.0, allowed: Any = None) -> Executor:
    known = {task.name: task for task in (*TASKS, *tasks)}
    made = Executor(known, accept=content_types(["json"]), composer=Chains(), store=Nowhere(), hostname="tests@here")
    made.steps = SlotSteps(known, seconds, SharedFlag(is_on=True).state if allowed is None else allowed)
    return made


def step(task_id: str, task: str, *args: Any, queue: str = "q", **headers: Any) -> dict[str, Any]:
    return {"task": task, "args": args, "options": {"task_id": task_id}, "queue": queue, "headers": headers}


def chain_of(number: int, *steps: dict[str, Any], **options: Any) -> Request:
    """The request of `add`, followed by these."""
    embed = {"chain": list(reversed(steps))}
    return request(number, "add", 1, 1, embed=embed, headers={RUN_HEADER: "run"}, queue="q", **options)


def going_on(outcome: Outcome) -> Request:
    assert outcome.going_on is not None, outcome
    return outcome.going_on


def followed(prefork: Prefork, number: int) -> list[Outcome]:
    """The outcomes of a request and of the steps that the child went on with."""
    outcomes = [prefork.outcome(number)]
    while (step := outcomes[-1].going_on) is not None:
        outcomes.append(prefork.outcome(step.number))
    return outcomes


def test_each_step_is_told_of_and_has_an_outcome_of_its_own() -> None:
    with Prefork(1, executor=executor()) as prefork:
        outcomes = followed(
            prefork, prefork.submit_request(chain_of(1, step("b", "add", 2, 2), step("c", "echo", "x")))
        )

        assert [outcome.state for outcome in outcomes] == [states.SUCCESS] * 3
        assert [going_on(outcome).id for outcome in outcomes[:2]] == ["b", "c"]
        assert going_on(outcomes[0]).task == "add"
        assert going_on(outcomes[0]).queue == "q"
        assert len({outcome.number for outcome in outcomes}) == 3
        assert prefork.pool.free == 1


def test_what_is_given_ahead_of_time_runs_behind_a_chain() -> None:
    with Prefork(1, executor=executor()) as prefork:
        prefork.look_ahead()
        long = tuple(step(f"s{number}", "add", 1, 1) for number in range(50))
        first = prefork.submit_request(chain_of(100_001, *long))
        others = [prefork.submit("add", 1, 1) for _ in range(20)]

        assert len(followed(prefork, first)) == 51
        assert [prefork.outcome(number).state for number in others] == [states.SUCCESS] * 20
        assert prefork.pool.free >= 1


def test_a_step_that_needs_more_than_a_slot_is_left_to_the_worker() -> None:
    limited = PlainTask(lambda: 1, "limited", time_limit=60.0)
    early = PlainTask(lambda: 1, "early", acks_late=False)
    cases = [
        step("b", "limited"),
        step("b", "early"),
        step("b", "unknown"),
        step("b", "add", 1, 1, queue="elsewhere"),
        step("b", "add", 1, 1, timelimit=[5, None]),
        step("b", "add", 1, 1, eta="2050-01-01T00:00:00+00:00"),
    ]
    with Prefork(1, executor=executor(limited, early)) as prefork:
        for number, each in enumerate(cases, 1):
            outcome = prefork.outcome(prefork.submit_request(chain_of(number, each)))
            assert (outcome.is_step, outcome.going_on) == (True, None), each


def test_a_redelivered_chain_and_one_with_a_limit_are_left_to_the_worker() -> None:
    with Prefork(1, executor=executor()) as prefork:
        again = prefork.outcome(prefork.submit_request(chain_of(1, step("b", "add", 1, 1), redelivered=True)))
        limited = prefork.outcome(prefork.submit_request(chain_of(2, step("b", "add", 1, 1), hard_limit=60.0)))

        assert (again.going_on, limited.going_on) == (None, None)


def test_a_child_goes_on_only_while_it_is_allowed_to() -> None:
    with Prefork(1, executor=executor(allowed=OFF)) as prefork:
        assert prefork.outcome(prefork.submit_request(chain_of(1, step("b", "add", 1, 1)))).going_on is None


@pytest.mark.parametrize("revoked", ["b", "root", None])
def test_a_step_that_may_be_revoked_is_left_to_the_worker(revoked: str | None) -> None:
    perhaps, made = Perhaps(), executor()
    made.steps = SlotSteps({task.name: task for task in TASKS}, 60.0, SharedFlag(is_on=True).state, perhaps)
    with Prefork(1, executor=made) as prefork:
        perhaps.add(revoked or "another")
        first = chain_of(1, step("b", "add", 2, 2, root_id="root"))
        outcomes = followed(prefork, prefork.submit_request(first))

    assert len(outcomes) == (1 if revoked else 2)


def test_a_child_goes_on_for_a_while_only() -> None:
    with Prefork(1, executor=executor(seconds=2.0)) as prefork:
        steps = (step("b", "pause", 2.1), step("c", "add", 1, 1), step("d", "add", 1, 1))
        outcomes = followed(prefork, prefork.submit_request(chain_of(1, *steps)))

        assert len(outcomes) == 2
        assert outcomes[-1].is_step


def test_a_step_that_the_worker_handed_over_brings_the_chains_deadline_along() -> None:
    with Prefork(1, executor=executor(seconds=60.0)) as prefork:
        late, early = chain_of(1, step("b", "add", 1, 1)), chain_of(2, step("b", "add", 1, 1))
        late.until, early.until = time.monotonic() - 0.001, time.monotonic() + 60.0

        assert prefork.outcome(prefork.submit_request(late)).going_on is None
        assert going_on(prefork.outcome(prefork.submit_request(early))).until == early.until


def test_children_that_are_replaced_after_some_tasks_leave_each_step_to_the_worker() -> None:
    with Prefork(1, executor=executor(), max_tasks_per_child=100) as prefork:
        assert prefork.outcome(prefork.submit_request(chain_of(1, step("b", "add", 1, 1)))).going_on is None


def test_a_child_that_dies_in_a_step_loses_that_step() -> None:
    with Prefork(1, executor=executor()) as prefork:
        number = prefork.submit_request(chain_of(1, step("b", "kill_self", signal.SIGKILL), step("c", "add", 1, 1)))
        outcomes = followed(prefork, number)

        assert len(outcomes) == 2
        assert outcomes[1].answer is Answer.REQUEUE
        assert "kill_self[b]" in outcomes[1].reason


def test_a_step_can_be_found_and_ended(tmp_path: Path) -> None:
    with Prefork(1, executor=executor()) as prefork:
        steps = (step("b", "wait_for", str(tmp_path), "b", "never"), step("c", "add", 1, 1))
        running = going_on(prefork.outcome(prefork.submit_request(chain_of(1, *steps)))).number
        prefork.until((tmp_path / "b.started").exists)
        found = prefork.pool.find(running)
        assert found is not None
        assert found.pid in prefork.pids
        assert prefork.pool.find(1) is None

        assert prefork.pool.terminate(running, "terminated")

        assert prefork.outcome(running).state == states.REVOKED


def test_what_runs_when_the_pool_stops_is_the_step(tmp_path: Path) -> None:
    with Prefork(1, executor=executor()) as prefork:
        steps = (step("b", "wait_for", str(tmp_path), "b", "never"),)
        prefork.outcome(prefork.submit_request(chain_of(1, *steps)))
        prefork.until((tmp_path / "b.started").exists)

        assert [request.id for request in prefork.pool.stop()] == ["b"]

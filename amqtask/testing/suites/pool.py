"""The conformance suite for pools: subclass PoolSuite, set `pool_name`, and let pytest collect it.

    class TestMyPool(PoolSuite):
        pool_name = "mine"          # its entry point in the group amqtask.pools

A pool that must patch the process first is run by `python -m amqtask.testing.check_pool mine`, in a process of its own.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from amqtask import states
from amqtask.execution.request import Answer, Outcome, Request
from amqtask.ground.plugins import completed, misspelt
from amqtask.pool import GREEN_POOLS, Pool, PoolDefaults, PoolOptions, Running, find_pool, limits_of
from amqtask.testing.loop import PlainLoop
from amqtask.testing.tasks import POOL_TASKS, PlainTask, batch_request, make_executor, request

# How long a condition may take to come true; a slow machine is no failure.
PATIENCE = 60.0


class Bench:
    """A pool on a loop, fed as the worker's dispatcher feeds it: only while `free` > 0, again after each outcome."""

    def __init__(self, pool_class: type[Pool], slots: int, tasks: Sequence[PlainTask] = POOL_TASKS) -> None:
        self.loop = PlainLoop()
        self.outcomes: dict[int, Outcome] = {}
        self.order: list[int] = []
        self.surprises: list[str] = []
        self._waiting: list[Request] = []
        self._numbers = 0
        self._is_due = False
        self._thread = threading.get_ident()
        options = PoolOptions(slots=slots, hostname="tests@here")
        self.pool: Pool = completed(pool_class, PoolDefaults)(make_executor(*tasks), self.loop, self._take, options)
        self.pool.start()

    def submit(self, task: str, *args: Any, **options: Any) -> int:
        """Submit a request when there is a free slot; returns its number."""
        self._numbers += 1
        self._waiting.append(request(self._numbers, task, *args, **options))
        self.feed_soon()
        return self._numbers

    def submit_batch(self, task: str, *calls: Sequence[Any], **options: Any) -> int:
        """Submit a batch of calls with these arguments; returns its number."""
        batch = batch_request(self._numbers + 1, task, *calls, **options)
        self._numbers += len(calls)
        self._waiting.append(batch)
        self.feed_soon()
        return batch.number

    def feed_soon(self) -> None:
        """Submit what waits at the end of this turn of the loop."""
        if not self._is_due:
            self._is_due = True
            self.loop.call_soon(self._feed)

    def _feed(self) -> None:
        self._is_due = False
        while self._waiting and self.pool.member(self._waiting[0].queue).free > 0:
            self.pool.submit(self._waiting.pop(0))

    def _take(self, outcomes: Sequence[Outcome]) -> None:
        if threading.get_ident() != self._thread:
            self.surprises.append("on_outcomes was called in another thread than the loop's")
        for outcome in outcomes:
            if outcome.number in self.outcomes:
                self.surprises.append(f"a second outcome of {outcome.number}")
            self.outcomes[outcome.number] = outcome
            self.order.append(outcome.number)
        self.feed_soon()

    def until(self, predicate: Callable[[], object], timeout: float = PATIENCE) -> None:
        """Turn the loop until the predicate holds."""
        self.loop.run_until(predicate, timeout)

    def outcome(self, number: int) -> Outcome:
        """Turn the loop until the request has its outcome."""
        self.until(lambda: number in self.outcomes)
        return self.outcomes[number]

    def value(self, number: int) -> Any:
        """The task's return value, from the result message that the outcome carries."""
        return value_of(self.outcome(number))

    def close(self) -> None:
        """Stop the pool, and fail if anything unexpected happened."""
        self.pool.stop()
        self.loop.close()
        assert self.surprises == []


class PoolParts:
    """The pool that a suite is about."""

    pool_name = ""

    @pytest.fixture
    def pool_class(self) -> type[Pool]:
        """The pool class, found as the worker finds it."""
        return find_pool(self.pool_name or os.environ["AMQTASK_SUITE_POOL"])

    @pytest.fixture
    def bench(self, pool_class: type[Pool]) -> Iterator[Bench]:
        """A bench with a pool of two slots."""
        bench = Bench(pool_class, 2)
        yield bench
        bench.close()


class LimitsSuite(PoolParts):
    """A part of PoolSuite."""

    # -- limits

    @pytest.mark.parametrize("task", ["clean_up", "clean_up_async", "clean_up_beside_async"])
    def test_the_soft_limit_is_raised_in_the_task(self, bench: Bench, tmp_path: Path, task: str) -> None:
        needs_limit(bench, "soft", task)
        assert bench.value(bench.submit(task, str(tmp_path), soft_limit=0.3)) == "cleaned up"

    @pytest.mark.parametrize("task", ["wait_for", "wait_for_async"])
    def test_a_soft_limit_that_is_not_handled_fails_the_task(self, bench: Bench, tmp_path: Path, task: str) -> None:
        needs_limit(bench, "soft", task)
        outcome = bench.outcome(bench.submit(task, str(tmp_path), "a", "never", soft_limit=0.3))

        assert outcome.state == states.FAILURE
        assert outcome.summary.startswith("SoftTimeLimitExceeded")
        assert outcome.result is not None
        assert json.loads(outcome.result.body)["result"]["exc_type"] == "SoftTimeLimitExceeded"
        assert bench.value(bench.submit("add", 1, 1)) == 2

    @pytest.mark.parametrize("task", ["wait_for", "wait_for_async"])
    def test_the_hard_limit_ends_the_task_and_frees_its_slot(self, bench: Bench, tmp_path: Path, task: str) -> None:
        needs_limit(bench, "hard", task)
        outcome = bench.outcome(bench.submit(task, str(tmp_path), "a", "never", hard_limit=0.4))

        assert outcome.state == states.FAILURE
        assert outcome.summary.startswith("TimeLimitExceeded")
        assert bench.value(bench.submit("add", 1, 1)) == 2
        bench.until(lambda: bench.pool.free >= bench.pool.slots)

    def test_a_limit_that_was_not_reached_does_not_hit_the_next_task(self, bench: Bench, tmp_path: Path) -> None:
        limits = {f"{limit_name}_limit": 0.2 for limit_name in limits_of(type(bench.pool), is_async=False)}
        for n in range(bench.pool.slots):
            bench.outcome(bench.submit("add", n, n, **limits))
        bench.loop.call_later(0.4, (tmp_path / "go").touch)

        assert bench.value(bench.submit("wait_for", str(tmp_path), "a", "go")) == "a"

    # -- batches

    @pytest.mark.parametrize("task", ["add_each", "add_each_async"])
    def test_a_batch_is_one_run_with_an_outcome_for_each_call(self, bench: Bench, task: str) -> None:
        batches = [bench.submit_batch(task, *((n, index) for index in range(100))) for n in range(5)]
        alone = bench.submit(task, 3, 4)

        for n, batch in enumerate(batches):
            outcomes = bench.outcome(batch).calls
            assert [outcome.number for outcome in outcomes] == list(range(-batch, -batch + 100))
            assert [value_of(outcome) for outcome in outcomes] == [n + index for index in range(100)]
            assert {outcome.answer for outcome in outcomes} == {Answer.ACK}
        assert bench.value(alone) == 7
        bench.until(lambda: bench.pool.free >= bench.pool.slots)

    def test_each_call_of_a_batch_has_an_end_of_its_own(self, bench: Bench) -> None:
        batch = bench.submit_batch("end_each", ("succeed",), ("fail",), ("retry",), ("",))
        succeeded, failed, retried, other = bench.outcome(batch).calls

        assert (value_of(succeeded), value_of(other)) == (f"id-{-batch}", None)
        assert (failed.state, failed.answer, failed.summary) == (states.FAILURE, Answer.ACK, "ValueError('as told')")
        assert retried.state == states.RETRY
        assert [message.routing_key for message in retried.publish] == ["retry"]
        assert json.loads(retried.publish[0].body)["when"] == 1.5

    def test_a_batch_that_raises_fails_the_calls_of_which_nothing_was_said(self, bench: Bench) -> None:
        batch = bench.submit_batch("end_each", ("succeed",), ("",), ("retry",), ("raise",))

        outcomes = bench.outcome(batch).calls
        assert [outcome.state for outcome in outcomes] == ["SUCCESS", "FAILURE", "RETRY", "FAILURE"]
        assert {outcome.summary for outcome in outcomes if outcome.state == states.FAILURE} == {
            "KeyError('all others')"
        }
        assert bench.value(bench.submit("add", 1, 1)) == 2

    @pytest.mark.parametrize("task", ["wait_for_each", "wait_for_each_async"])
    def test_the_soft_limit_of_a_batch_fails_the_calls_that_are_left(
        self, bench: Bench, tmp_path: Path, task: str
    ) -> None:
        needs_limit(bench, "soft", task)
        call = (str(tmp_path), "a", "never")
        first, last = bench.outcome(bench.submit_batch(task, call, call, soft_limit=0.3)).calls

        assert (first.state, value_of(last)) == (states.FAILURE, "said before")
        assert first.summary.startswith("SoftTimeLimitExceeded")

    @pytest.mark.parametrize("task", ["wait_for_each", "wait_for_each_async"])
    def test_the_hard_limit_ends_a_batch(self, bench: Bench, tmp_path: Path, task: str) -> None:
        needs_limit(bench, "hard", task)
        call = (str(tmp_path), "a", "never")
        first, second, last = bench.outcome(bench.submit_batch(task, call, call, call, hard_limit=0.4)).calls

        assert first.summary.startswith("TimeLimitExceeded")
        assert second.summary.startswith("TimeLimitExceeded")
        # A process is killed, whatever was said there; elsewhere that counts.
        assert last.state in (states.FAILURE, states.SUCCESS)
        assert bench.value(bench.submit("add", 1, 1)) == 2


class PoolSuite(LimitsSuite):
    """The promises of every pool. Tests that need two slots are skipped by pools that only ever have one."""

    def test_no_member_of_the_contract_is_misspelt(self, pool_class: type[Pool]) -> None:
        assert misspelt(pool_class, Pool) == {}, "a member, and which one of the contract it looks like"

    # -- running

    def test_a_request_gets_one_outcome_with_its_result(self, bench: Bench) -> None:
        number = bench.submit("add", 2, 3)

        assert bench.value(number) == 5
        outcome = bench.outcomes[number]
        assert (outcome.number, outcome.answer, outcome.publish) == (number, Answer.ACK, ())

    def test_an_async_task_runs_like_any_other(self, bench: Bench) -> None:
        numbers = [bench.submit("add_async", 1, n) for n in range(20)]

        assert [bench.value(number) for number in numbers] == [1 + n for n in range(20)]

    def test_many_more_requests_than_slots_all_end_once(self, bench: Bench) -> None:
        numbers = [bench.submit("add", n, n) for n in range(500)]

        assert [bench.value(number) for number in numbers] == [n + n for n in range(500)]
        assert sorted(bench.order) == numbers

    def test_what_is_taken_back_has_no_outcome_before_it_is_submitted_again(self, bench: Bench) -> None:
        numbers = [bench.submit("add", n, n) for n in range(200)]
        taken: list[Request] = []

        def take_back() -> None:
            taken.extend(bench.pool.take_back())
            bench.feed_soon()

        bench.loop.call_soon(take_back)
        bench.until(lambda: len(bench.outcomes) + len(taken) == len(numbers))

        assert not bench.outcomes.keys() & {returned.number for returned in taken}
        for returned in taken:
            bench.pool.submit(returned)
        assert [bench.value(number) for number in numbers] == [n + n for n in range(200)]

    def test_context_variables_that_a_task_sets_are_gone_with_it(self, bench: Bench) -> None:
        for task in ("set_a_context_variable", "set_a_context_variable_async") * 3:
            assert bench.value(bench.submit(task)) == "not set"

    def test_a_process_that_a_task_forks_does_not_go_on_as_a_slot(self, bench: Bench) -> None:
        numbers = [bench.submit("fork_and_return", ending) for ending in ("return", "raise", "exit")]

        assert [bench.value(number) for number in numbers] == [0, 1, 3]
        assert bench.value(bench.submit("add", 1, 1)) == 2

    def test_a_timeout_that_a_task_has_left_takes_no_slot(self, pool_class: type[Pool], bench: Bench) -> None:
        if pool_class.name not in GREEN_POOLS:
            pytest.skip("a timeout of a green thread")
        for _ in range(3):
            bench.outcome(bench.submit("leave_a_timeout", pool_class.name, 0.01))
        struck: list[bool] = []
        bench.loop.call_later(0.1, lambda: struck.append(True))
        bench.until(lambda: struck)

        numbers = [bench.submit("add", n, n) for n in range(4)]

        assert [bench.value(number) for number in numbers] == [n + n for n in range(4)]

    def test_all_slots_are_free_when_nothing_runs(self, bench: Bench) -> None:
        for n in range(10):
            bench.outcome(bench.submit("add", n, n))

        bench.until(lambda: bench.pool.free >= bench.pool.slots)

    def test_the_loop_turns_while_a_task_waits(self, bench: Bench, tmp_path: Path) -> None:
        bench.loop.call_later(0.05, (tmp_path / "go").touch)

        assert bench.value(bench.submit("wait_for", str(tmp_path), "a", "go")) == "a"

    def test_tasks_run_at_the_same_time_as_far_as_there_are_slots(self, bench: Bench, tmp_path: Path) -> None:
        needs_two_slots(bench)
        first = bench.submit("wait_for", str(tmp_path), "a", "b.started")
        second = bench.submit("wait_for", str(tmp_path), "b", "a.started")

        assert (bench.value(first), bench.value(second)) == ("a", "b")

    def test_async_tasks_run_at_the_same_time_too(self, bench: Bench, tmp_path: Path) -> None:
        needs_two_slots(bench)
        first = bench.submit("wait_for_async", str(tmp_path), "a", "b.started")
        second = bench.submit("wait_for_async", str(tmp_path), "b", "a.started")

        assert (bench.value(first), bench.value(second)) == ("a", "b")

    @pytest.mark.parametrize("task", ["stop_the_loop", "leave_an_exit", "leave_a_thread_that_exits"])
    def test_a_task_that_ends_its_event_loop_ends_no_other_task(self, bench: Bench, tmp_path: Path, task: str) -> None:
        needs_two_slots(bench)
        waiting = bench.submit("wait_for_async", str(tmp_path), "a", "go")
        bench.outcome(bench.submit(task))
        (tmp_path / "go").touch()

        assert bench.value(waiting) == "a"
        assert bench.value(bench.submit("add_async", 1, 2)) == 3

    def test_async_tasks_share_locks_with_all_others(self, bench: Bench) -> None:
        numbers = [bench.submit(task, 30) for task in ("share_a_lock", "share_a_lock_async") * 4]

        assert [bench.value(number) for number in numbers] == [30] * 8

    def test_other_tasks_may_run_a_loop_of_their_own_beside_async_ones(self, bench: Bench, tmp_path: Path) -> None:
        needs_two_slots(bench)
        waiting = bench.submit("wait_for_async", str(tmp_path), "a", "go")

        assert bench.value(bench.submit("run_a_loop", 3)) == 3
        (tmp_path / "go").touch()
        assert bench.value(waiting) == "a"

    def test_async_tasks_have_all_of_asyncio(self, bench: Bench) -> None:
        beside = [bench.submit("run_a_loop", 20), bench.submit("share_a_lock", 20)]
        numbers = [bench.submit("use_asyncio", f"word{n}") for n in range(4)]

        for n, number in enumerate(numbers):
            assert bench.value(number) == [f"WORD{n}", *[f"Word{n}"] * 3, f"word{n}", "3"]
        assert [bench.value(number) for number in beside] == [20, 20]

    def test_no_more_tasks_run_than_there_are_slots(self, bench: Bench, tmp_path: Path) -> None:
        numbers = [bench.submit("wait_for", str(tmp_path), f"t{n}", "go") for n in range(6)]
        bench.loop.call_later(0.3, (tmp_path / "go").touch)
        highest = 0

        def all_ended() -> bool:
            nonlocal highest
            if not (tmp_path / "go").exists():
                highest = max(highest, count(tmp_path, "*.started"))
            return len(bench.outcomes) == len(numbers)

        bench.until(all_ended)
        assert highest <= bench.pool.slots

    def test_a_task_does_not_wait_behind_a_long_one_while_a_slot_is_free(self, bench: Bench, tmp_path: Path) -> None:
        needs_two_slots(bench)
        long_task = bench.submit("wait_for", str(tmp_path), "long", "go")
        short = [bench.submit("add", n, 1) for n in range(30)]
        for number in short:
            bench.outcome(number)
        (tmp_path / "go").touch()

        assert bench.value(long_task) == "long"
        assert bench.order[-1] == long_task

    def test_each_task_sees_its_own_request(self, bench: Bench, tmp_path: Path) -> None:
        numbers = [bench.submit("who_am_i", str(tmp_path), f"t{n}", "go") for n in range(bench.pool.slots)]
        bench.loop.call_later(0.05, (tmp_path / "go").touch)

        assert [bench.value(number)[:2] for number in numbers] == [[f"id-{number}"] * 2 for number in numbers]

    # -- ways to end

    def test_an_error_is_an_outcome_and_the_slot_goes_on(self, bench: Bench) -> None:
        outcome = bench.outcome(bench.submit("fail", "as told"))

        assert (outcome.state, outcome.answer) == (states.FAILURE, Answer.ACK)
        assert "as told" in outcome.summary
        assert "in fail" in outcome.traceback
        assert bench.value(bench.submit("add", 1, 1)) == 2

    def test_a_task_that_calls_exit_has_failed_and_the_slot_goes_on(self, bench: Bench) -> None:
        failed = [bench.submit("leave_the_process") for _ in range(4)]

        assert {bench.outcome(number).state for number in failed} == {states.FAILURE}
        assert bench.value(bench.submit("add", 1, 1)) == 2

    def test_a_retry_leaves_as_a_message(self, bench: Bench) -> None:
        outcome = bench.outcome(bench.submit("try_again"))

        assert (outcome.state, outcome.answer) == (states.RETRY, Answer.ACK)
        assert [message.routing_key for message in outcome.publish] == ["retry"]

    def test_what_cannot_be_run_is_dead_lettered_and_the_slot_goes_on(self, bench: Bench) -> None:
        unknown = bench.outcome(bench.submit("no_such_task"))
        undecodable = bench.outcome(bench.submit("add", body=b"\xff{"))
        wrong = bench.outcome(bench.submit("add", content_type="application/x-python-serialize"))

        assert {outcome.answer for outcome in (unknown, undecodable, wrong)} == {Answer.DEAD_LETTER}
        assert "no_such_task" in unknown.reason
        assert bench.value(bench.submit("add", 1, 1)) == 2

    # -- orders from the worker

    @pytest.mark.parametrize("task", ["wait_for", "wait_for_async"])
    def test_terminate_ends_a_running_task_or_says_that_it_cannot(
        self, bench: Bench, tmp_path: Path, task: str
    ) -> None:
        number = bench.submit(task, str(tmp_path), "a", "go")
        answers: list[bool] = []

        def terminate() -> None:
            if (tmp_path / "a.started").exists():
                answers.append(bench.pool.terminate(number, "by the test"))
            else:
                bench.loop.call_later(0.01, terminate)

        terminate()
        bench.until(lambda: answers)
        if not answers[0]:
            (tmp_path / "go").touch()
        outcome = bench.outcome(number)

        assert outcome.state == (states.REVOKED if answers[0] else states.SUCCESS)
        assert bench.value(bench.submit("add", 1, 1)) == 2

    def test_terminate_knows_nothing_of_what_does_not_run(self, bench: Bench) -> None:
        number = bench.submit("add", 1, 1)
        bench.outcome(number)

        assert bench.pool.terminate(number, "too late") is False
        assert bench.pool.terminate(4711, "never there") is False

    def test_it_knows_the_process_of_what_runs(self, bench: Bench, tmp_path: Path) -> None:
        before = time.monotonic()
        number = bench.submit("wait_for", str(tmp_path), "a", "go")
        runs: list[Running | None] = []

        def look() -> None:
            if (tmp_path / "a.started").exists():
                runs.append(bench.pool.find(number))
                (tmp_path / "go").touch()
            else:
                bench.loop.call_later(0.01, look)

        look()
        bench.until(lambda: runs)
        bench.outcome(number)

        assert runs[0] is not None
        assert runs[0].pid > 0
        assert runs[0].since is None or before <= runs[0].since <= time.monotonic()
        assert bench.pool.find(number) is None

    def test_it_grows(self, bench: Bench, tmp_path: Path) -> None:
        needs_two_slots(bench)
        bench.pool.resize(4)
        names = [f"t{n}" for n in range(4)]
        numbers = [bench.submit("wait_for", str(tmp_path), name, "go") for name in names]
        bench.until(lambda: count(tmp_path, "*.started") == 4)
        (tmp_path / "go").touch()

        assert bench.pool.slots == 4
        assert [bench.value(number) for number in numbers] == names

    def test_it_shrinks_when_tasks_end(self, bench: Bench, tmp_path: Path) -> None:
        needs_two_slots(bench)
        busy = [bench.submit("wait_for", str(tmp_path), f"t{n}", "go") for n in range(2)]
        bench.until(lambda: count(tmp_path, "*.started") == 2)
        bench.pool.resize(1)
        (tmp_path / "go").touch()
        assert [bench.value(number) for number in busy] == ["t0", "t1"]

        first = bench.submit("wait_for", str(tmp_path), "u0", "on")
        second = bench.submit("wait_for", str(tmp_path), "u1", "on")
        bench.until(lambda: count(tmp_path, "u*.started") == 1)
        assert bench.pool.free <= 0
        (tmp_path / "on").touch()
        assert {bench.value(first), bench.value(second)} == {"u0", "u1"}
        assert bench.pool.slots == 1

    def test_stop_gives_back_what_had_not_ended_and_no_outcome_follows(self, bench: Bench, tmp_path: Path) -> None:
        number = bench.submit("wait_for", str(tmp_path), "a", "never", 15.0)
        given_back: list[int] = []

        def stop() -> None:
            if (tmp_path / "a.started").exists():
                given_back.extend(request.number for request in bench.pool.stop())
            else:
                bench.loop.call_later(0.01, stop)

        stop()
        bench.until(lambda: given_back)
        settle = time.monotonic() + 0.1
        bench.until(lambda: time.monotonic() > settle)

        assert given_back == [number]
        assert bench.outcomes == {}

    def test_what_stop_gives_back_before_it_began_never_begins(self, bench: Bench, tmp_path: Path) -> None:
        needs_two_slots(bench)
        for n in range(100):  # short ones: some pools take more than they have slots then
            bench.outcome(bench.submit("add", n, n))
        numbers = [bench.submit("wait_for", str(tmp_path), f"t{n}", "go", 15.0) for n in range(8)]
        bench.until(lambda: count(tmp_path, "*.started") == 2)

        given_back = {request.number for request in bench.pool.stop()}
        (tmp_path / "go").touch()
        settle = time.monotonic() + 0.1
        bench.until(lambda: time.monotonic() > settle)

        assert given_back <= set(numbers)
        assert count(tmp_path, "*.started") == 2

    def test_stop_may_be_called_twice_and_before_start(self, pool_class: type[Pool]) -> None:
        loop = PlainLoop()
        pool = pool_class(make_executor(*POOL_TASKS), loop, lambda outcomes: None, PoolOptions(slots=1))
        assert pool.stop() == []
        loop.close()

        bench = Bench(pool_class, 1)
        bench.outcome(bench.submit("add", 1, 1))
        assert bench.pool.stop() == []
        assert bench.pool.stop() == []
        bench.close()

    def test_stats_say_how_many_slots_there_are(self, bench: Bench) -> None:
        stats = bench.pool.stats()

        assert stats["max-concurrency"] == bench.pool.slots
        assert json.dumps(stats)

    def test_it_says_what_it_is(self, pool_class: type[Pool]) -> None:
        assert pool_class.name
        assert pool_class.limits <= {"soft", "hard"}


def value_of(outcome: Outcome) -> Any:
    """What the call has returned, from the result message that its outcome carries."""
    assert outcome.state == states.SUCCESS, outcome
    assert outcome.result is not None
    return json.loads(outcome.result.body)["result"]


def needs_two_slots(bench: Bench) -> None:
    """Skip for pools that only ever have one slot."""
    if bench.pool.slots < 2:
        pytest.skip("this pool has one slot")


def needs_limit(bench: Bench, limit_name: str, task: str) -> None:
    """Skip for pools that refuse the limit."""
    if limit_name not in limits_of(type(bench.pool), is_async=task.endswith("_async")):
        pytest.skip(f"this pool has no {limit_name} limit for {task}")


def count(folder: Path, pattern: str) -> int:
    """How many files of the folder match."""
    return sum(1 for _ in folder.glob(pattern))

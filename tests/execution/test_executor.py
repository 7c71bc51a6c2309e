"""One request in, one outcome out: each way in which a task can end."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import ContextVar
from typing import Any

import pytest

from amqtask import signals, states
from amqtask.backends.contract import StoreDefaults
from amqtask.exceptions import (
    BackendUnreachable,
    Ignore,
    Reject,
    Retry,
    SoftTimeLimitExceeded,
    Terminated,
    TimeLimitExceeded,
    WorkerLostError,
)
from amqtask.execution.context import current_context
from amqtask.execution.executor import Executor
from amqtask.execution.request import Abandoned, Answer, HardLimitReached, Outcome
from amqtask.protocol.message import Message
from amqtask.protocol.result import ResultMessage
from amqtask.testing.tasks import PlainTask, make_executor, request


def run(function: Callable[..., Any], *args: Any, embed: dict[str, Any] | None = None, **options: Any) -> Outcome:
    task = PlainTask(function, "t", **options)
    return make_executor(task).execute(request(1, "t", *args, embed=embed))


def raising(error: BaseException) -> Callable[[], None]:
    def function() -> None:
        raise error

    return function


def stored(outcome: Outcome) -> dict[str, Any]:
    assert outcome.result is not None
    found: dict[str, Any] = json.loads(outcome.result.body)
    return found


class KeptStore(StoreDefaults):
    """A store with a server of its own, in memory: results are stored by the slot."""

    blocks = True

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.results: list[ResultMessage] = []
        self.threads: set[int] = set()

    def message_for(self, result: ResultMessage, reply_to: str | None, correlation_id: str | None) -> Message | None:
        return None

    def store(self, result: ResultMessage) -> None:
        if self.error is not None:
            raise self.error
        self.threads.add(threading.get_ident())
        self.results.append(result)


class PatientStore(KeptStore):
    """One that may try for ever where it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.briefly: list[str] = []

    def store_briefly(self, result: ResultMessage) -> None:
        self.briefly.append(result.status)


def test_only_what_a_slot_has_to_keep_may_wait_for_the_store_without_end() -> None:
    store = PatientStore()
    executor = make_executor(PlainTask(lambda: 1, "t", track_started=True), store=store)

    executor.execute(request(1, "t"))
    executor.revoked(request(2, "t"), "by hand")
    executor.expired(request(3, "t"))

    assert [result.status for result in store.results] == [states.SUCCESS]
    assert store.briefly == [states.STARTED, states.REVOKED, states.REVOKED]


class Struck(KeptStore):
    """A store of which the first writes are cut off."""

    def __init__(self, *errors: BaseException) -> None:
        super().__init__()
        self.errors = list(errors)

    def store(self, result: ResultMessage) -> None:
        if self.errors:
            raise self.errors.pop(0)
        super().store(result)


@pytest.mark.parametrize("name", ["there is no such task", "t"])
def test_limits_that_strike_while_a_refusal_is_stored_keep_neither_it_nor_the_answer_back(name: str) -> None:
    store = Struck(SoftTimeLimitExceeded(1.0), HardLimitReached(2.0))
    executor = make_executor(PlainTask(lambda: 1, "t"), store=store)

    outcome = executor.execute(request(1, name, content_type="text/wrong"))

    assert (outcome.state, outcome.answer) == (states.FAILURE, Answer.DEAD_LETTER)
    assert [result.status for result in store.results] == [states.FAILURE]


@pytest.mark.parametrize(
    ("error", "state", "answer"),
    [
        (SoftTimeLimitExceeded(1.0), states.REJECTED, Answer.REQUEUE),
        (HardLimitReached(1.0), states.FAILURE, Answer.ACK),
        (Terminated("by hand"), states.REVOKED, Answer.ACK),
    ],
)
def test_an_interruption_where_nothing_else_takes_it_is_an_outcome(
    error: BaseException, state: str, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amqtask.execution.executor.AT_END", [raising(error)])

    outcome = run(lambda: 1)

    assert (outcome.number, outcome.state, outcome.answer) == (1, state, answer)


# -- the task returns


def test_a_return_value_is_a_success_whose_result_goes_to_the_caller() -> None:
    outcome = run(lambda: {"n": 1})

    assert (outcome.number, outcome.state, outcome.answer) == (1, states.SUCCESS, Answer.ACK)
    assert stored(outcome)["result"] == {"n": 1}
    assert stored(outcome)["task_id"] == "id-1"


def test_no_result_is_sent_when_the_task_or_its_caller_ignores_it() -> None:
    assert run(lambda: 1, ignore_result=True).result is None

    task = PlainTask(lambda: 1, "t")
    assert make_executor(task).execute(request(1, "t", headers={"ignore_result": True})).result is None


def test_the_caller_may_want_a_result_that_the_task_ignores() -> None:
    task = PlainTask(lambda: 1, "t", ignore_result=True)
    outcome = make_executor(task).execute(request(1, "t", headers={"ignore_result": False}))

    assert stored(outcome)["result"] == 1


def test_a_value_that_cannot_be_written_fails_the_task_by_name() -> None:
    outcome = run(lambda: {1, 2})

    assert outcome.state == states.FAILURE
    assert stored(outcome)["result"]["exc_type"] == "EncodeError"
    assert "set" in outcome.summary
    assert "json" in outcome.summary


def test_a_number_of_too_many_digits_is_a_return_value_like_any_other() -> None:
    task = PlainTask(lambda: math.factorial(2000), "t")
    outcome = make_executor(task, store=None, verbose=[True]).execute(request(1, "t"))

    assert (outcome.state, outcome.answer) == (states.SUCCESS, Answer.ACK)
    assert "bits" in outcome.summary


def test_an_async_task_is_awaited_also_without_a_loop() -> None:
    async def double(x: int) -> int:
        await asyncio.sleep(0)
        return 2 * x

    assert stored(run(double, 21))["result"] == 42


def test_a_function_that_only_returns_a_coroutine_is_awaited_too() -> None:
    async def inner() -> str:
        return "inner"

    assert stored(run(lambda: inner()))["result"] == "inner"


def test_an_async_generator_is_refused_in_words() -> None:
    async def numbers() -> AsyncIterator[int]:
        yield 1

    outcome = run(numbers)
    assert outcome.state == states.FAILURE
    assert "async generator" in outcome.summary


def test_callbacks_and_the_next_step_of_a_chain_leave_as_messages() -> None:
    embed = {"callbacks": [{"task": "told"}], "chain": [{"task": "last"}, {"task": "next"}]}
    outcome = run(lambda: 5, embed=embed)

    assert [message.routing_key for message in outcome.publish] == ["told", "next"]
    assert json.loads(outcome.publish[1].body) == {"args": [5], "chain": [{"task": "last"}]}


@pytest.mark.parametrize(
    "embed",
    [{"chord": 5}, {"chord": "x"}, {"chain": 5}, {"chain": ["x"]}, {"callbacks": ["x"]}, {"errbacks": [{"task": 1}]}],
    ids=str,
)
def test_a_task_whose_follow_ups_are_none_does_not_run(embed: dict[str, Any]) -> None:
    ran: list[int] = []
    outcome = run(lambda: ran.append(1), embed=embed)

    assert (outcome.state, outcome.answer, ran) == (states.FAILURE, Answer.DEAD_LETTER, [])
    assert "signature" in outcome.reason


def test_steps_that_are_none_do_not_hide_how_a_task_failed() -> None:
    step = {"task": "t", "options": {"task_id": "next"}}
    outcome = run(raising(ValueError("no")), embed={"chain": ["x", {"task": 5}, step]})

    assert (outcome.state, outcome.answer) == (states.FAILURE, Answer.ACK)
    assert stored(outcome)["result"]["exc_type"] == "ValueError"


def test_a_callback_that_cannot_be_written_fails_the_task() -> None:
    outcome = run(lambda: {1}, embed={"callbacks": [{"task": "told"}]}, ignore_result=True)

    assert (outcome.state, outcome.publish) == (states.FAILURE, ())


# -- the task raises


def test_an_error_is_a_failure_that_can_be_rebuilt() -> None:
    outcome = run(raising(KeyError("k")))

    assert (outcome.state, outcome.answer) == (states.FAILURE, Answer.ACK)
    assert stored(outcome)["result"] == {"exc_type": "KeyError", "exc_message": ["k"], "exc_module": "builtins"}
    assert "in function" in stored(outcome)["traceback"]
    assert outcome.summary == "KeyError('k')"


def test_a_failure_is_dead_lettered_when_failures_are_not_acked() -> None:
    outcome = run(raising(ValueError("x")), acks_on_failure=False)

    assert outcome.answer is Answer.DEAD_LETTER
    assert "ValueError" in outcome.reason


def test_a_failure_is_stored_even_if_ignored_where_the_task_says_so() -> None:
    assert run(raising(ValueError()), ignore_result=True).result is None
    assert run(raising(ValueError()), ignore_result=True, store_errors_even_if_ignored=True).result is not None


def test_an_expected_error_is_marked() -> None:
    assert run(raising(KeyError()), throws=(KeyError,)).expected
    assert not run(raising(ValueError()), throws=(KeyError,)).expected


def test_an_error_that_no_serializer_takes_survives_as_its_repr() -> None:
    outcome = run(raising(ValueError("odd", threading.Lock())))

    assert outcome.state == states.FAILURE
    message = stored(outcome)["result"]["exc_message"]
    assert message[0] == "odd"
    assert "lock" in message[1]


def test_an_error_whose_str_fails_is_still_a_failure() -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

        __repr__ = __str__

    outcome = run(raising(Odd()))
    assert outcome.state == states.FAILURE
    assert "Odd" in outcome.summary


@pytest.mark.parametrize("end", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_what_would_end_the_process_only_fails_the_task(end: BaseException) -> None:
    assert run(raising(end)).state == states.FAILURE


@pytest.mark.parametrize("end", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()])
def test_the_same_holds_for_async_tasks(end: BaseException) -> None:
    async def leave() -> None:
        raise end

    task = PlainTask(leave, "t")
    executor = make_executor(task, PlainTask(lambda: 1, "next"))
    assert executor.execute(request(1, "t")).state == states.FAILURE
    assert executor.execute(request(2, "next")).state == states.SUCCESS


def test_wrong_arguments_fail_the_task() -> None:
    outcome = run(lambda: None, 1, 2)

    assert outcome.state == states.FAILURE
    assert outcome.summary.startswith("TypeError")


def test_ignore_stores_nothing_and_acks() -> None:
    outcome = run(raising(Ignore()))

    assert (outcome.state, outcome.answer, outcome.result) == (states.IGNORED, Answer.ACK, None)


def test_reject_with_requeue_gives_the_message_back_and_stores_nothing() -> None:
    outcome = run(raising(Reject("later", requeue=True)))

    assert (outcome.answer, outcome.result) == (Answer.REQUEUE, None)
    assert "later" in outcome.reason


def test_reject_dead_letters_and_stores_a_failure() -> None:
    outcome = run(raising(Reject("not for me")))

    assert (outcome.state, outcome.answer) == (states.REJECTED, Answer.DEAD_LETTER)
    assert stored(outcome)["status"] == states.FAILURE
    assert "not for me" in outcome.reason


def test_the_soft_limit_is_a_failure() -> None:
    assert run(raising(SoftTimeLimitExceeded(3.0))).state == states.FAILURE


def test_the_hard_limit_is_a_failure_or_a_requeue_by_the_tasks_choice() -> None:
    acked = run(raising(HardLimitReached(2.0)))
    assert (acked.state, acked.answer) == (states.FAILURE, Answer.ACK)
    assert stored(acked)["result"]["exc_type"] == "TimeLimitExceeded"

    given_back = run(raising(HardLimitReached(2.0)), acks_on_timeout=False)
    assert (given_back.answer, given_back.result) == (Answer.REQUEUE, None)


def test_a_terminated_task_is_revoked() -> None:
    outcome = run(raising(Terminated("by hand")))

    assert (outcome.state, outcome.answer, outcome.reason) == (states.REVOKED, Answer.ACK, "by hand")
    assert stored(outcome)["status"] == states.REVOKED


def test_an_abandoned_task_says_nothing_to_anybody() -> None:
    outcome = run(raising(Abandoned()), embed={"errbacks": [{"task": "told"}]})

    assert (outcome.answer, outcome.result, outcome.publish) == (Answer.REQUEUE, None, ())


# -- retries


def test_a_retry_is_a_message_and_the_cause_is_stored() -> None:
    outcome = run(raising(Retry(exc=ValueError("not yet"), when=1.5)))

    assert (outcome.state, outcome.answer) == (states.RETRY, Answer.ACK)
    assert json.loads(outcome.publish[0].body) == {"id": "id-1", "retries": 1, "when": 1.5}
    assert stored(outcome)["result"]["exc_type"] == "ValueError"


def test_errors_of_autoretry_for_are_retried_with_backoff() -> None:
    options: dict[str, Any] = {"autoretry_for": (OSError,), "retry_backoff": 3.0, "retry_jitter": False}
    outcome = run(raising(ConnectionError("down")), **options)

    assert outcome.state == states.RETRY
    assert json.loads(outcome.publish[0].body)["when"] == 3.0
    assert run(raising(ValueError()), **options).state == states.FAILURE
    assert run(raising(ConnectionError()), dont_autoretry_for=(ConnectionError,), **options).state == states.FAILURE


def test_autoretry_ends_with_the_error_itself() -> None:
    task = PlainTask(raising(OSError("down")), "t", autoretry_for=(OSError,), max_retries=2)
    outcome = make_executor(task).execute(request(1, "t", headers={"retries": 2}))

    assert outcome.state == states.FAILURE
    assert stored(outcome)["result"]["exc_type"] == "OSError"


# -- errbacks


def test_an_errback_of_one_argument_is_published_with_the_failed_tasks_id() -> None:
    outcome = run(raising(ValueError()), embed={"errbacks": [{"task": "elsewhere"}]})

    assert [message.routing_key for message in outcome.publish] == ["elsewhere"]
    assert json.loads(outcome.publish[0].body)["args"] == ["id-1"]


def test_an_errback_of_three_arguments_is_called_here() -> None:
    seen: list[Any] = []
    failing = PlainTask(raising(ValueError("x")), "t")
    errback = PlainTask(lambda request, exc, traceback, *more: seen.append((request.id, exc, more)), "errback")
    embed = {"errbacks": [{"task": "errback", "args": ["extra"]}]}
    outcome = make_executor(failing, errback).execute(request(1, "t", embed=embed))

    assert outcome.publish == ()
    [(task_id, error, more)] = seen
    assert (task_id, repr(error), more) == ("id-1", "ValueError('x')", ("extra",))


def test_a_failing_errback_changes_nothing() -> None:
    failing = PlainTask(raising(ValueError("x")), "t")
    errback = PlainTask(lambda request, exc, traceback: 1 / 0, "errback")
    outcome = make_executor(failing, errback).execute(request(1, "t", embed={"errbacks": [{"task": "errback"}]}))

    assert (outcome.state, outcome.summary) == (states.FAILURE, "ValueError('x')")


def test_a_lost_task_calls_its_errbacks_by_message() -> None:
    task = PlainTask(lambda: 1, "t", reject_on_worker_lost=False)
    lost = request(1, "t", embed={"errbacks": [{"task": "elsewhere"}]})
    outcome = make_executor(task).lost(lost, WorkerLostError("killed"))

    assert [message.routing_key for message in outcome.publish] == ["elsewhere"]
    assert (outcome.state, outcome.answer) == (states.FAILURE, Answer.ACK)


# -- what cannot be run


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"task": "addd"}, "Did you mean 'add'"),
        ({"body": b"\xff\xfe"}, "decode"),
        ({"body": b"17"}, "task message"),
        ({"content_type": "application/x-python-serialize"}, "application/x-python-serialize"),
    ],
)
def test_what_cannot_be_run_is_dead_lettered_with_the_reason(changes: dict[str, Any], word: str) -> None:
    options = {"task": "add", **changes}
    executor = make_executor(PlainTask(lambda: 1, "add"))
    outcome = executor.execute(request(1, options.pop("task"), **options))

    assert (outcome.state, outcome.answer) == (states.FAILURE, Answer.DEAD_LETTER)
    assert word in outcome.reason
    assert stored(outcome)["status"] == states.FAILURE


@pytest.mark.parametrize("options", [{"reply_to": [1]}, {"task_id": {}}, {"group_id": []}, {"chord": 7}])
def test_a_next_step_whose_options_are_none_is_found_before_the_task_runs(options: dict[str, Any]) -> None:
    ran: list[int] = []
    step = {"task": "add", "options": {"task_id": "later", **options}}
    outcome = make_executor(PlainTask(lambda: ran.append(1), "t")).execute(request(1, "t", embed={"chain": [step]}))

    assert not ran
    assert "`chain` of the message is not a list of signatures" in outcome.reason


def test_the_ends_that_no_slot_comes_to() -> None:
    late, early = PlainTask(lambda: 1, "late"), PlainTask(lambda: 1, "early", acks_late=False)
    executor = make_executor(late, early)
    lost, too_long = WorkerLostError("killed"), TimeLimitExceeded("too long")

    assert executor.lost(request(1, "late"), lost).answer is Answer.REQUEUE
    assert executor.lost(request(1, "early"), lost).state == states.FAILURE
    assert executor.lost(request(1, "late"), too_long).state == states.FAILURE
    assert executor.expired(request(1, "late")).state == states.REVOKED
    assert stored(executor.revoked(request(1, "late"), "by hand"))["result"]["exc_type"] == "TaskRevokedError"


# -- the result store


def test_a_store_of_its_own_is_written_by_the_slot() -> None:
    store = KeptStore()
    outcome = make_executor(PlainTask(lambda: 7, "t"), store=store).execute(request(1, "t"))

    assert outcome.result is None
    assert [(result.status, result.result) for result in store.results] == [(states.SUCCESS, 7)]


def test_started_is_stored_before_the_task_runs() -> None:
    store = KeptStore()
    task = PlainTask(lambda: [result.status for result in store.results], "t", track_started=True)
    make_executor(task, store=store).execute(request(1, "t"))

    assert store.results[-1].result == [states.STARTED]
    assert set(store.results[0].result) == {"pid", "hostname"}


@pytest.mark.parametrize("function", [lambda: 1, raising(ValueError())])
def test_an_end_that_cannot_be_stored_goes_back_to_the_broker_for_a_while(function: Callable[[], Any]) -> None:
    store = KeptStore(BackendUnreachable("redis is away"))
    outcome = make_executor(PlainTask(function, "t"), store=store).execute(request(1, "t"))

    assert outcome.answer is Answer.REQUEUE
    assert outcome.pause > 0
    assert "redis is away" in outcome.reason


def test_a_bug_in_the_store_is_an_outcome_too() -> None:
    store = KeptStore(RuntimeError("out of order"))
    outcome = make_executor(PlainTask(lambda: 1, "t"), store=store).execute(request(1, "t"))

    assert (outcome.state, outcome.answer) == (states.FAILURE, Answer.DEAD_LETTER)
    assert "out of order" in outcome.reason


def test_the_group_and_parent_of_a_task_are_in_its_result() -> None:
    headers = {"group": "g", "parent_id": "p"}
    task = PlainTask(lambda: 1, "t")
    meta = stored(make_executor(task).execute(request(1, "t", headers=headers)))

    assert (meta["group_id"], meta["parent_id"]) == ("g", "p")


def test_an_extended_result_tells_of_the_call() -> None:
    task = PlainTask(lambda x: x, "t")
    meta = stored(make_executor(task, extended=True).execute(request(1, "t", 5, routing_key="q")))

    assert (meta["name"], meta["args"], meta["worker"], meta["queue"]) == ("t", [5], "tests@here", "q")


# -- hooks and signals


def test_hooks_are_called_in_celerys_order() -> None:
    calls: list[Any] = []

    class Hooked(PlainTask):
        overridden_hooks = frozenset({"before_start", "on_success", "on_failure", "on_retry", "after_return"})

        def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
            calls.append(("before_start", task_id, args))

        def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
            calls.append(("on_success", retval))

        def on_failure(self, exc: BaseException, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
            calls.append(("on_failure", repr(exc), "ValueError" in str(einfo)))

        def on_retry(self, exc: BaseException, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
            calls.append(("on_retry", repr(exc)))

        def after_return(self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
            calls.append(("after_return", status))

    def behave(how: str) -> str:
        if how == "fail":
            raise ValueError(how)
        if how == "retry":
            raise Retry(exc=OSError(how), when=1)
        return how

    executor = make_executor(Hooked(behave, "t"))
    for how in ("succeed", "fail", "retry"):
        executor.execute(request(1, "t", how))

    assert calls == [
        ("before_start", "id-1", ["succeed"]), ("on_success", "succeed"), ("after_return", "SUCCESS"),
        ("before_start", "id-1", ["fail"]), ("on_failure", "ValueError('fail')", True), ("after_return", "FAILURE"),
        ("before_start", "id-1", ["retry"]), ("on_retry", "OSError('retry')"),
    ]  # fmt: skip


def test_a_hook_that_fails_does_not_change_the_outcome() -> None:
    class Hooked(PlainTask):
        overridden_hooks = frozenset({"on_success"})

        def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
            raise RuntimeError("hook")

    assert make_executor(Hooked(lambda: 1, "t")).execute(request(1, "t")).state == states.SUCCESS


@pytest.mark.parametrize("end", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()])
@pytest.mark.parametrize("fails", [False, True])
def test_a_hook_or_receiver_that_would_end_the_process_does_not_change_the_outcome(
    end: BaseException, fails: bool
) -> None:
    def leave(*_: Any, **__: Any) -> Any:
        raise end

    class Hooked(PlainTask):
        overridden_hooks = frozenset({"on_success", "on_failure", "after_return"})
        on_success = on_failure = after_return = leave

    told = (signals.task_success, signals.task_failure, signals.task_postrun)
    for signal in told:
        signal.connect(leave, weak=False)
    try:
        outcome = make_executor(Hooked(raising(ValueError()) if fails else lambda: 1, "t")).execute(request(1, "t"))
    finally:
        for signal in told:
            signal.disconnect(leave)

    assert (outcome.state, outcome.answer) == (states.FAILURE if fails else states.SUCCESS, Answer.ACK)
    assert stored(outcome)["status"] == outcome.state


def test_an_errback_that_would_end_the_process_changes_nothing() -> None:
    failing = PlainTask(raising(ValueError("x")), "t")
    errback = PlainTask(lambda request, exc, traceback: sys.exit(1), "errback")
    outcome = make_executor(failing, errback).execute(request(1, "t", embed={"errbacks": [{"task": "errback"}]}))

    assert (outcome.state, outcome.answer) == (states.FAILURE, Answer.ACK)


@pytest.fixture
def heard() -> Iterator[list[tuple[str, Any]]]:
    """The task signals that were sent, in order."""
    found: list[tuple[str, Any]] = []

    def hear(signal: signals.Signal, sender: Any, **arguments: Any) -> None:
        found.append((signal.name, arguments.get("state")))

    names = ("task_prerun", "task_postrun", "task_success", "task_failure", "task_retry")
    for name in names:
        getattr(signals, name).connect(hear, weak=False)
    yield found
    for name in names:
        getattr(signals, name).disconnect(hear)


def test_signals_are_sent_under_celerys_names(heard: list[tuple[str, Any]]) -> None:
    run(lambda: 1)
    run(raising(ValueError()))
    run(raising(Retry(when=1)))
    run(raising(Ignore()))

    assert heard == [
        ("task_prerun", None), ("task_success", None), ("task_postrun", "SUCCESS"),
        ("task_prerun", None), ("task_failure", None), ("task_postrun", "FAILURE"),
        ("task_prerun", None), ("task_retry", None), ("task_postrun", "RETRY"),
        ("task_prerun", None), ("task_postrun", "IGNORED"),
    ]  # fmt: skip


# -- the context


def test_the_context_lasts_as_long_as_the_run() -> None:
    seen: list[Any] = []

    def look(x: int) -> None:
        context = current_context()
        assert context is not None
        seen.append((context.id, context.args, context.retries, context.called_directly, context.hostname))

    run(look, 5)
    assert seen == [("id-1", [5], 0, False, "tests@here")]
    assert current_context() is None


# -- on an event loop


def arun(executor: Executor, **options: Any) -> Outcome:
    async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.to_thread(function, *arguments)

    async def main() -> Outcome:
        return await executor.aexecute(request(1, "t", **options), in_thread)

    return asyncio.run(main())


async def later() -> str:
    await asyncio.sleep(0)
    context = current_context()
    return str(context and context.id)


def test_an_async_task_runs_on_the_callers_loop() -> None:
    executor = make_executor(PlainTask(later, "t"), PlainTask(lambda: 1, "plain"))

    assert (executor.is_async("t"), executor.is_async("plain"), executor.is_async("unknown")) == (True, False, False)
    assert stored(arun(executor))["result"] == "id-1"


def test_a_store_that_blocks_is_called_off_the_loop() -> None:
    store = KeptStore()
    outcome = arun(make_executor(PlainTask(later, "t"), store=store))

    assert outcome.state == states.SUCCESS
    assert threading.get_ident() not in store.threads


def test_started_is_stored_off_the_loop_and_told_on_it() -> None:
    """What a receiver sets for the task (a context variable) must reach it."""
    store, said = KeptStore(), ContextVar("said", default="")
    threads: list[int] = []

    def say(**_: Any) -> None:
        threads.append(threading.get_ident())
        said.set("by the receiver")

    async def hear() -> str:
        return said.get()

    signals.task_prerun.connect(say)
    try:
        outcome = arun(make_executor(PlainTask(hear, "t", track_started=True), store=store))
    finally:
        signals.task_prerun.disconnect(say)

    assert outcome.state == states.SUCCESS
    assert [(each.status, each.result) for each in store.results[1:]] == [("SUCCESS", "by the receiver")]
    assert store.results[0].status == "STARTED"
    assert threads == [threading.get_ident()]
    assert threading.get_ident() not in store.threads


def test_on_a_loop_too_everything_is_an_outcome() -> None:
    async def fail() -> None:
        raise SystemExit(1)

    store = KeptStore(RuntimeError("out of order"))
    assert arun(make_executor(PlainTask(fail, "t"))).state == states.FAILURE
    assert arun(make_executor(PlainTask(later, "t"), store=store)).answer is Answer.DEAD_LETTER
    assert arun(make_executor(PlainTask(later, "t")), body=b"{").answer is Answer.DEAD_LETTER


def test_awaitables_that_are_no_coroutines_do_not_confuse_it() -> None:
    async def plain() -> Awaitable[int]:
        return asyncio.get_running_loop().create_future()

    assert arun(make_executor(PlainTask(plain, "t"))).state == states.FAILURE


def test_what_hangs_on_a_lost_task_with_large_arguments_is_told() -> None:
    embed = {"errbacks": [{"task": "err", "args": [], "kwargs": {}, "options": {}}]}
    lost = request(1, "t", "x" * 5_000_000, embed=embed)
    outcome = make_executor(PlainTask(lambda text: None, "t", acks_late=False)).lost(lost, WorkerLostError("gone"))

    assert len(outcome.publish) == 1


def test_what_hangs_on_a_task_that_was_lost_for_the_last_time_is_told_however_large_it_is() -> None:
    embed = {"errbacks": [{"task": "err", "args": [], "kwargs": {}, "options": {}}]}
    lost = request(1, "t", "x" * 5_000_000, embed=embed)
    outcome = make_executor(PlainTask(lambda text: None, "t")).lost_finally(lost, WorkerLostError("delivered 5 times"))

    assert (outcome.answer, len(outcome.publish)) == (Answer.DEAD_LETTER, 1)


def test_large_arguments_of_what_did_not_run_are_not_read_on_the_loop() -> None:
    embed = {"errbacks": [{"task": "err", "args": [], "kwargs": {}, "options": {}}]}
    refused = request(1, "t", "x" * 5_000_000, embed=embed)
    executor = make_executor(PlainTask(lambda text: None, "t"))

    assert executor.refused(refused, ValueError("no")).publish == ()
    assert len(executor.refused(refused, ValueError("no"), in_slot=True).publish) == 1


class Exiting(Exception):
    """Ends whoever wants to print it."""

    def __str__(self) -> str:
        raise SystemExit(5)

    __repr__ = __str__


class Closed(Exception):
    """Has nothing that may be read."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")


@pytest.mark.parametrize("error", [Exiting, Closed])
def test_an_exception_that_breaks_whoever_looks_at_it_ends_its_task_and_who_waits_is_told(
    error: type[Exception],
) -> None:
    def function() -> None:
        raise error

    outcome = run(function)

    assert (outcome.state, outcome.answer) == (states.FAILURE, Answer.DEAD_LETTER)
    assert "internal error" in outcome.reason
    result = stored(outcome)
    assert (result["status"], result["result"]["exc_type"]) == (states.FAILURE, "RuntimeError")

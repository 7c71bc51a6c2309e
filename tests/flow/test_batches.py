"""Tasks whose function gets many calls at once: each call has an outcome of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from logging import makeLogRecord
from typing import Any, ClassVar

import pytest

from amqtask import AmqTask, Batch, BatchCall, Concurrency, Unique, chain, chord, states
from amqtask.backends.memory import MemoryBackend
from amqtask.exceptions import BackendUnreachable, ConfigurationError, TaskRevokedError, WrongValue
from amqtask.log import TaskFormatter
from amqtask.protocol.result import ResultMessage, decode_result, encode_result
from amqtask.testing.worker import start_worker
from amqtask.worker.operations import Operations
from amqtask.worker.worker import Worker


@pytest.fixture
def app() -> AmqTask:
    return AmqTask("batches", broker="memory://", backend="cache+memory://", set_as_current=False)


def until(condition: Callable[[], object]) -> None:
    while not condition():
        threading.Event().wait(0.005)


def sums(app: AmqTask, batch: Batch, **options: Any) -> tuple[Any, list[int]]:
    """A task that adds each call's arguments, and how many calls each run had."""
    sizes: list[int] = []

    @app.task(name="sums", batch=batch, **options)
    def add(calls: list[BatchCall]) -> list[int]:
        sizes.append(len(calls))
        return [sum(call.args, *call.kwargs.values()) for call in calls]

    return add, sizes


@pytest.mark.parametrize("pool", ["solo", "threads"])
def test_the_function_gets_as_many_calls_as_its_batch_takes(app: AmqTask, pool: str) -> None:
    add, sizes = sums(app, Batch(4, 600))
    results = [add.delay(number, 1, start=1) for number in range(20)]

    with start_worker(app, pool=pool, concurrency=2):
        assert [result.get(timeout=60) for result in results] == [number + 2 for number in range(20)]
    assert sizes == [4] * 5


def test_a_batch_that_does_not_fill_runs_when_its_time_is_up(app: AmqTask) -> None:
    add, sizes = sums(app, Batch(100, 0.1))
    with start_worker(app):
        assert [add.delay(1).get(timeout=60), add.delay(2).get(timeout=60)] == [1, 2]
    assert sizes == [1, 1]


class Together(MemoryBackend):
    """A store that takes several results at once, and fails the first time."""

    stores_together = True
    is_away = True
    counts: ClassVar[list[int]] = []

    def packed(self, result: ResultMessage) -> bytes:
        return encode_result(result, "json").body

    def store_packed(self, results: Sequence[tuple[str, bytes]]) -> None:
        self.counts.append(len(results))
        if self.is_away:
            self.is_away = False
            raise BackendUnreachable("the store is away")
        for _, body in results:
            self.store(decode_result(body, "application/json", "utf-8", frozenset({"application/json"})))


def test_the_results_of_a_batch_are_stored_together_and_its_calls_come_again_if_they_are_not() -> None:
    app = AmqTask("together", broker="memory://", backend=f"{__name__}:Together", set_as_current=False)

    @app.task(name="add", batch=Batch(4, 0.5))
    def add(calls: list[BatchCall]) -> list[object]:
        return [call.args[0] or {1j} for call in calls]

    Together.counts.clear()
    results: list[Any] = [add.apply_async((number,)) for number in (0, 1, 2, 3)]
    with start_worker(app):
        assert [result.get(timeout=60) for result in results[1:]] == [1, 2, 3]
        # What cannot be encoded fails alone.
        assert "set" in str(results[0].get(timeout=60, propagate=False))
        until(lambda: len(Together.counts) == 2)
    assert Together.counts[0] == 3


def test_coroutines_have_batches_too(app: AmqTask) -> None:
    @app.task(name="add", batch=Batch(5, 600))
    async def add(calls: list[BatchCall]) -> list[int]:
        return [sum(call.args) for call in calls]

    results: list[Any] = [add.apply_async((number, 1)) for number in range(10)]
    with start_worker(app, pool="asyncio", concurrency=2):
        assert [result.get(timeout=60) for result in results] == [number + 1 for number in range(10)]


def test_each_call_may_say_how_it_ends(app: AmqTask) -> None:
    @app.task(name="pay", batch=Batch(4, 600), bind=True)
    def pay(self: Any, calls: list[BatchCall]) -> None:
        for call in calls:
            (what,) = call.args
            if what == "fail":
                call.fail(ValueError(f"{call.name} {call.id}"))
            elif what == "retry" and not call.request.retries:
                call.retry(countdown=0)
            elif what == "exhausted":
                call.retry(ValueError("again"), max_retries=0)
            elif what == "value":
                call.succeed([call.id])

    calls = [pay.apply_async((what,), task_id=what) for what in ("fail", "exhausted", "value", "retry")]
    more = [pay.apply_async(("",), task_id=f"more {number}") for number in range(3)]
    with start_worker(app):
        ends = [call.get(timeout=60, propagate=False) for call in (*calls, *more)]
    assert [repr(end) for end in ends[:2]] == ["ValueError('pay fail')", "ValueError('again')"]
    assert ends[2:] == [["value"], None, None, None, None]


def test_an_error_fails_all_of_which_nothing_was_said_and_is_retried_as_usual(app: AmqTask) -> None:
    runs: list[list[tuple[str | None, int]]] = []

    @app.task(
        name="pay", batch=Batch(3, 600), autoretry_for=(OSError,), retry_kwargs={"countdown": 0, "max_retries": 1}
    )
    def pay(calls: list[BatchCall]) -> None:
        runs.append([(call.id, call.request.retries) for call in calls])
        calls[0].succeed("paid")
        raise OSError("the bank is closed") if len(runs) == 1 else ValueError("for good")

    calls: list[Any] = [pay.apply_async(task_id=name) for name in "abcd"]
    with start_worker(app):
        ends = [call.get(timeout=60, propagate=False) for call in calls]
    assert runs == [[("a", 0), ("b", 0), ("c", 0)], [("d", 0), ("b", 1), ("c", 1)]]
    assert (ends[0], ends[3]) == ("paid", "paid")
    assert {repr(end) for end in ends[1:3]} == {"ValueError('for good')"}


@pytest.mark.parametrize(("returned", "error"), [([1], "1 results for 2 calls"), ("ab", "returned str for 2 calls")])
def test_a_wrong_list_of_results_fails_the_calls(app: AmqTask, returned: object, error: str) -> None:
    pay = app.task(name="pay", batch=Batch(2, 600))(lambda calls: returned)
    calls = [pay.apply_async(), pay.apply_async()]
    with start_worker(app):
        assert [error in str(call.get(timeout=60, propagate=False)) for call in calls] == [True, True]


def test_a_list_of_results_that_cannot_be_read_fails_the_calls(app: AmqTask) -> None:
    class Torn(list[int]):
        def __getitem__(self, index: Any) -> Any:
            raise LookupError("torn")

    pay = app.task(name="pay", batch=Batch(2, 600))(lambda calls: Torn(range(len(calls))))
    calls = [pay.apply_async(), pay.apply_async()]
    with start_worker(app):
        assert [repr(call.get(timeout=30, propagate=False)) for call in calls] == ["LookupError('torn')"] * 2


@pytest.mark.parametrize("pool", ["solo", "asyncio"])
def test_the_function_may_take_calls_out_of_its_list_and_sort_it(app: AmqTask, pool: str) -> None:
    def take(calls: list[BatchCall]) -> list[int] | None:
        if calls[0].args[0] == "pop":
            while calls:
                calls.pop()
            return None
        calls.sort(key=lambda call: -call.args[1])
        return [call.args[1] for call in calls]

    async def atake(calls: list[BatchCall]) -> list[int] | None:
        return take(calls)

    make: Any = app.task(name="take", batch=Batch(3, 600))
    task = make(atake if pool == "asyncio" else take)
    popped = [task.apply_async(("pop", number)) for number in range(3)]
    ordered = [task.apply_async(("sort", number)) for number in range(3)]
    with start_worker(app, pool=pool):
        assert [call.get(timeout=60) for call in popped] == [None, None, None]
        assert [call.get(timeout=60) for call in ordered] == [0, 1, 2]
    assert task.apply(("pop", 1)).get() is None


def test_retry_of_the_task_itself_is_for_each_call(app: AmqTask) -> None:
    @app.task(name="pay", batch=Batch(2, 600), bind=True)
    def pay(self: Any, calls: list[BatchCall]) -> str | list[str]:
        if not calls[0].request.retries:
            raise self.retry(countdown=0)
        return ["paid", "paid"]

    calls = [pay.apply_async(), pay.apply_async()]
    with start_worker(app):
        assert [call.get(timeout=60) for call in calls] == ["paid", "paid"]


def test_steps_of_workflows_may_run_in_batches(app: AmqTask) -> None:
    add, sizes = sums(app, Batch(2, 0.2))
    double = app.task(name="double")(lambda values: [2 * value for value in values])
    results = [chain(add.s(number), add.s(1)).apply_async() for number in range(2)]
    joined = chord([add.s(1), add.s(2)], double.s()).apply_async()

    with start_worker(app):
        assert [result.get(timeout=60) for result in results] == [1, 2]
        assert joined.get(timeout=60) == [2, 4]
    assert sum(sizes) == 6


@pytest.mark.parametrize("pool", ["solo", "asyncio"])
def test_chunks_and_maps_of_it_are_batches(app: AmqTask, pool: str) -> None:
    sizes: list[int] = []

    def double(calls: list[BatchCall]) -> list[int]:
        sizes.append(len(calls))
        if calls[-1].args[0] == 9:
            calls[-1].fail(ValueError("nine"))
        return [2 * call.args[0] for call in calls]

    async def adouble(calls: list[BatchCall]) -> list[int]:
        return double(calls)

    make: Any = app.task(name="double", batch=Batch(2, 600))
    task = make(adouble if pool == "asyncio" else double)
    with start_worker(app, pool=pool):
        assert task.map([1, 2, 3]).delay().get(timeout=60) == [2, 4, 6]
        assert task.chunks([(1,), (2,), (3,)], 2).delay().get(timeout=60) == [[2, 4], [6]]
        with pytest.raises(ValueError, match="nine"):
            task.starmap([(1,), (9,)]).delay().get(timeout=60)
    assert sorted(sizes) == [1, 1, 2, 2, 2]


def test_what_the_function_logs_is_the_batchs(app: AmqTask) -> None:
    @app.task(name="pay", batch=Batch(2, 600))
    def pay(calls: list[BatchCall]) -> list[str]:
        line = TaskFormatter("%(task_name)s[%(task_id)s] %(message)s", False).format(makeLogRecord({"msg": "paid"}))
        return [line, line]

    calls: list[Any] = [pay.apply_async(), pay.apply_async()]
    with start_worker(app):
        assert [call.get(timeout=60) for call in calls] == ["pay[batch] paid"] * 2


# -- while calls are gathered


def gathered(app: AmqTask, worker: Worker, count: int) -> None:
    until(lambda: len(list(worker.dispatcher)) == count)


def test_a_call_that_is_revoked_or_expires_meanwhile_does_not_run(app: AmqTask) -> None:
    add, sizes = sums(app, Batch(4, 600))

    def revoke() -> None:
        Operations(worker).revoke([revoked.id])

    with start_worker(app) as worker:
        revoked, expired, first = add.delay(1), add.apply_async((2,), expires=1), add.delay(3)
        gathered(app, worker, 3)
        worker.loop.call_soon_threadsafe(revoke)
        until(lambda: worker.dispatcher.watched.get(1) == float("inf"))
        threading.Event().wait(1.01)  # its time to live
        last = add.delay(4)
        assert [first.get(timeout=60), last.get(timeout=60)] == [3, 4]
        for call in (revoked, expired):
            with pytest.raises(TaskRevokedError):
                call.get(timeout=60)
    assert sizes == [2]


def test_a_worker_that_stops_gives_back_what_it_has_gathered(app: AmqTask) -> None:
    add, sizes = sums(app, Batch(3, 600))
    calls = [add.delay(1), add.delay(2)]
    with start_worker(app) as worker:
        gathered(app, worker, 2)
    assert app.memory_broker is not None
    assert (sizes, app.memory_broker.count("amqtask")) == ([], 2)

    with start_worker(app):
        calls.append(add.delay(3))
        assert [call.get(timeout=60) for call in calls] == [1, 2, 3]
    assert sizes == [3]


def test_a_queue_that_is_paused_gets_back_what_was_gathered(app: AmqTask) -> None:
    add, sizes = sums(app, Batch(3, 600))
    found: list[tuple[bool, int, list[Any]]] = []

    def pause() -> None:  # the broker, which knows of no pause, has it resumed at once
        is_paused = Operations(worker).pause("amqtask")
        found.append((is_paused, worker.deliveries.outstanding, list(worker.dispatcher)))

    with start_worker(app) as worker:
        add.delay(1)
        gathered(app, worker, 1)
        worker.loop.call_soon_threadsafe(pause)
        until(lambda: found)
    assert (sizes, found) == ([], [(True, 0, [])])


def test_one_call_of_a_running_batch_is_not_terminated(app: AmqTask) -> None:
    go, begun = threading.Event(), threading.Event()
    found: list[tuple[list[str], Any]] = []

    @app.task(name="wait", batch=Batch(2, 600))
    def wait(calls: list[BatchCall]) -> None:
        begun.set()
        go.wait(60)

    def terminate() -> None:
        operations = Operations(worker)
        found.append(([request.id for request in operations.active()], operations.terminate(lambda request: True)))
        go.set()

    calls = [wait.apply_async(task_id=name) for name in "ab"]
    with start_worker(app, pool="threads") as worker:
        begun.wait(60)
        worker.loop.call_soon_threadsafe(terminate)
        assert [call.get(timeout=60) for call in calls] == [None, None]
    active, terminated = found[0]
    assert (active, [request.id for request in terminated.going_on]) == (["a", "b"], ["a", "b"])


# -- inline, and what cannot be


def test_inline_the_function_gets_one_call(app: AmqTask) -> None:
    @app.task(name="pay", batch=Batch(10), bind=True)
    def pay(self: Any, calls: list[BatchCall]) -> list[str] | None:
        (call,) = calls
        if call.args == ("fail",):
            call.fail(ValueError("no"))
        elif call.args == ("retry",) and not call.request.retries:
            call.retry(countdown=0)
        elif call.args == ("raise",):
            raise KeyError("raised")
        return [f"{self.name} {call.request.retries}"]

    assert [pay.apply((what,)).state for what in ("", "fail", "retry", "raise")] == [
        states.SUCCESS, states.FAILURE, states.SUCCESS, states.FAILURE,
    ]  # fmt: skip
    results: list[Any] = [pay.apply(("",)), pay.apply(("retry",))]
    assert [result.get() for result in results] == ["pay 0", "pay 1"]


@pytest.mark.parametrize(
    "options",
    [
        {"unique": Unique()},
        {"limits": Concurrency(1)},
        {"breaker": True},
        {"inbox": True},
        {"rate_limit": "1/s"},
        {"acks_late": False},
    ],
)
def test_options_for_single_calls_are_refused(app: AmqTask, options: dict[str, Any]) -> None:
    make: Any = app.task(name="pay", batch=Batch(), **options)
    make(lambda calls: None)
    with pytest.raises(ConfigurationError, match=f"task pay has batch and {next(iter(options))}"):
        app.finalize()


def test_fair_by_is_a_function_there(app: AmqTask) -> None:
    make: Any = app.task(name="pay", batch=Batch(2, 600), fair_by=lambda tenant: tenant)
    make(lambda calls: [call.args[0] for call in calls])
    calls = [app.tasks["pay"].apply_async((tenant,)) for tenant in "abab"]
    with start_worker(app):
        assert [call.get(timeout=60) for call in calls] == list("abab")

    wrong: Any = app.task(name="wrong", batch=Batch(), fair_by="tenant")
    with pytest.raises(
        ConfigurationError, match=r"task wrong has batch and fair_by tenant: .* wants a function of them"
    ):
        wrong(lambda calls: None)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"size": True}, {"size": 10**6}, {"seconds": 0}, {"seconds": 601}])
def test_wrong_batches_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(WrongValue, match="Batch: "):
        Batch(**wrong)


def test_a_call_fails_with_an_exception_only() -> None:
    with pytest.raises(TypeError, match="an exception"):
        BatchCall().fail("no")  # type: ignore[arg-type]


def test_a_batch_takes_one_of_its_queues_slots(app: AmqTask) -> None:
    app.conf.worker_queue_slots = {"amqtask": "1"}
    running: list[int] = []
    most: list[int] = []

    @app.task(name="pay", batch=Batch(3, 600))
    def pay(calls: list[BatchCall]) -> None:
        running.append(1)
        most.append(len(running))
        threading.Event().wait(0.01)  # the work
        running.pop()

    calls = [pay.apply_async() for _ in range(30)]
    with start_worker(app, pool="threads", concurrency=4):
        for call in calls:
            call.get(timeout=60)
    assert (len(most), max(most)) == (10, 1)


def test_a_call_of_a_running_batch_sees_that_it_is_cancelled(app: AmqTask) -> None:
    began = threading.Event()

    @app.task(name="look", batch=Batch(2, 600))
    def look(calls: list[BatchCall]) -> list[bool]:
        began.set()
        until(lambda: any(call.request.is_cancelled() for call in calls))
        return [call.request.is_cancelled() for call in calls]

    call: Any = look
    first, second = call.delay(), call.delay()
    with start_worker(app, pool="threads"):
        assert began.wait(60)
        second.cancel()
        assert [first.get(timeout=60), second.get(timeout=60)] == [False, True]

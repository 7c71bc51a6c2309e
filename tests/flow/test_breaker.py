"""A breaker: after so many failures calls wait in the broker, until one that tries has succeeded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from amqtask import AmqTask, Breaker, Concurrency, Unique
from amqtask.exceptions import Ignore, Reject, Retry, WrongValue
from amqtask.flow.contract import RUN, Entry, Guard
from amqtask.flow.memory import MemoryStore
from amqtask.testing.worker import start_worker


@pytest.fixture
def app() -> Iterator[AmqTask]:
    made = AmqTask("breakers", broker="memory://", backend="cache+memory://", set_as_current=False)
    yield made
    made.close()


class Service:
    """What tasks call; it is down until somebody says that it is up."""

    def __init__(self) -> None:
        self.is_up = threading.Event()
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if not self.is_up.is_set():
            raise ConnectionError("down")
        return "up"


def circuits(app: AmqTask, task: Any) -> dict[str, Any]:
    return app.runtime.flow_store.circuits([task.flow_plan.guard.key])


@pytest.mark.parametrize("pool", ["threads", "asyncio", "solo"])
def test_calls_wait_until_one_has_succeeded(app: AmqTask, pool: str, caplog: pytest.LogCaptureFixture) -> None:
    service = Service()

    @app.task(name="call", breaker=Breaker(failures=2, seconds=60, pause=0.5))
    async def call() -> str:
        return service()

    results: list[Any] = [call.delay() for _ in range(6)]
    with start_worker(app, pool=pool, concurrency=1):
        for failed in results[:2]:
            with pytest.raises(ConnectionError):
                failed.get(timeout=60)
        service.is_up.set()
        assert [result.get(timeout=60) for result in results[2:]] == ["up"] * 4

    assert service.calls == 6
    assert circuits(app, call) == {}
    told = [record.getMessage() for record in caplog.records if "the breaker of task call" in record.getMessage()]
    assert [line.split(" is ")[1].split(":")[0] for line in told] == ["open", "half-open", "closed"]


def test_it_goes_with_limits_and_unique_keys(app: AmqTask) -> None:
    service = Service()

    @app.task(name="call", breaker=Breaker(failures=1, pause=0.3), limits=Concurrency(1), unique=Unique(by="number"))
    def call(number: int) -> str:
        return service()

    with start_worker(app, pool="threads", concurrency=3):
        with pytest.raises(ConnectionError):
            call.delay(0).get(timeout=60)
        service.is_up.set()
        results = [call.delay(number) for number in range(5)]
        assert [result.get(timeout=60) for result in results] == ["up"] * 5


def test_only_what_counts_is_a_failure(app: AmqTask) -> None:
    errors: list[Exception] = [ValueError("mine"), Ignore(), Reject("no", requeue=False)]

    @app.task(name="call", bind=True, max_retries=1, default_retry_delay=0, breaker=Breaker(1, counts=ConnectionError))
    def call(self: Any, number: int) -> None:
        if number == 3:
            raise self.retry(exc=ConnectionError())
        raise errors[number]

    @app.task(name="last")
    def last() -> str:
        return "last"

    with start_worker(app, concurrency=1):
        for number in range(3):
            call.delay(number)
        assert last.delay().get(timeout=60) == "last"
        assert circuits(app, call) == {}


def test_a_failure_that_is_retried_by_itself_counts(app: AmqTask) -> None:
    service = Service()

    @app.task(name="call", autoretry_for=(ConnectionError,), default_retry_delay=0, breaker=Breaker(1, pause=3600))
    def call() -> str:
        return service()

    @app.task(name="last")
    def last() -> str:
        return "last"

    with start_worker(app, concurrency=1):
        call.delay()
        while not circuits(app, call):
            assert last.delay().get(timeout=60) == "last"
    assert service.calls == 1


def test_inline_calls_ask_nobody(app: AmqTask) -> None:
    @app.task(name="call", breaker=True)
    def call() -> None:
        raise ConnectionError

    for _ in range(30):
        call.apply()
    assert circuits(app, call) == {}


def test_failures_that_are_long_ago_do_not_count() -> None:
    now = 0.0
    store = MemoryStore(lambda: now)
    guard = Guard("b", failures=2, seconds=10, pause=5)

    def fail(number: int) -> str:
        entry = Entry("s", str(number), f"{number} w 1", None, (), guard=guard)
        assert store.enter(entry, 30) == RUN
        return store.leave(entry, 0.1, "free", "failure")

    assert fail(1) == ""
    now = 11.0
    assert fail(2) == ""
    now = 20.0
    assert fail(3) == "open"


def test_a_long_backlog_comes_back_over_time() -> None:
    store = MemoryStore(lambda: 0.0)
    guard = Guard("b", failures=1, seconds=10, pause=60)

    def entry(number: int) -> Entry:
        return Entry("s", str(number), f"{number} w 1", None, (), guard=guard)

    store.enter(entry(0), 30)
    store.leave(entry(0), 0.1, "free", "failure")
    waits = [store.enter(entry(number), 30).seconds for number in range(1, 10_000)]

    assert waits[0] == 60
    assert max(waits) <= 120
    assert len({int(wait) for wait in waits}) > 30


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"failures": 0}, "failures wants a whole number"),
        ({"failures": True}, "failures wants a whole number"),
        ({"seconds": 0}, "seconds wants a number of seconds"),
        ({"pause": "30"}, "pause wants a number of seconds"),
        ({"pause": timedelta(days=2)}, "pause wants a number of seconds"),
        ({"counts": "ConnectionError"}, "counts wants exceptions"),
        ({"counts": (ValueError, "x")}, "counts wants exceptions"),
    ],
)
def test_what_is_wrong_is_told(fields: dict[str, Any], error: str) -> None:
    with pytest.raises(WrongValue, match=error):
        Breaker(**fields)


def test_what_counts() -> None:
    in_words: Any = timedelta(seconds=3)
    assert Breaker(pause=in_words).pause == 3.0
    assert Breaker().is_failure(ValueError())
    assert not Breaker().is_failure(Retry())
    assert not Breaker(counts=(OSError, KeyError)).is_failure(ValueError())
    assert Breaker(counts=lambda error: "down" in str(error)).is_failure(OSError("it is down"))


def test_the_option_is_checked(app: AmqTask) -> None:
    with pytest.raises((TypeError, ValueError), match="breaker wants a Breaker"):
        app.task(name="call", breaker=3)(lambda: None)

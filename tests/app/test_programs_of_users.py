"""Calls, results and retries as programs of users write them, with a worker on the in-memory broker."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from datetime import datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from pydantic import BaseModel

from amqtask import AmqTask, AsyncResult, chain, chord, group
from amqtask.exceptions import ConfigurationError, DuplicateTaskNameWarning, WrongValue
from amqtask.ground import current
from amqtask.result import ResultSet, result_from_tuple
from amqtask.testing.worker import start_worker

WAIT = 30


class Model(BaseModel):
    n: int


def make_app(**settings: Any) -> AmqTask:
    return AmqTask("tests", broker="memory://", backend="cache+memory://", **settings)


# -- serializers


@pytest.mark.parametrize("serializer", ["json", "pickle", "yaml", "msgpack"])
def test_each_serializer_writes_each_composition(serializer: str) -> None:
    app = make_app(task_serializer=serializer, accept_content=["json", "pickle", "yaml", "msgpack"])

    @app.task
    def add(x: int, y: int) -> int:
        return x + y

    @app.task
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    @app.task
    def fail() -> None:
        raise ValueError("on purpose")

    @app.task
    def note(task_id: str) -> str:
        return task_id

    with start_worker(app):
        assert chain(add.s(1, 2), add.s(3), add.s(4)).delay().get(WAIT) == 10
        assert chord(group(add.s(n, n) for n in range(3)), total.s()).delay().get(WAIT) == 6
        linked = add.apply_async((1, 1), link=add.s(5))
        assert linked.get(WAIT) == 2
        failed = fail.apply_async(link_error=note.s())
        with pytest.raises(ValueError, match="on purpose"):
            failed.get(WAIT)


def test_a_signature_is_pickled_and_copied_with_all_that_it_holds() -> None:
    app = make_app()

    @app.task
    def add(x: int, y: int) -> int:
        return x + y

    work = chain(add.s(1, 2), group(add.s(3), add.s(4))).set(queue="work")

    copied, loaded = copy.deepcopy(work), pickle.loads(pickle.dumps(work))

    assert copied == work
    assert loaded == work
    assert type(loaded) is type(copied) is type(work)
    assert copied.app is app
    copied.kwargs["tasks"].clear()
    assert len(work.kwargs["tasks"]) == 2


# -- results


def test_a_call_without_a_result_is_not_waited_for() -> None:
    app = make_app()

    @app.task(ignore_result=True)
    def quiet() -> int:
        return 1

    @app.task
    def loud() -> int:
        return 2

    assert quiet.delay().get() is None
    assert loud.apply_async(ignore_result=True).get() is None
    assert ResultSet([quiet.delay(), quiet.delay()]).get() == [None, None]


def test_a_task_may_return_the_result_of_another_call() -> None:
    app = make_app()

    @app.task
    def inner() -> int:
        return 7

    @app.task
    def outer() -> Any:
        return inner.delay()

    with start_worker(app):
        told = outer.delay().get(WAIT)
        assert result_from_tuple(told, app=app).get(WAIT) == 7


def test_a_result_may_be_an_argument() -> None:
    app = make_app()

    @app.task
    def inner() -> int:
        return 7

    @app.task
    def described(result: Any) -> str:
        return str(result_from_tuple(result, app=app).id)

    with start_worker(app):
        result = inner.delay()
        assert described.delay(result).get(WAIT) == result.id


def test_a_result_is_pickled_and_copied() -> None:
    app = make_app()
    app.set_current()
    result: AsyncResult[Any] = AsyncResult("an-id", app=app)

    loaded, copied = pickle.loads(pickle.dumps(result)), copy.deepcopy(result)

    assert loaded == result == copied
    assert copied.state == "PENDING"
    assert loaded == "an-id"
    assert current.find_current_app() is app


def test_each_state_that_is_seen_is_told_to_on_message() -> None:
    app = make_app()

    @app.task(bind=True)
    def work(self: Any) -> str:
        self.update_state(state="PROGRESS", meta={"done": 1})
        return "over"

    told: list[Any] = []
    with start_worker(app):
        assert work.delay().get(WAIT, on_message=told.append, interval=0.01) == "over"

    assert told[-1]["status"] == "SUCCESS"
    assert {meta["status"] for meta in told} <= {"PENDING", "PROGRESS", "SUCCESS"}


def test_a_result_set_takes_an_application() -> None:
    app = make_app()

    assert len(ResultSet([], app=app)) == 0


def test_an_error_whose_text_is_no_utf_8_is_stored() -> None:
    app = make_app()

    @app.task
    def read(name: str) -> None:
        raise OSError(2, "no such file", os.fsdecode(b"caf\xe9"))

    with start_worker(app):
        result = read.delay("x")
        with pytest.raises(OSError, match="no such file"):
            result.get(WAIT)

    assert result.traceback is not None
    result.traceback.encode()
    str(result.result).encode()


# -- retries


def test_a_retry_that_does_not_raise_is_published_all_the_same() -> None:
    app = make_app()
    has_run_again = threading.Event()

    @app.task(bind=True)
    def work(self: Any) -> str:
        if self.request.retries:
            has_run_again.set()
        else:
            self.retry(countdown=0, throw=False)
        return f"run {self.request.retries}"

    with start_worker(app):
        assert work.delay().get(WAIT) in ("run 0", "run 1")
        assert has_run_again.wait(WAIT)


def test_a_retry_that_does_not_raise_runs_at_once_in_an_eager_call() -> None:
    app = make_app(task_always_eager=True)
    seen: list[int] = []

    @app.task(bind=True)
    def work(self: Any) -> int:
        seen.append(self.request.retries)
        if not self.request.retries:
            self.retry(countdown=0, throw=False)
        return len(seen)

    assert work.delay().get() == 2
    assert seen == [0, 1]


def test_a_retry_for_an_error_that_cannot_be_shown_runs_again() -> None:
    class Unshown(Exception):
        def __repr__(self) -> str:
            raise RuntimeError("no repr")

        __str__ = __repr__

    app = make_app()

    @app.task(bind=True)
    def work(self: Any) -> int:
        if not self.request.retries:
            raise self.retry(exc=Unshown(), countdown=0)
        return int(self.request.retries)

    with start_worker(app):
        assert work.delay().get(WAIT) == 1


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"countdown": float("nan")}, "countdown wants a number of seconds"),
        ({"countdown": "soon"}, "countdown wants a number of seconds"),
        ({"eta": "soon"}, "eta wants a datetime"),
        ({"max_retries": "many"}, "max_retries wants a whole number"),
    ],
)
def test_a_retry_with_a_time_or_a_limit_that_is_none_says_what_is_wanted(options: Any, wanted: str) -> None:
    app = make_app(task_always_eager=True)

    @app.task(name="work", bind=True)
    def work(self: Any) -> None:
        raise self.retry(**options)

    with pytest.raises(WrongValue, match=f"task work: {wanted}"):
        work.delay().get()


def test_what_replaces_a_task_must_be_a_signature() -> None:
    app = make_app(task_always_eager=True)

    @app.task(name="work", bind=True)
    def work(self: Any) -> None:
        self.replace("other")

    with pytest.raises(ConfigurationError, match="task work is replaced by a signature, not by 'other'"):
        work.delay().get()


def test_a_retry_in_a_chain_does_not_expire_at_the_broker_where_nobody_would_be_told() -> None:
    app = make_app()

    @app.task(bind=True, max_retries=1)
    def flaky(self: Any) -> int:
        if not self.request.retries:
            raise self.retry(countdown=0, expires=60)
        return 1

    @app.task
    def add(x: int, y: int) -> int:
        return x + y

    with start_worker(app):
        assert chain(flaky.s(), add.s(1)).delay().get(WAIT) == 2


# -- times


def test_a_time_without_a_zone_is_in_the_applications_zone() -> None:
    app = make_app(timezone="Asia/Tokyo")

    @app.task
    def work() -> None: ...

    soon = datetime.now(ZoneInfo("Asia/Tokyo")).replace(tzinfo=None) + timedelta(hours=1)
    message = app.calls.compose("t", (), {}, {"eta": soon})

    eta = datetime.fromisoformat(message.properties.headers["eta"])
    assert eta.astimezone(timezone.utc) == soon.replace(tzinfo=ZoneInfo("Asia/Tokyo")).astimezone(timezone.utc)


def test_without_a_zone_of_its_own_an_application_takes_times_as_utc() -> None:
    message = make_app().calls.compose("t", (), {}, {"eta": datetime(2099, 1, 1, 12), "expires": "2099-01-02T00:00:00"})

    assert message.properties.headers["eta"] == "2099-01-01T12:00:00+00:00"
    assert message.properties.headers["expires"] == "2099-01-02T00:00:00+00:00"


def test_the_time_zone_may_be_an_object() -> None:
    zone = ZoneInfo("Europe/Berlin")

    assert make_app(timezone=zone).timezone is zone


def test_a_number_as_eta_is_refused_with_what_is_meant() -> None:
    with pytest.raises(TypeError, match="countdown=5"):
        make_app().calls.compose("t", (), {}, {"eta": 5})


# -- names, arguments


def test_two_functions_under_one_name_are_told_with_both_places() -> None:
    app = make_app()

    @app.task(name="shop.pay")
    def first() -> int:
        return 1

    with pytest.warns(
        DuplicateTaskNameWarning, match=r"first in .*, line \d+ is used, that of .*second in .*, line \d+"
    ):

        @app.task(name="shop.pay")
        def second() -> int:
            return 2

    assert app.tasks["shop.pay"].run() == 1


def test_arguments_are_shown_as_the_caller_says() -> None:
    message = make_app().calls.compose(
        "t", ("secret",), {"password": "x"}, {"argsrepr": "('***',)", "kwargsrepr": "{'password': '***'}"}
    )

    assert message.properties.headers["argsrepr"] == "('***',)"
    assert message.properties.headers["kwargsrepr"] == "{'password': '***'}"


def test_an_optional_model_arrives_as_a_model_or_none() -> None:
    app = make_app()

    @app.task(pydantic=True)
    def look(it: Model | None = None) -> str:
        return type(it).__name__

    with start_worker(app):
        assert look.apply_async(({"n": 1},)).get(WAIT) == "Model"
        assert look.delay(None).get(WAIT) == "NoneType"


def test_what_a_model_refuses_is_told_to_the_caller() -> None:
    app = make_app()

    @app.task(pydantic=True)
    def look(it: Model) -> int:
        return it.n

    with start_worker(app), pytest.raises(Exception, match="validation error for Model"):
        look.apply_async(({"n": "not a number"},)).get(WAIT)

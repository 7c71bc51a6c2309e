"""Calls that cannot be sent say which task, which argument and what to do, before anything is published."""

from __future__ import annotations

import inspect
import sys
import uuid
from typing import Any

import pytest

from amqtask import AmqTask, Queue, group
from amqtask.calls.signature import Signature
from amqtask.exceptions import ConfigurationError, EncodeError, WrongValue


@pytest.fixture
def app() -> AmqTask:
    """With one task, whose calls nobody runs."""
    app = AmqTask("wrong", broker="memory://")

    @app.task(name="same")
    def same(value: Any = None, other: Any = None) -> Any:
        return value

    return app


@pytest.mark.parametrize("is_connected", [True, False], ids=["connected", "to connect"])
def test_a_stack_that_is_nearly_full_is_told_as_it_is_and_the_next_call_works(app: AmqTask, is_connected: bool) -> None:
    def deeper(levels: int) -> Any:
        return deeper(levels - 1) if levels else app.send_task("same", headers={"mine": [{"a": 1}]})

    app.send_task("same")
    here = len(inspect.stack(0))
    raised = set()
    for left in range(10, 80, 2):
        if not is_connected:
            app.publisher.close()
        try:
            deeper(sys.getrecursionlimit() - here - left)
        except Exception as error:
            raised.add(type(error))
        assert app.send_task("same").id
    assert raised == {RecursionError}


@pytest.mark.parametrize(
    ("args", "kwargs", "named"),
    [
        (({1, 2},), {}, r"task same: argument 1 is \{1, 2\}, and json cannot write"),
        ((1, [{"deep": {3}}]), {}, "task same: argument 2 is"),
        ((), {"other": {1}}, "task same: argument 'other' is"),
        (({"__type__": "colour", "__value__": 1},), {}, "keys '__type__' and '__value__'"),
        (([{"__type__": "bytes", "__value__": "1"}],), {}, "give it one more key"),
    ],
)
def test_an_argument_that_cannot_be_written_is_named(app: AmqTask, args: Any, kwargs: Any, named: str) -> None:
    for publish in (app.tasks["same"].apply_async, Signature("same", args, kwargs, app=app).apply_async):
        given = (args, kwargs) if publish == app.tasks["same"].apply_async else ()
        with pytest.raises(EncodeError, match=named):
            publish(*given)


def test_what_looks_like_a_typed_value_and_has_more_keys_is_sent(app: AmqTask) -> None:
    app.tasks["same"].delay({"__type__": "colour", "__value__": 1, "more": 2}, other="the keys __type__ and __value__")


@pytest.mark.parametrize(
    ("args", "kwargs"), [({"value": 1}, None), ("text", None), (5, None), ({1}, None), ((), [1]), (None, "text")]
)
def test_arguments_that_are_none_are_refused_whoever_publishes(app: AmqTask, args: Any, kwargs: Any) -> None:
    task = app.tasks["same"]
    for publish in (
        task.apply_async,
        task.apply,
        task.signature,
        task.s().apply_async,
        lambda args, kwargs: app.send_task("same", args, kwargs),
        (task.s() | task.s()).apply_async,
    ):
        with pytest.raises(TypeError, match=r"task .*: (args is a list|kwargs is a dictionary)"):
            publish(args, kwargs)


def test_a_header_that_amqp_cannot_hold_is_named(app: AmqTask) -> None:
    with pytest.raises(WrongValue, match=r"task same: .*'shop' is UUID\(.*str\(…\) makes text of it"):
        app.tasks["same"].apply_async((1,), headers={"shop": uuid.uuid4()})
    with pytest.raises(WrongValue, match=r"'shop'\['ids'\] is \{1\}"):
        app.tasks["same"].apply_async((1,), headers={"shop": {"ids": {1}}})


@pytest.mark.parametrize("name", ["same", "sa*"])
def test_a_misspelt_key_of_a_route_is_an_error(app: AmqTask, name: str) -> None:
    app.conf.task_routes = {name: {"queu": "emails"}}

    with pytest.raises(ConfigurationError, match=r"route of task .* has 'queu'.*did you mean 'queue'"):
        app.tasks["same"].delay(1)


def test_so_it_is_in_what_a_router_returns(app: AmqTask) -> None:
    app.conf.task_routes = [lambda *_, **__: {"routing_kye": "x"}]

    with pytest.raises(ConfigurationError, match="did you mean 'routing_key'"):
        app.tasks["same"].delay(1)


def test_a_queue_that_the_configuration_does_not_name_is_told_once(
    app: AmqTask, caplog: pytest.LogCaptureFixture
) -> None:
    app.conf.task_queues = [Queue("emails"), Queue("reports")]

    for _ in range(2):
        app.tasks["same"].apply_async((1,), queue="emial")
    app.tasks["same"].apply_async((1,), queue="reports")

    (told,) = [record.getMessage() for record in caplog.records if "task_queues" in record.getMessage()]
    assert "'emial' is not in task_queues" in told
    assert "did you mean 'emails'" in told


def test_eager_calls_get_what_a_worker_would_get() -> None:
    app = AmqTask("eager", broker="memory://", task_always_eager=True)
    retried: list[type[BaseException]] = []

    @app.task(name="kind")
    def kind(value: Any) -> str:
        return type(value).__name__

    class Noting(app.Task):  # type: ignore[misc, name-defined, unused-ignore]
        def on_retry(self, exc: BaseException, *_: Any) -> None:
            retried.append(type(exc))

    @app.task(name="twice", base=Noting, bind=True)
    def twice(self: Any) -> int:
        if self.request.retries < 2:
            raise self.retry(exc=KeyError("again"), countdown=0)
        return int(self.request.retries)

    assert kind.delay((1, 2)).get() == "list"
    assert kind.apply(((1, 2),)).get() == "tuple"
    assert kind.s((1, 2)).delay().get() == "list"
    assert (kind.s((1, 2)) | kind.s()).delay().get() == "str"
    with pytest.raises(EncodeError, match="task kind: argument 1"):
        kind.delay({1, 2})
    assert kind.apply_async(({1, 2},), serializer="pickle").get() == "set"
    assert twice.delay().get() == 2
    assert retried == [KeyError, KeyError]


@pytest.mark.parametrize("name", [None, "", 5, b"same", "n" * 256])
def test_a_name_that_no_task_can_have_is_refused(app: AmqTask, name: Any) -> None:
    for call in (
        lambda: app.send_task(name),
        lambda: Signature(name, app=app).delay(),
        lambda: group([Signature(name, app=app)], app=app).delay(),
    ):
        with pytest.raises((WrongValue, TypeError), match=r"the name of a task wants|a signature is wanted"):
            call()


def test_an_option_that_no_retry_has_is_refused_where_the_task_is_defined(app: AmqTask) -> None:
    options: dict[str, Any] = {"retry_kwargs": {"countdown": 5, "max_retires": 5}}
    with pytest.raises(WrongValue, match="retry_kwargs has no option 'max_retires'"):
        app.task(name="misspelt", **options)(print)

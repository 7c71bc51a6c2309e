"""Tracing libraries that replace `celery.app.trace.build_tracer` run around each task, as in Celery."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.testing.worker import start_worker

Seen = list[tuple[str, Any]]


@pytest.fixture
def app() -> Iterator[Any]:
    with AmqTask("traced", broker="memory://", backend="cache+memory://") as made:
        yield made


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What a library sees that replaces the function as Sentry's does: each task's `run`, and what it is run by."""
    trace = importlib.import_module("amqtask.app.trace")
    seen: Seen = []
    original = trace.build_tracer

    def around_run(run: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(run)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return run(*args, **kwargs)
            except Exception as error:
                seen.append(("raised", type(error).__name__))
                raise

        return call

    def build_tracer(name: str, task: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        task.run = around_run(task.run)
        inner = original(name, task, *args, **kwargs)

        def tracer(uuid: str, args: Any, kwargs: Any, request: Any) -> Any:
            seen.append(("begins", (name, list(args), request["headers"].get("tenant"))))
            ended = inner(uuid, args, kwargs, request)
            seen.append(("ended", ended.retval))
            return ended

        return tracer

    monkeypatch.setattr(trace, "build_tracer", build_tracer)
    return seen


def test_a_tracer_is_around_each_run_and_sees_what_its_caller_sent(app: Any, seen: Seen) -> None:
    double = app.task(name="double")(lambda x: 2 * x)

    with start_worker(app, pool="threads", concurrency=1):
        assert double.apply_async((2,), headers={"tenant": "acme"}).get(60) == 4
        assert double.delay(3).get(60) == 6

    assert seen == [
        ("begins", ("double", [2], "acme")),
        ("ended", 4),
        ("begins", ("double", [3], None)),
        ("ended", 6),
    ]


def test_an_error_passes_a_tracer_as_a_value_and_still_fails_the_task(app: Any, seen: Seen) -> None:
    divide = app.task(name="divide")(lambda x: 1 / x)

    with start_worker(app, pool="threads"):
        failed = divide.delay(0)
        with pytest.raises(ZeroDivisionError):
            failed.get(60)
        assert "1 / x" in (failed.traceback or "")

    assert [what for what, _ in seen] == ["begins", "raised", "ended"]
    assert isinstance(seen[-1][1], ZeroDivisionError)


def test_a_retry_is_seen_as_one_and_done(app: Any, seen: Seen) -> None:
    def run(self: Any) -> int:
        if not self.request.retries:
            self.retry()
        return int(self.request.retries)

    again = app.task(bind=True, name="again", default_retry_delay=0)(run)
    with start_worker(app, pool="threads"):
        assert again.delay().get(60) == 1

    assert [kind for what, kind in seen if what == "raised"] == ["Retry"]
    assert seen[-1] == ("ended", 1)


def test_coroutines_run_without_a_tracer(app: Any, seen: Seen) -> None:
    async def run() -> str:
        return "done"

    later = app.task(name="later")(run)
    with start_worker(app, pool="asyncio"):
        assert later.delay().get(60) == "done"

    assert seen == []


def test_without_a_library_a_task_is_called_directly(app: Any) -> None:
    trace = importlib.import_module("amqtask.app.trace")
    task = app.task(name="plain")(lambda x: x)

    assert trace.replaced_tracer(task) is None
    ended = trace.build_tracer("plain", task)("id", (1,), {}, None)
    assert (ended.retval, ended.info) == (1, None)

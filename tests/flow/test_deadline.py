"""Deadlines: they begin with the call, go with all that follows from it, and end what still runs."""

from __future__ import annotations

import asyncio
import threading
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from amqtask import AmqTask, chain, chord, group, states
from amqtask.exceptions import SoftTimeLimitExceeded, TaskRevokedError, WrongValue
from amqtask.flow.deadline import HEADER
from amqtask.testing.worker import start_worker


@pytest.fixture
def app() -> AmqTask:
    return AmqTask("deadlines", broker="memory://", backend="cache+memory://")


def tells(app: AmqTask, name: str, **options: Any) -> Any:
    """A task that returns its deadline as text."""

    @app.task(name=name, bind=True, **options)
    def tell(self: Any, *args: Any) -> str | None:
        deadline = self.request.deadline
        return None if deadline is None else deadline.isoformat()

    return tell


def test_it_counts_from_the_call_and_the_task_reads_it(app: AmqTask) -> None:
    @app.task(name="looks", bind=True, deadline=300)
    def looks(self: Any) -> tuple[str, float]:
        return self.request.deadline.isoformat(), self.request.remaining

    before = datetime.now(timezone.utc)
    with start_worker(app):
        deadline, remaining = looks.delay().get(timeout=60)

    assert before + timedelta(seconds=300) <= datetime.fromisoformat(deadline)
    assert 200 < remaining < 300


def test_a_call_without_one_has_none(app: AmqTask) -> None:
    @app.task(name="free", bind=True)
    def free(self: Any) -> list[object]:
        return [self.request.deadline, self.request.remaining]

    message = app.caller.compose("free", (), {}, {}, None)
    with start_worker(app):
        assert free.delay().get(timeout=60) == [None, None]
    assert HEADER not in message.properties.headers


def test_a_call_may_have_its_own_and_expires_no_later(app: AmqTask) -> None:
    tell = tells(app, "tell", deadline=300, expires=1000)
    moment = datetime.now(timezone.utc) + timedelta(seconds=50)

    message = app.caller.compose("tell", (), {}, {"deadline": moment}, tell)
    earlier = app.caller.compose("tell", (), {}, {"deadline": 60, "expires": 30}, tell)

    assert message.properties.headers[HEADER] == message.properties.headers["expires"] == moment.isoformat()
    assert earlier.properties.headers["expires"] < earlier.properties.headers[HEADER]


def test_it_counts_from_the_eta_of_a_delayed_call(app: AmqTask) -> None:
    tell = tells(app, "tell", deadline=10)
    eta = datetime.now(timezone.utc) + timedelta(hours=1)

    headers = app.caller.compose("tell", (), {}, {"eta": eta}, tell).properties.headers

    assert headers[HEADER] == (eta + timedelta(seconds=10)).isoformat()


@pytest.mark.parametrize("wrong", [0, -1, "soon", True])
def test_a_task_is_told_at_once_that_its_deadline_is_none(app: AmqTask, wrong: object) -> None:
    def define() -> None:
        tells(app, "wrong", deadline=wrong)
        app.finalize()

    with pytest.raises(WrongValue, match="deadline wants a number of seconds above 0"):
        define()


def test_what_comes_too_late_is_revoked_and_does_not_run(app: AmqTask) -> None:
    tell = tells(app, "tell")
    with start_worker(app):
        result = tell.apply_async(deadline=-1)
        with pytest.raises(TaskRevokedError, match="expired"):
            result.get(timeout=60)
    assert result.state == states.REVOKED


def test_it_ends_what_still_runs_and_errbacks_run_all_the_same(app: AmqTask) -> None:
    told = threading.Event()

    @app.task(name="hangs", deadline=0.3)
    async def hangs() -> None:
        await asyncio.sleep(3600)

    @app.task(name="tell_of", bind=True)
    def tell_of(self: Any, task_id: str) -> None:
        if self.request.deadline is None:
            told.set()

    with start_worker(app, pool="asyncio", concurrency=2):
        result = hangs.apply_async(link_error=tell_of.s())
        with pytest.raises(SoftTimeLimitExceeded):
            print(result.get(timeout=60))
        assert told.wait(60)


def test_it_goes_with_children_steps_callbacks_and_retries(app: AmqTask) -> None:
    tell = tells(app, "tell")
    longer = tells(app, "longer", deadline=9999)
    seen: list[str | None] = []

    @app.task(name="calls", bind=True)
    def calls(self: Any) -> list[str]:
        if not self.request.retries:
            raise self.retry(countdown=0)
        seen.append(self.request.deadline.isoformat())
        return [tell.delay().id, longer.delay().id, group(tell.s()).apply_async().results[0].id]

    with start_worker(app, pool="threads", concurrency=2):
        first = chain(calls.s(), tell.s()).apply_async(deadline=600)
        step = first.get(timeout=60)
        children = [app.AsyncResult(child).get(timeout=60) for child in first.parent.get(timeout=60)]
    assert [step, *children] == seen * 4


def test_it_goes_with_the_members_and_the_body_of_a_chord(app: AmqTask) -> None:
    tell = tells(app, "tell")
    several = app.task(name="several", bind=True)(lambda self, told: [*told, self.request.deadline.isoformat()])

    @app.task(name="begins", bind=True, deadline=600)
    def begins(self: Any) -> tuple[str, str]:
        return self.request.deadline.isoformat(), chord([tell.s(), tell.s()], several.s()).apply_async().id

    with start_worker(app, pool="threads", concurrency=2):
        mine, body = begins.delay().get(timeout=60)
        assert app.AsyncResult(body).get(timeout=60) == [mine] * 3
        outside = chord([tell.s(), tell.s()], several.s()).apply_async(deadline=600).get(timeout=60)
    assert len(set(outside)) == 1


def test_a_child_that_is_none_is_free_of_it(app: AmqTask) -> None:
    tell = tells(app, "tell")

    @app.task(name="calls", deadline=600)
    def calls() -> str:
        return str(tell.apply_async(add_to_parent=False).id)

    with start_worker(app, pool="threads", concurrency=2):
        assert app.AsyncResult(calls.delay().get(timeout=60)).get(timeout=60) is None


def test_a_retry_that_would_come_too_late_fails_with_its_cause(app: AmqTask) -> None:
    @app.task(name="fails", bind=True, deadline=100, autoretry_for=(KeyError,), retry_kwargs={"countdown": 200})
    def fails(self: Any) -> None:
        raise KeyError("the cause")

    with start_worker(app):
        result = fails.delay()
        with pytest.raises(KeyError, match="the cause"):
            result.get(timeout=60)


def test_a_sender_that_knows_nothing_of_it_is_bound_by_the_tasks_own(app: AmqTask) -> None:
    elsewhere = AmqTask("celery", broker="memory://", backend="cache+memory://")
    message = elsewhere.caller.compose("tell", (), {}, {"task_id": "1"}, None)
    past = elsewhere.caller.compose("tell", (), {}, {"task_id": "2"}, None)
    past.properties.headers["timestamp_in_ms"] = 1_000_000
    tells(app, "tell", deadline=300)
    app.finalize()
    assert HEADER not in message.properties.headers

    with start_worker(app):
        app.publisher.publish_many([message, past])
        assert app.AsyncResult("1").get(timeout=60) > datetime.now(timezone.utc).isoformat()
        with pytest.raises(TaskRevokedError, match="expired"):
            app.AsyncResult("2").get(timeout=60)


def test_inline_calls_have_it_too(app: AmqTask) -> None:
    tell = tells(app, "tell")

    @app.task(name="calls", bind=True, deadline=600)
    def calls(self: Any) -> tuple[str, str]:
        return self.request.deadline.isoformat(), tell.apply().get(disable_sync_subtasks=False)

    mine, child = calls.apply().get()
    assert mine == child
    assert tell.apply(deadline=-1).state == states.REVOKED
    assert tell.apply().get() is None


def test_a_deadline_that_cannot_be_read_harms_nothing(app: AmqTask) -> None:
    tell = tells(app, "tell")
    with start_worker(app):
        results = [tell.apply_async(headers={HEADER: text}, expires=60) for text in ("soon", "9" * 400, 7)]
        assert [result.get(timeout=60) for result in results] == [None] * 3


@pytest.mark.parametrize("pool", ["solo", "asyncio"])
def test_one_that_no_clock_here_will_see_is_no_limit(app: AmqTask, pool: str) -> None:
    last = "9999-12-31T23:59:59+00:00"

    @app.task(name="limits", bind=True)
    async def limits(self: Any) -> list[object]:
        return [self.request.deadline.year, self.request.timelimit]

    with start_worker(app, pool=pool):
        result = app.send_task("limits", headers={HEADER: last}, expires=datetime.fromisoformat(last))
        assert result.get(timeout=60) == [9999, [None, None]]

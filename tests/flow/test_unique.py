"""Unique tasks: one call with a key at a time, whoever calls, and whatever becomes of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from amqtask import AmqTask, Unique, chain, chord, group, states
from amqtask.exceptions import (
    AlreadyQueued,
    ConfigurationError,
    FlowGapWarning,
    TaskRevokedError,
    Unroutable,
    WrongValue,
)
from amqtask.flow.keys import TAKEN, UNIQUE
from amqtask.protocol.message import Message, Properties
from amqtask.testing.worker import start_worker
from integration.waiting import eventually


@pytest.fixture
def app() -> AmqTask:
    return AmqTask("unique", broker="memory://", backend="cache+memory://")


def counts(app: AmqTask, unique: object, **options: Any) -> Any:
    """A task that returns how often it has run."""
    runs: list[object] = []

    @app.task(name="count", unique=unique, **options)
    def count(user_id: int = 1, note: str = "") -> list[object]:
        runs.append((user_id, note))
        return [*runs]

    return count


def queued(app: AmqTask) -> int:
    assert app.memory_broker is not None
    return app.memory_broker.count(app.conf.task_default_queue)


def test_a_second_call_gets_the_result_of_the_first(app: AmqTask) -> None:
    count = counts(app, Unique(by="user_id"))

    first, second, other = count.delay(1), count.delay(user_id=1, note="again"), count.delay(2)

    assert (second.id == first.id, other.id == first.id, queued(app)) == (True, False, 2)
    with start_worker(app):
        assert second.get(timeout=60) == [[1, ""]]
        assert other.get(timeout=60) == [[1, ""], [2, ""]]
        assert count.delay(1).get(timeout=60) == [[1, ""], [2, ""], [1, ""]]


def test_all_arguments_make_the_key_or_none(app: AmqTask) -> None:
    by_all, by_none = counts(app, True), AmqTask("none", broker="memory://", backend="cache+memory://")
    alone = counts(by_none, Unique(by=()))

    assert by_all.delay(1).id == by_all.delay(1, note="").id == by_all.delay(user_id=1).id
    assert by_all.delay(1).id != by_all.delay(1, note="other").id
    assert alone.delay(1).id == alone.delay(2).id


def test_a_function_makes_the_key(app: AmqTask) -> None:
    count = counts(app, Unique(by=lambda user_id=1, note="": user_id % 2))

    assert count.delay(1).id == count.delay(3).id != count.delay(2).id


def test_a_conflict_drops_or_raises_where_that_is_asked_for(app: AmqTask) -> None:
    drops = counts(app, Unique(on_conflict="drop"))
    other = AmqTask("raising", broker="memory://", backend="cache+memory://")
    raises = counts(other, Unique(on_conflict="raise"))

    first, second = drops.delay(), drops.delay()
    assert (second.id != first.id, second.get(timeout=1), queued(app)) == (True, None, 1)
    first = raises.delay()
    with pytest.raises(AlreadyQueued, match="waits or runs") as raised:
        raises.delay()
    assert raised.value.task_id == first.id


def test_a_call_that_waits_is_replaced(app: AmqTask) -> None:
    count = counts(app, Unique(by="user_id", until="started", on_conflict="replace"))

    count.delay(1, "old")
    second = count.delay(1, "new")

    with start_worker(app):
        assert second.get(timeout=60) in ([[1, "new"]], [[1, "old"], [1, "new"]])


def test_the_replaced_call_is_revoked(app: AmqTask) -> None:
    with pytest.warns(FlowGapWarning, match="replaces a call that waits, not one that runs"):
        replaces = Unique(by="user_id", on_conflict="replace")
    count = counts(app, replaces)

    first, second = count.delay(1, "old"), count.delay(1, "new")

    with start_worker(app):
        assert second.get(timeout=60) == [[1, "new"]]
        with pytest.raises(TaskRevokedError, match=f"same unique key is there: {second.id}"):
            first.get(timeout=60)


def blocking(app: AmqTask, unique: Unique, **options: Any) -> tuple[Any, threading.Event, threading.Event]:
    runs, may_end = threading.Event(), threading.Event()

    @app.task(name="blocks", unique=unique, **options)
    def blocks(fails: bool = False) -> str:
        runs.set()
        may_end.wait(60)
        if fails:
            raise ValueError("it fails")
        return "done"

    return blocks, runs, may_end


@pytest.mark.parametrize("until", ["success", "end"])
def test_a_running_call_has_its_key(app: AmqTask, until: str) -> None:
    blocks, runs, may_end = blocking(app, Unique(until=until))
    with start_worker(app, pool="threads", concurrency=2):
        first = blocks.delay()
        assert runs.wait(60)
        assert blocks.delay().id == first.id
        may_end.set()
        assert first.get(timeout=60) == "done"
        eventually(lambda: blocks.delay().id != first.id)


def test_a_key_until_the_start_is_free_while_it_runs(app: AmqTask) -> None:
    blocks, runs, may_end = blocking(app, Unique(until="started"))
    with start_worker(app, pool="threads", concurrency=2):
        first = blocks.delay()
        assert runs.wait(60)
        second = blocks.delay()
        may_end.set()
        assert second.id != first.id
        assert [first.get(timeout=60), second.get(timeout=60)] == ["done", "done"]


@pytest.mark.parametrize(("until", "is_free"), [("end", True), ("success", False), ("ttl", False)])
def test_what_a_failure_leaves(app: AmqTask, until: str, is_free: bool) -> None:
    blocks, _, may_end = blocking(app, Unique(by=(), until=until))
    may_end.set()
    with start_worker(app, pool="threads", concurrency=2):
        first = blocks.delay(fails=True)
        with pytest.raises(ValueError, match="it fails"):
            first.get(timeout=60)
        if is_free:
            eventually(lambda: blocks.delay().id != first.id)
        else:
            assert blocks.delay().id == first.id


def test_retries_keep_the_key(app: AmqTask) -> None:
    ids: list[bool] = []

    @app.task(name="retries", bind=True, unique=True)
    def retries(self: Any) -> list[bool]:
        ids.append(retries.delay().id == self.request.id)
        if self.request.retries < 2:
            raise self.retry(countdown=0)
        return ids

    with start_worker(app, pool="threads", concurrency=2):
        assert retries.delay().get(timeout=60) == [True] * 3


def test_callers_on_event_loops_and_in_pipelines_are_told(app: AmqTask) -> None:
    count = counts(app, True)

    async def call() -> tuple[str, str]:
        return (await count.adelay()).id, (await count.aapply_async()).id

    one, two = asyncio.run(call())
    with app.pipeline():
        three, four = count.delay(3), count.delay(3)
    assert one == two
    assert (three.id, queued(app)) == (four.id, 2)


def test_a_call_that_was_not_published_leaves_no_key(app: AmqTask) -> None:
    count = counts(app, True)
    app.conf.task_create_missing_queues = True
    with pytest.raises(Unroutable):
        count.apply_async(exchange="", routing_key="nowhere")

    assert count.delay().get is not None
    assert queued(app) == 1


def test_a_key_of_a_revoked_or_expired_call_is_free(app: AmqTask) -> None:
    count = counts(app, True)
    expired = count.apply_async(expires=-1)
    with start_worker(app):
        with pytest.raises(TaskRevokedError):
            expired.get(timeout=60)
        eventually(lambda: count.delay().id != expired.id)


def test_senders_that_know_nothing_of_it_run_one_at_a_time(app: AmqTask) -> None:
    blocks, runs, may_end = blocking(app, Unique())
    elsewhere = AmqTask("celery", broker="memory://", backend="cache+memory://")
    messages = [elsewhere.caller.compose("blocks", (), {}, {"task_id": task_id}, None) for task_id in "ab"]
    assert UNIQUE not in messages[0].properties.headers

    with start_worker(app, pool="threads", concurrency=2):
        app.publisher.publish(messages[0])
        assert runs.wait(60)
        app.publisher.publish(messages[1])
        with pytest.raises(TaskRevokedError, match="same unique key is there: a"):
            app.AsyncResult("b").get(timeout=60)
        assert blocks.delay().id == "a"
        may_end.set()
        assert app.AsyncResult("a").get(timeout=60) == "done"


def test_parts_of_workflows_ask_when_they_start(app: AmqTask) -> None:
    count = counts(app, Unique(by=()))

    with start_worker(app):
        members = group(count.s(1), count.s(2)).apply_async()
        assert [len(value) for value in members.get(timeout=60)] == [1, 2]
        assert len(chain(count.si(3), count.si(4)).apply_async().get(timeout=60)) == 4


def test_calls_that_are_published_together_take_their_keys_too(app: AmqTask) -> None:
    count = counts(app, Unique(by="user_id"))
    earlier = count.delay(1)

    one, two, three, four = app.publish_many(count.s(user) for user in (1, 2, 2, 3))
    (five,) = asyncio.run(app.apublish_many([count.s(3)]))

    assert (one.id, two.id, four.id) == (earlier.id, three.id, five.id)
    assert len({one.id, two.id, four.id}) == queued(app) == 3
    with start_worker(app):
        assert five.get(timeout=60) == [[1, ""], [2, ""], [3, ""]]
        eventually(lambda: count.delay(3).id != five.id)


def test_a_conflict_among_them_drops_or_raises_and_the_others_are_published(app: AmqTask) -> None:
    drops = counts(app, Unique(on_conflict="drop"))
    other = AmqTask("raising", broker="memory://", backend="cache+memory://")
    raises = counts(other, Unique(on_conflict="raise"))

    first, second, _ = app.publish_many([drops.s(1), drops.s(1), drops.s(2)])
    assert (second.id != first.id, second.get(timeout=1), queued(app)) == (True, None, 2)
    with pytest.raises(AlreadyQueued, match="waits or runs") as raised:
        other.publish_many([raises.s(1), raises.s(1), raises.s(2)])
    assert [raised.value.task_id, len(raised.value.results), queued(other)] == [raised.value.results[0].id, 2, 2]  # type: ignore[attr-defined]


def test_those_that_were_not_published_together_leave_no_keys(app: AmqTask) -> None:
    count = counts(app, True)
    with pytest.raises(Unroutable):
        app.publish_many([count.s(1), count.s(2).set(exchange="", routing_key="nowhere")])

    assert count.delay(2).get is not None
    assert queued(app) == 2


@pytest.mark.parametrize("way", ["group", "async group", "chain", "chord", "pipeline"])
def test_a_part_of_a_workflow_that_waits_has_its_key(app: AmqTask, way: str) -> None:
    count, total = counts(app, Unique(by="user_id")), app.task(name="total")(lambda values: len(values))
    if way == "async group":
        first = asyncio.run(group(count.s(1), count.s(2)).aapply_async()).results[0]
    elif way == "chain":
        first = chain(count.s(1), total.s()).apply_async().parent
    elif way == "chord":
        first = chord([count.s(1), count.s(2)], total.s()).apply_async().parent.results[0]
    elif way == "pipeline":
        with app.pipeline():
            first = group(count.s(1), count.s(2)).apply_async().results[0]
    else:
        first = group(count.s(1), count.s(2)).apply_async().results[0]

    assert count.delay(1).id == first.id
    with start_worker(app):
        assert first.get(timeout=60) == [[1, ""]]
        eventually(lambda: count.delay(1).id != first.id)


def test_a_part_whose_key_another_call_has_is_published_all_the_same(app: AmqTask) -> None:
    raises = counts(app, Unique(by="user_id", on_conflict="raise"))
    first = raises.delay(1)
    members = group(raises.s(1), raises.s(2)).apply_async()

    assert queued(app) == 3
    with start_worker(app):
        assert first.get(timeout=60) == [[1, ""]]
        assert [len(value) for value in members.get(timeout=60)] == [2, 3]


def test_a_call_takes_the_key_for_its_whole_time_once_it_is_published(app: AmqTask) -> None:
    count = counts(app, Unique(ttl=500))
    count.delay()

    message = app.caller.compose("count", (), {}, {}, count)
    assert TAKEN not in message.properties.headers
    assert app.runtime.flow_store.take(message.properties.headers[UNIQUE], "other", 1) is not None


def test_inline_runs_take_no_key(app: AmqTask) -> None:
    count = counts(app, True)
    count.delay()

    assert count.apply().get() == [(1, "")]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Unique(until="finish"), "until wants 'started', 'success', 'end' or 'ttl', not 'finish'"),
        (lambda: Unique(on_conflict="retrun"), "Did you mean 'return'"),
        (lambda: Unique(ttl=0), "ttl wants a number of seconds"),
        (lambda: Unique(by=5), "by wants the name of an argument"),  # type: ignore[arg-type]
    ],
)
def test_what_is_wrong_is_said_when_it_is_written(make: Callable[[], object], words: str) -> None:
    with pytest.raises(WrongValue, match=words):
        make()


def test_an_argument_that_is_none_is_told_with_the_task(app: AmqTask) -> None:
    def define(unique: object) -> None:
        counts(app, unique)
        app.finalize()

    with pytest.raises(WrongValue, match=r"Unique is by 'user', which is no argument of it\. Did you mean 'user_id'"):
        define(Unique(by="user"))


def test_without_a_store_callers_and_workers_are_told() -> None:
    app = AmqTask("storeless", broker="amqp://nowhere.invalid//")
    count = counts(app, True)

    with pytest.raises(ConfigurationError, match="set flow_store to redis://"):
        count.delay()
    with pytest.raises(ConfigurationError, match="set flow_store to redis://"):
        app.runtime.make_gate()
    assert states.REVOKED


def test_a_call_without_an_id_is_refused_as_its_key_would_be_nobodys(app: AmqTask) -> None:
    count = counts(app, True)
    queue = app.queues[app.conf.task_default_queue]
    properties = Properties(content_type="application/json", headers={"task": "count"})
    app.publisher.publish(Message(b"[[], {}, {}]", properties, "", queue.name, app.queues.declarations(queue)))
    broker = app.memory_broker
    assert broker is not None

    with start_worker(app):
        eventually(lambda: broker.count(f"{queue.name}.dead") == 1)
        assert count.delay().get(timeout=60) == [[1, ""]]

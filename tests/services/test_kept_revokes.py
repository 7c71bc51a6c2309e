"""Revokes that the broker keeps: a worker that starts later does not run what was revoked before, whoever revoked it."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.exceptions import PublishError, PublishRefused, TaskRevokedError
from amqtask.protocol.control import Command, command_message
from amqtask.protocol.entities import Queue
from amqtask.protocol.message import Message, Properties
from amqtask.remote.kept import JOURNAL
from amqtask.testing.worker import start_worker
from amqtask.transport.memory.broker import MemoryBroker


@pytest.fixture
def app() -> Iterator[AmqTask]:
    made = AmqTask("kept", broker="memory://", backend="cache+memory://", set_as_current=False)

    @made.task(name="kept.add")
    def add(x: int, y: int) -> int:
        return x + y

    yield made
    made.close()


def memory(app: AmqTask) -> MemoryBroker:
    broker = app.memory_broker
    assert broker is not None
    return broker


def orders(app: AmqTask) -> list[Any]:
    """The arguments of the orders that the broker keeps."""
    kept = app.runtime.kept_revokes(app.publisher)
    assert kept is not None
    found = [kept.read(delivery) for delivery in kept.tail().read(1000, 1.0)]
    return [order.arguments for order in found if order.method != "mark"]


def assert_runs(app: AmqTask) -> None:
    assert app.tasks["kept.add"].delay(2, 3).get(timeout=60) == 5


def test_a_worker_that_starts_later_does_not_run_it(app: AmqTask) -> None:
    add = app.tasks["kept.add"]
    first, second, third = (add.delay(1, 1) for _ in range(3))
    first.revoke()
    app.control.revoke([second.id])

    with start_worker(app):
        for revoked in (first, second):
            with pytest.raises(TaskRevokedError):
                revoked.get(timeout=60)
        assert third.get(timeout=60) == 2


def test_stamps_are_kept_too(app: AmqTask) -> None:
    call = app.tasks["kept.add"].s(1, 1)
    call.stamp(customer="x")
    revoked = call.apply_async()
    app.control.revoke_by_stamped_headers({"customer": ["x", "y"]})

    with start_worker(app):
        with pytest.raises(TaskRevokedError):
            revoked.get(timeout=60)
        assert_runs(app)


def test_a_long_order_is_learned_whole(app: AmqTask) -> None:
    first, second, third = (app.tasks["kept.add"].delay(1, 1) for _ in range(3))
    others = [str(uuid.uuid4()) for _ in range(12_000)]
    app.control.revoke([first.id, *others[:6_000], second.id, *others[6_000:], third.id])

    with start_worker(app):
        for revoked in (first, second, third):
            with pytest.raises(TaskRevokedError):
                revoked.get(timeout=60)
        assert_runs(app)


def test_what_is_said_to_some_workers_only_is_not_kept(app: AmqTask) -> None:
    result = app.tasks["kept.add"].delay(1, 1)
    app.control.revoke(result.id, destination=["other@h"])

    with start_worker(app):
        assert result.get(timeout=60) == 2
    assert orders(app) == []


def test_nothing_is_kept_that_only_those_who_hear_it_need(app: AmqTask) -> None:
    app.control.revoke("an-id", terminate=True, signal="KILL")

    (kept,) = orders(app)
    assert kept.keys() == {"task_id", "kept", "at"}
    assert kept["task_id"] == "an-id"


def test_a_worker_that_is_there_learns_it_over_the_journal_alone(app: AmqTask) -> None:
    result_id = str(uuid.uuid4())
    kept = app.runtime.kept_revokes(app.publisher)
    assert kept is not None
    with start_worker(app):
        assert_runs(app)
        kept.keep("revoke", {"task_id": [result_id]})
        kept.keep("revoke", {"task_id": ["last"]})
        while "last" not in (next(iter((app.control.inspect().revoked() or {"": []}).values()))):
            pass
        result = app.tasks["kept.add"].apply_async((1, 1), task_id=result_id)
        with pytest.raises(TaskRevokedError):
            result.get(timeout=60)


def test_what_celery_s_program_revokes_is_written_down_by_a_worker(app: AmqTask) -> None:
    result_id = str(uuid.uuid4())
    message = command_message(Command("revoke", {"task_id": [result_id], "terminate": False, "signal": None}))
    message.mandatory = False
    with start_worker(app):
        assert_runs(app)
        app.publisher.publish(message)
        app.control.inspect().ping()
    # A worker that stops writes down what it has still to write.
    assert [kept["task_id"] for kept in orders(app)] == [[result_id]]

    result = app.tasks["kept.add"].apply_async((1, 1), task_id=result_id)
    with start_worker(app), pytest.raises(TaskRevokedError):
        result.get(timeout=60)


def test_a_broker_without_streams_is_said_once_and_all_goes_on(
    app: AmqTask, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PublishError("declaring queue 'amqtask.cancel' failed: 406 feature flag 'stream_queue' is disabled")

    for writer in ("StreamJournal", "QueueTail"):
        monkeypatch.setattr(f"amqtask.transport.admin.{writer}.write", refuse)
    with caplog.at_level(logging.WARNING), start_worker(app):
        assert_runs(app)
        app.control.revoke("an-id")
        app.control.revoke("another")
    for text in ("revokes are not kept", "a revoke is not kept from here"):
        assert sum(text in record.getMessage() for record in caplog.records) == 1


def test_a_revoke_that_cannot_be_kept_now_is_an_error_and_reaches_those_who_hear_it(
    app: AmqTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    result_id = str(uuid.uuid4())
    with start_worker(app):
        assert_runs(app)
        with monkeypatch.context() as patch:
            patch.setattr("amqtask.transport.admin.StreamJournal.write", _away)
            with pytest.raises(PublishError, match="is away"):
                app.control.revoke(result_id)
        app.control.inspect().ping()

    assert [kept["task_id"] for kept in orders(app)] == [result_id]


def _away(*_: object) -> None:
    raise PublishRefused(f"queue {JOURNAL!r} is away")


HOSTILE = [
    b"\xff no json",
    b"[1, 2]",
    b"[" * 100_000,
    b'{"method": 5}',
    b'{"method": "revoke"}',
    b'{"method": "revoke", "arguments": [1]}',
    b'{"method": "revoke", "arguments": {"task_id": 5}}',
    b'{"method": "revoke", "arguments": {"task_id": {"a": [null, {}]}, "tree": [1]}}',
    b'{"method": "revoke", "arguments": {"task_id": ["a"], "at": 1' + b"0" * 400 + b"}}",
    b'{"method": "revoke", "arguments": {"task_id": ["b"], "at": NaN, "cancel": true, "tree": true}}',
    b'{"method": "revoke", "arguments": {"task_id": ["c"], "at": -1e999}}',
    b'{"method": "revoke", "arguments": {"task_id": ["d", "\\ud800"], "at": "x"}}',
    b'{"method": "revoke_by_stamped_headers", "arguments": {"headers": {"n": [[1], {}, "v"]}}}',
    b'{"method": "mark", "arguments": {"name": {}}}',
]


def test_entries_that_anybody_wrote_keep_no_worker_from_the_others(
    app: AmqTask, caplog: pytest.LogCaptureFixture
) -> None:
    kept = app.runtime.kept_revokes(app.publisher)
    assert kept is not None
    queue = Queue(JOURNAL)
    kept.keep("revoke", {"task_id": ["first"]})
    for body in HOSTILE:
        app.publisher.publish(Message(body, Properties(content_type="application/json"), "", queue.name))
    revoked = app.tasks["kept.add"].delay(1, 1)
    revoked.revoke()

    with start_worker(app):
        with pytest.raises(TaskRevokedError):
            revoked.get(timeout=60)
        assert_runs(app)
        later = app.tasks["kept.add"].apply_async((1, 1), task_id="b")
        with pytest.raises(TaskRevokedError):
            later.get(timeout=60)
        (known,) = (app.control.inspect().revoked() or {}).values()
        assert {"first", "a", "b", "c"} <= set(known)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_an_order_that_is_none_is_heard_and_what_comes_after_is_kept(app: AmqTask) -> None:
    with start_worker(app):
        assert_runs(app)
        for task_id in (5, ["an-id"]):
            message = command_message(Command("revoke", {"task_id": task_id}))
            message.mandatory = False
            app.publisher.publish(message)
        app.control.inspect().ping()
    assert [kept["task_id"] for kept in orders(app)] == [["an-id"]]


def test_a_queue_in_the_place_of_the_stream_is_said_and_nothing_is_taken_from_it(
    app: AmqTask, caplog: pytest.LogCaptureFixture
) -> None:
    queue = Queue(JOURNAL, queue_arguments={"x-queue-type": "quorum"})
    app.publisher.publish(Message(b"{}", Properties(content_type="application/json"), "", queue.name, (queue,)))
    app.tasks["kept.add"].delay(1, 1).revoke()

    with caplog.at_level(logging.WARNING), start_worker(app):
        assert_runs(app)
    assert sum("is no stream; delete it" in record.getMessage() for record in caplog.records) == 1
    assert memory(app).messages(JOURNAL)[0][1] == b"{}"


def test_no_more_is_kept_than_can_be_read_before_the_first_task(app: AmqTask) -> None:
    kept = app.runtime.kept_revokes(app.publisher)
    assert kept is not None
    for number in range(25):
        kept.keep("revoke", {"task_id": [f"{number} {'x' * 1_000_000}"]})

    first = orders(app)[0]["task_id"][0]
    assert 5 <= int(first.partition(" ")[0]) <= 7


def test_it_can_be_turned_off(app: AmqTask) -> None:
    app.conf.revoke_max_age = 0
    result = app.tasks["kept.add"].delay(1, 1)
    result.revoke()

    with start_worker(app):
        assert result.get(timeout=60) == 2
    assert JOURNAL not in memory(app).queue_names()

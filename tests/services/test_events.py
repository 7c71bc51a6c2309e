"""The event sender: Celery's events, never in the way of the tasks."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest

from amqtask import signals, states
from amqtask.events.dispatcher import LamportClock
from amqtask.exceptions import PublishError
from amqtask.execution.request import Answer
from amqtask.protocol.event import read_events
from amqtask.protocol.message import Message, Properties
from amqtask.protocol.serialization import content_types
from amqtask.services import events
from amqtask.services.events import EventSender
from tests.worker.bench import Bench, FakeTask
from tests.worker.fakes import HandPublisher


class Watched:
    """A worker whose events the test reads."""

    def __init__(
        self,
        *,
        slots: int = 2,
        task_events: bool = True,
        heartbeat: float | None = None,
        sent_events: bool = False,
        serializer: str = "json",
    ) -> None:
        self.bench = Bench(slots=slots)
        self.publisher = HandPublisher()
        self.made = 0
        self.sender = EventSender(
            self.bench.worker,
            clock=LamportClock(),
            make_publisher=self.make_publisher,
            exchange="celeryev",
            serializer=serializer,
            task_events=task_events,
            sent_events=sent_events,
            heartbeat=heartbeat,
            wall_clock=lambda: self.bench.loop.now,
        )
        self.sender.start()

    def make_publisher(self) -> HandPublisher:
        self.made += 1
        return self.publisher

    @property
    def messages(self) -> list[Any]:
        self.bench.loop.advance(0.1)
        return [json.loads(message.body) for message in self.publisher.sent]

    @property
    def events(self) -> list[dict[str, Any]]:
        return [event for body in self.messages for event in (body if isinstance(body, list) else [body])]

    @property
    def types(self) -> list[str]:
        return [event["type"] for event in self.events]


def test_a_task_that_succeeds_is_told_from_its_start_to_its_end() -> None:
    watched = Watched()
    watched.bench.deliver(
        "a",
        argsrepr="(1,)",
        kwargsrepr="{}",
        root_id="r",
        parent_id="p",
        retries=1,
        expires="2100-01-01T00:00:00+00:00",
    )
    watched.bench.end("a", summary="3", runtime=0.25)

    received, started, succeeded = watched.events

    assert {
        key: received[key] for key in ("type", "uuid", "name", "args", "kwargs", "root_id", "parent_id", "retries")
    } == {
        "type": "task-received",
        "uuid": "a",
        "name": "t",
        "args": "(1,)",
        "kwargs": "{}",
        "root_id": "r",
        "parent_id": "p",
        "retries": 1,
    }
    assert (received["eta"], received["expires"]) == (None, "2100-01-01T00:00:00+00:00")
    assert (started["type"], started["uuid"]) == ("task-started", "a")
    assert (succeeded["type"], succeeded["result"], succeeded["runtime"]) == ("task-succeeded", "3", 0.25)
    assert all(event["hostname"] == "w@h" and event["timestamp"] >= 1000.0 and event["pid"] for event in watched.events)
    assert [event["clock"] for event in watched.events] == [1, 2, 3]


def test_events_of_tasks_go_together_in_one_transient_message() -> None:
    watched = Watched()
    watched.bench.deliver("a", "b")

    assert len(watched.messages) == 1
    (message,) = watched.publisher.sent
    assert (message.exchange, message.routing_key) == ("celeryev", "task.multi")
    assert message.properties.delivery_mode == 1
    assert message.properties.headers == {"hostname": "w@h"}


@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        (
            {"state": states.FAILURE, "summary": "ValueError('x')", "traceback": "Traceback …"},
            [{"type": "task-failed", "exception": "ValueError('x')", "traceback": "Traceback …"}],
        ),
        (
            {"state": states.RETRY, "summary": "Retry in 1s: ValueError('x')", "reason": "ValueError('x')"},
            [{"type": "task-retried", "exception": "ValueError('x')"}],
        ),
        (
            {"state": states.REVOKED, "reason": "terminated"},
            [{"type": "task-revoked", "terminated": True, "expired": False}],
        ),
        ({"state": states.REJECTED, "answer": Answer.REQUEUE}, [{"type": "task-rejected", "requeue": True}]),
        (
            {"state": states.REJECTED, "answer": Answer.DEAD_LETTER, "summary": "Reject('no')"},
            [{"type": "task-failed", "exception": "Reject('no')"}, {"type": "task-rejected", "requeue": False}],
        ),
        ({"state": states.IGNORED}, []),
        ({"state": states.SUCCESS}, [{"type": "task-succeeded", "result": None}]),
    ],
)
def test_each_end_has_its_event(outcome: dict[str, Any], told: list[dict[str, Any]]) -> None:
    watched = Watched()
    watched.bench.deliver("a")
    watched.bench.end("a", **outcome)

    ends = watched.events[2:]

    assert [{key: event[key] for key in wanted} for event, wanted in zip(ends, told, strict=True)] == told


@pytest.mark.parametrize("sent_events", [True, False])
def test_what_follows_from_a_task_is_told_as_sent_where_that_is_asked_for(sent_events: bool) -> None:
    watched = Watched(sent_events=sent_events)
    watched.bench.deliver("a")
    again = Message(b"", Properties(headers={"id": "a", "task": "t", "retries": 1}), "", "q")
    other = Message(b"", Properties(headers={}), "", "q")
    watched.bench.end("a", state=states.RETRY, publish=(again, other))

    assert watched.types[2:] == (["task-sent", "task-retried"] if sent_events else ["task-retried"])


def test_a_task_that_is_revoked_or_expired_before_it_runs_is_told() -> None:
    watched = Watched()
    watched.bench.worker.revoked.add(["a"], 1000.0)
    watched.bench.deliver("a")
    watched.bench.deliver("b", expires="2000-01-01T00:00:00+00:00")

    revoked, expired = (event for event in watched.events if event["type"] == "task-revoked")

    assert (revoked["uuid"], revoked["terminated"], revoked["expired"]) == ("a", False, False)
    assert (expired["uuid"], expired["terminated"], expired["expired"]) == ("b", False, True)


@pytest.mark.parametrize(("asked", "told"), [(signal.SIGKILL, 9), (None, 15)])
def test_a_task_that_is_terminated_is_told_with_the_signal(asked: int | None, told: int) -> None:
    watched = Watched()
    watched.bench.pool.can_terminate = True
    watched.bench.deliver("a")
    watched.bench.operations.terminate(lambda request: request.id == "a", asked)

    revoked = watched.events[-1]

    assert (revoked["type"], revoked["terminated"], revoked["signum"]) == ("task-revoked", True, told)


def test_tasks_that_a_cold_shutdown_ends_are_told() -> None:
    watched = Watched()
    watched.bench.deliver("a")
    watched.bench.worker.abandon()

    assert watched.types == ["task-received", "task-started", "task-cancelled"]


def test_a_task_that_could_not_be_terminated_says_nothing_of_a_signal() -> None:
    watched = Watched()
    watched.bench.deliver("a")
    watched.bench.operations.terminate(lambda request: request.id == "a", signal.SIGKILL)
    watched.bench.end("a", summary="3", runtime=0.25)

    assert watched.types[-1] == "task-succeeded"
    assert "signum" not in watched.events[-1]


def test_an_unknown_task_fails() -> None:
    watched = Watched()
    watched.bench.deliver("a", task="nobody")

    assert watched.types == ["task-received", "task-failed"]


def test_a_message_that_is_no_task_has_no_event() -> None:
    watched = Watched()
    watched.bench.deliver("a", task=None, body=b"nonsense")

    assert watched.types == []


def test_tasks_with_send_events_off_are_not_told() -> None:
    watched = Watched(task_events=False)
    quiet: Any = FakeTask()
    quiet.send_events = False
    watched.bench.worker.setup.tasks["quiet"] = quiet  # type: ignore[index] # a dict in this test
    watched.sender.enable()
    watched.bench.deliver("a", task="quiet")
    watched.bench.deliver("b")

    assert {event["uuid"] for event in watched.events} == {"b"}


def test_without_task_events_and_heartbeats_there_is_not_even_a_connection() -> None:
    watched = Watched(task_events=False)
    watched.bench.deliver("a")
    watched.bench.end("a")

    assert watched.messages == []
    assert watched.made == 0
    watched.sender.stop()
    assert watched.made == 0


def test_a_worker_comes_lives_and_goes() -> None:
    watched = Watched(task_events=False, heartbeat=2.0)
    watched.publisher.confirm_all()
    watched.bench.deliver("a", "b")
    watched.bench.end("a")
    watched.bench.loop.advance(2.0)
    watched.sender.stop()
    watched.sender.stop()

    online, heartbeat, offline = watched.events

    assert [event["type"] for event in (online, heartbeat, offline)] == [
        "worker-online",
        "worker-heartbeat",
        "worker-offline",
    ]
    assert (heartbeat["freq"], heartbeat["active"], heartbeat["processed"]) == (2.0, 1, 1)
    assert len(heartbeat["loadavg"]) == 3
    assert heartbeat["sw_ident"] == "py-amqtask"
    assert [message.routing_key for message in watched.publisher.sent] == [
        "worker.online",
        "worker.heartbeat",
        "worker.offline",
    ]


def test_heartbeats_are_signalled() -> None:
    beats: list[Any] = []

    def note(sender: Any, **_: Any) -> None:
        beats.append(sender)

    signals.heartbeat_sent.connect(note)
    try:
        watched = Watched(task_events=False, heartbeat=2.0)
    finally:
        signals.heartbeat_sent.disconnect(note)
    assert beats == [watched.sender]


def test_no_heartbeats_pile_up_while_the_broker_is_away() -> None:
    watched = Watched(task_events=False, heartbeat=2.0)
    watched.bench.loop.advance(60.0)
    assert watched.types == ["worker-online"]

    watched.publisher.confirm_all()
    watched.bench.loop.advance(2.0)

    assert watched.types == ["worker-online", "worker-heartbeat"]


def test_what_waits_goes_out_before_the_worker_is_offline() -> None:
    watched = Watched(heartbeat=2.0)
    watched.bench.deliver("a")
    watched.sender.stop()

    assert watched.types == ["worker-online", "task-received", "task-started", "worker-offline"]


def test_events_that_the_broker_does_not_take_are_bounded_and_the_newest_are_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in {"BATCH": 2, "WINDOW": 1, "MOST_WAITING": 4}.items():
        monkeypatch.setattr(events, name, value)
    watched = Watched(slots=20)
    watched.bench.deliver(*(f"task-{number}" for number in range(10)))

    assert len(watched.messages) == 1
    assert caplog.text.count("does not take events now") == 1
    while watched.publisher.outstanding:
        watched.publisher.confirm()

    assert [event["clock"] for event in watched.events] == [1, 2, 17, 18, 19, 20]
    assert "14 were dropped" in caplog.text


def test_an_exchange_that_must_not_be_used_is_said_once_and_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched()
    for task_id in "abc":
        watched.bench.deliver(task_id)
        watched.bench.end(task_id)
        watched.bench.loop.advance(0.1)
        watched.publisher.confirm(PublishError("access to exchange 'celeryev' refused"))

    assert caplog.text.count("refused") == 1
    assert watched.bench.worker.ended == 3


def test_arguments_that_cannot_be_written_cost_only_themselves(caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched()
    watched.bench.deliver("a", argsrepr=object())
    watched.bench.deliver("b", argsrepr="('ünï\\ud800', \"q\")")

    (first, second) = (event for event in watched.events if event["type"] == "task-received")

    assert (first["uuid"], first["name"], first.get("args")) == ("a", "t", None)
    assert (second["uuid"], second["args"]) == ("b", "('ünï\\ud800', \"q\")")
    assert "task-received of a tells nothing of its arguments" in caplog.text


def test_another_serializer_is_heeded() -> None:
    watched = Watched(serializer="msgpack")
    watched.bench.deliver("a")
    watched.bench.loop.advance(0.1)

    (message,) = watched.publisher.sent
    assert message.properties.content_type == "application/x-msgpack"
    told = read_events(message.body, "application/x-msgpack", "binary", content_types(["msgpack"]))
    assert [event["type"] for event in told] == ["task-received", "task-started"]

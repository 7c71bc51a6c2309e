"""`app.events` on the in-process broker: receivers, one's own events, snapshots; nothing here knows a socket."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import amqtask.events
from amqtask import AmqTask
from amqtask.events import EventReceiver
from amqtask.events.snapshot import Polaroid
from amqtask.exceptions import ConfigurationError
from amqtask.protocol.event import event_exchange
from amqtask.protocol.message import Message, Properties
from amqtask.testing.worker import start_worker


@pytest.fixture
def app() -> Iterator[AmqTask]:
    made = AmqTask(
        "watched",
        broker="memory://",
        backend="cache+memory://",
        set_as_current=False,
        worker_send_task_events=True,
    )
    made.task(name="add")(lambda x, y: x + y)
    yield made
    made.close()


def captured(receiver: EventReceiver, do: Callable[[], object], until: str) -> list[dict[str, Any]]:
    """Events that come from before `do()` until one of a type."""
    found: list[dict[str, Any]] = []
    is_consuming = threading.Event()

    def run() -> None:
        for event in receiver.itercapture(timeout=60.0, wakeup=False):
            found.append(event)
            if event["type"] == "test-start":
                is_consuming.set()
            elif event["type"] == until:
                return

    thread = threading.Thread(target=run)
    thread.start()
    while not is_consuming.wait(0.01):
        receiver.app_says("test-start")  # type: ignore[attr-defined] # put there by `receiver_of`
    do()
    thread.join(60)
    assert not thread.is_alive()
    return [event for event in found if event["type"] != "test-start"]


def receiver_of(app: AmqTask, **options: Any) -> EventReceiver:
    with app.connection() as connection:
        receiver = app.events.Receiver(connection, **options)
    receiver.app_says = app.events.Dispatcher().send  # type: ignore[attr-defined]
    return receiver


def test_handlers_get_the_events_they_are_for(app: AmqTask) -> None:
    special: list[Any] = []
    others: list[Any] = []
    receiver = receiver_of(app, handlers={"task-succeeded": special.append, "*": others.append})

    def work() -> None:
        with start_worker(app):
            assert app.send_task("add", (1, 2)).get(timeout=60) == 3

    events = captured(receiver, work, "worker-offline")

    types = [event["type"] for event in events if event["type"] != "worker-heartbeat"]
    assert types == ["worker-online", "task-received", "task-started", "task-succeeded", "worker-offline"]
    assert [(event["result"], event["local_received"] > 0) for event in special] == [("3", True)]
    assert "task-succeeded" not in [event["type"] for event in others]


def test_a_state_is_fed_by_a_receiver(app: AmqTask) -> None:
    state = app.events.State()
    alive: list[bool] = []

    def take(event: dict[str, Any]) -> None:
        state.event(event)
        alive.extend(worker.alive for worker in state.workers.values())

    receiver = receiver_of(app, handlers={"*": take})

    def work() -> None:
        with start_worker(app):
            app.send_task("add", (1, 2), task_id="sum").get(timeout=60)

    captured(receiver, work, "task-succeeded")

    assert state.tasks["sum"].state == "SUCCESS"
    assert len(state.workers) == 1
    assert any(alive)


def test_bad_messages_are_skipped(app: AmqTask, caplog: pytest.LogCaptureFixture) -> None:
    receiver = receiver_of(app)
    properties = [
        Properties(content_type="application/json", content_encoding="utf-8"),
        Properties(content_type="application/x-python-serialize", content_encoding="binary"),
    ]

    def talk() -> None:
        for each in properties:
            app.publisher.publish(
                Message(b"nonsense", each, "celeryev", "task.sent", (event_exchange(),), mandatory=False)
            )
        app.events.Dispatcher().send("custom-end")

    events = captured(receiver, talk, "custom-end")

    assert [event["type"] for event in events] == ["custom-end"]
    assert caplog.text.count("is skipped") == 2


def test_what_a_handler_raises_ends_the_capture(app: AmqTask) -> None:
    def fail(event: Any) -> None:
        raise LookupError(event["type"])

    receiver = receiver_of(app, handlers={"test-start": fail})
    errors: list[BaseException] = []

    def run() -> None:
        try:
            receiver.capture(wakeup=False)
        except LookupError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while thread.is_alive():
        app.events.Dispatcher().send("test-start")
        thread.join(0.01)
    assert str(errors[0]) == "test-start" or errors[0].args == ("test-start",)


def test_a_limit_a_timeout_and_a_stop_end_the_capture(app: AmqTask) -> None:
    receiver = receiver_of(app)
    with pytest.raises(TimeoutError, match=r"0\.05 s"):
        receiver.capture(timeout=0.05, wakeup=False)
    receiver.capture(limit=0, wakeup=False)
    receiver.should_stop = True
    receiver.capture(wakeup=False)


def test_wakeup_asks_the_workers_for_a_heartbeat(app: AmqTask) -> None:
    with start_worker(app):
        events = receiver_of(app, routing_key="worker.#").itercapture(limit=None, timeout=60.0, wakeup=True)

        # That it is online may come first.
        assert any(event["type"] == "worker-heartbeat" for event in events)


def test_own_events_carry_what_all_events_have(app: AmqTask) -> None:
    def talk() -> None:
        with app.events.default_dispatcher(hostname="me@h") as dispatcher:
            dispatcher.send("custom-thing", answer=42)
            dispatcher.disable()
            dispatcher.send("custom-thing")
        limited = app.events.Dispatcher(groups=["task"])
        limited.send("custom-thing")
        limited.send("task-progress", uuid="a")

    first, second = captured(receiver_of(app), talk, "task-progress")

    assert (first["type"], first["hostname"], first["answer"]) == ("custom-thing", "me@h", 42)
    assert {"timestamp", "pid", "utcoffset", "clock"} <= set(first)
    assert second["hostname"].startswith("gen")


def test_a_task_tells_of_its_progress(app: AmqTask) -> None:
    @app.task(name="slow", bind=True)
    def slow(self: Any) -> None:
        self.send_event("task-progress", percent=50)

    def work() -> None:
        with start_worker(app):
            app.send_task("slow", task_id="s").get(timeout=60)

    progress = captured(receiver_of(app), work, "task-progress")[-1]

    assert (progress["uuid"], progress["percent"]) == ("s", 50)
    assert progress["hostname"].startswith("celery@")


def test_another_librarys_connection_is_refused(app: AmqTask) -> None:
    with pytest.raises(TypeError, match=r"app\.connection\(\)"):
        app.events.Receiver(object())  # type: ignore[arg-type] # that is the point


def test_a_camera_takes_pictures_until_the_end(app: AmqTask) -> None:
    seen: list[int] = []
    taken = threading.Event()

    class Camera(Polaroid):
        clear_after = True

        def on_shutter(self, state: Any) -> None:
            seen.append(state.event_count)
            taken.set()

    state = app.events.State()
    state.event({"type": "worker-online", "hostname": "a"})
    with Camera(state, freq=0.01, app=app):
        assert taken.wait(60)
        state.event({"type": "worker-online", "hostname": "a"})

    assert seen[0] == 1
    assert sum(seen) == 2


def test_a_camera_keeps_its_rate(app: AmqTask) -> None:
    seen: list[int] = []

    class Camera(Polaroid):
        def on_shutter(self, state: Any) -> None:
            seen.append(1)

    camera = Camera(app.events.State(), maxrate="1/h")
    camera.shutter()
    camera.shutter()

    assert seen == [1]
    with pytest.raises(ConfigurationError, match="not a rate"):
        Camera(app.events.State(), maxrate="often")


def test_each_public_name_of_the_package_is_there() -> None:
    assert {name: getattr(amqtask.events, name).__name__ for name in amqtask.events.__all__} == {
        name: name for name in amqtask.events.__all__
    }

"""What health checks, locks and tracing ask of an application, its tasks, settings and workers."""

from __future__ import annotations

import importlib
import json
import pickle
from collections.abc import Iterator
from queue import Empty
from typing import Any

import pytest

from amqtask import AmqTask, Queue, signals
from amqtask.compat import ATTRIBUTES
from amqtask.events import State
from amqtask.exceptions import OperationalError
from amqtask.execution.request import Request
from amqtask.ground.plugins import load_path
from amqtask.remote.control import Control
from amqtask.signals import Signal
from amqtask.testing.worker import start_worker
from amqtask.worker.worker import Worker


@pytest.fixture
def app() -> Iterator[Any]:
    with AmqTask("names", broker="memory://", task_queues=[Queue("a"), Queue("b")], task_default_queue="a") as made:
        yield made


def test_the_queues_are_a_mapping(app: Any) -> None:
    queues = app.amqp.queues

    assert list(queues) == ["a", "b"]
    assert {name: queue.name for name, queue in queues.items()} == {"a": "a", "b": "b"}
    assert app.amqp.default_queue.name == "a"
    queues.deselect("b")
    queues.select_add("c")
    assert list(queues.consume_from) == ["a", "c"]
    assert "a" in queues.format()


def test_the_router_tells_the_queue_of_a_call_as_tests_of_routes_ask_it() -> None:
    app: Any = AmqTask(
        "routed",
        broker="memory://",
        set_as_current=False,
        task_default_queue="a",
        task_routes={"video.*": {"queue": "b", "priority": 3}, "news": {"exchange": "media", "routing_key": "x"}},
    )
    route = app.amqp.router.route

    assert route({}, "tasks.add")["queue"].name == "a"
    assert route({}, "video.cut", args=(1,))["queue"].name == "b"
    assert route({}, "video.cut", (), {}, None)["priority"] == 3
    assert route({"queue": "c", "priority": 5}, "video.cut")["queue"].name == "c"
    assert route({"queue": "c", "priority": 5}, "video.cut")["priority"] == 5
    assert route({}, "news") == {"exchange": "media", "routing_key": "x"}


def test_a_health_check_connects_and_looks_at_a_queue(app: Any) -> None:
    app.send_task("t")

    with app.connection_or_acquire() as connection:
        connection.ensure_connection(max_retries=1)
        assert connection.default_channel.queue_declare("a", passive=True).message_count == 1
        assert connection.SimpleQueue("a").get().payload[0] == []
        with pytest.raises(Empty):
            connection.SimpleQueue("a").get_nowait()
    with app.connection_or_acquire(connection) as same:
        assert same is connection


def test_a_health_check_is_told_that_no_broker_answers() -> None:
    away: Any = AmqTask("away", broker="amqp://127.0.0.1:9//", set_as_current=False)

    with pytest.raises(OperationalError):
        away.connection().ensure_connection(max_retries=0)


def test_a_producer_publishes_what_is_no_task(app: Any) -> None:
    with app.producer_pool.acquire(block=True) as producer:
        producer.publish({"x": 1}, routing_key="b", declare=[Queue("b")], headers={"h": 2}, priority=3)
    with app.producer_or_acquire() as producer:
        producer.publish("plain", routing_key="b", content_type="text/plain", content_encoding="utf-8")

    (first, body), (second, text) = app.memory_broker.messages("b")
    assert (json.loads(body), first.headers, first.priority) == ({"x": 1}, {"h": 2}, 3)
    assert (text, second.content_type) == (b"plain", "text/plain")


def test_a_task_s_request_can_be_pushed(app: Any) -> None:
    def identify(self: Any) -> Any:
        return self.request.id

    work = app.task(bind=True)(identify)

    work.push_request(id="one", retries=2)
    try:
        assert (work(), work.request.retries, work.request_stack.top.id) == ("one", 2, "one")
    finally:
        work.pop_request()
    assert (work(), work.request_stack.top) == (None, None)
    assert work._get_app() is app


def test_settings_are_found_by_parts_of_their_names(app: Any) -> None:
    assert app.conf.find_value_for_key("default_queue", "task") == "a"
    assert app.conf.find_value_for_key("broker_url") == "memory://"
    assert app.conf.get_by_parts("task", "default", "queue") == "a"
    assert app.conf.first("nothing", "TASK_DEFAULT_QUEUE") == "a"
    app.conf.add_defaults({"redbeat_lock_timeout": 3, "task_default_queue": "not this"})
    assert (app.conf.redbeat_lock_timeout, app.conf.task_default_queue) == (3, "a")
    assert app.conf.find_option("default_queue", "task").default == "amqtask"
    app.conf.clear()
    assert not hasattr(app.conf, "redbeat_lock_timeout")


def test_signals_of_workers_tell_the_application_and_the_name(app: Any) -> None:
    told: list[Any] = []

    def note(sender: Any, **_: Any) -> None:
        told.append((sender.app, sender.hostname))

    signals.worker_ready.connect(note)
    try:
        with start_worker(app):
            pass
    finally:
        signals.worker_ready.disconnect(note)

    ((seen, hostname),) = told
    assert seen is app
    assert "@" in hostname


def test_inspect_is_a_class() -> None:
    app: Any = AmqTask("asked", broker="amqp://127.0.0.1:9//", set_as_current=False)

    class Mine(app.control.inspect):  # type: ignore[misc]
        def ping(self, destination: Any = None) -> Any:
            return {"w": {"ok": "pong"}}

    assert Mine(timeout=3).ping() == {"w": {"ok": "pong"}}
    assert isinstance(app.control.inspect(), app.control.inspect)
    assert isinstance(app.control, Control)


def test_what_nobody_has_is_still_an_attribute_error(app: Any) -> None:
    with pytest.raises(AttributeError, match="'AmqTask' object has no attribute 'nothing'"):
        _ = app.nothing


def test_the_tasks_of_the_current_application_are_in_the_registry(app: Any) -> None:
    task = app.task(name="mine")(lambda: None)
    registry = importlib.import_module("amqtask.registry")

    assert registry.tasks.get("mine") is task
    assert "celery.backend_cleanup" in registry.tasks
    app.tasks["yours"] = task
    assert registry.tasks["yours"] is task


def test_receivers_of_a_publish_see_the_exchange_of_each_queue(app: Any) -> None:
    told: list[Any] = []

    def note(declare: Any, **_: Any) -> None:
        told.extend((queue.name, queue.exchange.type) for queue in declare)

    signals.before_task_publish.connect(note)
    try:
        app.send_task("t")
    finally:
        signals.before_task_publish.disconnect(note)

    assert ("a", "direct") in told


def test_a_monitor_s_state_can_be_kept_in_a_file() -> None:
    state = State(callback=lambda *_: None, max_tasks_in_memory=3)
    state.event({"type": "task-received", "uuid": "one", "hostname": "w", "timestamp": 1.0, "name": "t"})

    kept = pickle.loads(pickle.dumps(state))
    kept.event({"type": "task-received", "uuid": "two", "hostname": "w", "timestamp": 2.0, "name": "t"})

    assert list(kept.tasks) == ["one", "two"]
    assert kept.tasks.limit == 3


def test_a_worker_and_a_beat_are_started_by_hand(app: Any) -> None:
    worker = app.Worker(app=app, pool="solo", concurrency=1, hostname="by@hand", queues="a,b", of_mine=1)
    worker.loop.close()

    assert (worker.hostname, [queue.name for queue in worker.queues]) == ("by@hand", ["a", "b"])
    assert callable(app.Beat(max_interval=1).run)


def test_results_over_rpc_work_on_the_in_memory_broker() -> None:
    with AmqTask("rpc", broker="memory:///", backend="rpc") as app:
        task = app.task(name="one")(lambda: 1)
        with start_worker(app):
            assert task.delay().get(timeout=60) == 1


def test_what_failed_is_told_as_billiard_s_exception_info(app: Any) -> None:
    told: list[Any] = []

    def note(einfo: Any, **_: Any) -> None:
        told.append(einfo)

    def fail() -> None:
        raise ValueError("no")

    task = app.task(name="fails")(fail)
    signals.task_failure.connect(note)
    try:
        task.apply()
    finally:
        signals.task_failure.disconnect(note)

    (einfo,) = told
    assert isinstance(einfo, importlib.import_module("billiard.einfo").ExceptionInfo)
    assert einfo.exc_info[:2] == (ValueError, einfo.exception)
    assert str(pickle.loads(pickle.dumps(einfo))) == str(einfo)
    assert einfo.tb is einfo.exception.__traceback__


def test_no_result_store_is_a_disabled_one() -> None:
    disabled = importlib.import_module("amqtask.backends.base").DisabledBackend

    assert isinstance(AmqTask("none", broker="memory://", set_as_current=False).backend, disabled)
    with AmqTask("some", broker="memory://", backend="cache+memory://", set_as_current=False) as app:
        assert not isinstance(app.backend, disabled)


def test_an_application_takes_what_celery_s_is_made_with() -> None:
    made = AmqTask(
        "made",
        loader="default",
        fixups=[],
        autofinalize=True,
        changes={"task_default_queue": "q"},
        set_as_current=False,
    )

    assert made.conf.task_default_queue == "q"
    assert made.conf.unknown_names() == {}


@pytest.mark.parametrize("listing", [Request, Signal, Worker])
def test_a_class_that_lists_names_of_celery_lists_all_that_there_are(listing: type) -> None:
    elsewhere = load_path(ATTRIBUTES[f"{listing.__module__}.{listing.__name__}"])

    assert {name for name in vars(elsewhere) if not name.startswith("__")} <= vars(listing).keys()

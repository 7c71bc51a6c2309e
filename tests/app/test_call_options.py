"""What a call's message takes from the call's options, the task's, and the settings."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from amqtask import AmqTask, Exchange, Queue, Task
from amqtask.exceptions import WrongValue
from amqtask.testing.worker import start_worker


def make_app(**settings: Any) -> AmqTask:
    return AmqTask("options", broker="memory://", set_as_current=False, task_default_queue="options", **settings)


def one_message(app: AmqTask) -> Any:
    """The properties of the only message."""
    assert app.memory_broker is not None
    [(properties, _)] = app.memory_broker.messages("options")
    return properties


@pytest.mark.parametrize(
    ("of_setting", "of_task", "of_call", "used"),
    [(None, None, None, 2), (1, None, None, 1), (1, 2, None, 2), (2, 1, None, 1), (1, 1, 2, 2)],
)
def test_a_delivery_mode_is_the_call_s_else_the_task_s_else_the_setting_s(
    of_setting: int | None, of_task: int | None, of_call: int | None, used: int
) -> None:
    with make_app(task_default_delivery_mode=of_setting) as app:
        task = app.task(name="t", delivery_mode=of_task)(lambda: None)
        options: dict[str, Any] = {} if of_call is None else {"delivery_mode": of_call}
        task.apply_async(**options)

        assert one_message(app).delivery_mode == used


def test_the_setting_is_also_for_tasks_that_are_not_here() -> None:
    with make_app(task_default_delivery_mode=1) as app:
        app.send_task("elsewhere")

        assert one_message(app).delivery_mode == 1


def test_a_call_may_give_the_options_of_its_task_s_class() -> None:
    class Once(Task[..., Any]):
        once: dict[str, Any] = {}  # noqa: RUF012

    with make_app() as app:
        task: Any = app.task(name="t", base=Once)(lambda: None)
        task.apply_async(once={"timeout": 3})

        assert "once" not in one_message(app).headers
        for name in ("ones", "max_retries"):
            with pytest.raises(TypeError, match=f"no option '{name}'"):
                task.apply_async(**{name: 3})


def test_a_task_sees_the_properties_that_its_call_was_given() -> None:
    with make_app(result_backend="cache+memory://") as app:
        task = app.task(name="t", bind=True)(lambda self: self.request.properties)
        with start_worker(app):
            given = task.apply_async(app_id="1234", message_id="m").get(60)
            plain = task.delay().get(60)

    assert (given["app_id"], given["message_id"], given["content_type"]) == ("1234", "m", "application/json")
    assert plain.keys() == {"correlation_id", "reply_to", "content_type", "content_encoding", "priority", "message_id"}


def test_a_task_may_hand_its_headers_on_to_what_it_calls() -> None:
    with make_app(result_backend="cache+memory://") as app:
        child = app.task(name="child", bind=True)(lambda self: (self.name, self.request.id, self.request.headers))

        def call_child(self: Any) -> str:
            return child.apply_async(task_id="of-child", headers=self.request.headers).id

        parent = app.task(name="parent", bind=True)(call_child)
        with start_worker(app, pool="threads"):
            child_id = parent.apply_async(headers={"tenant": "acme"}).get(60)
            found = app.AsyncResult(child_id).get(60)

    assert found == ["child", "of-child", {"tenant": "acme"}]


def test_a_queue_is_made_with_kombu_s_names() -> None:
    queue = Queue(
        "jobs",
        "jobs",
        "key",
        queue_arguments={"x-queue-type": "classic"},
        max_priority=5,
        message_ttl=1.5,
        expires=60,
        max_length=9,
    )

    assert queue.exchange == Exchange("jobs")
    assert queue.queue_arguments == {
        "x-queue-type": "classic", "x-max-priority": 5, "x-message-ttl": 1500, "x-expires": 60000, "x-max-length": 9,
    }  # fmt: skip
    assert Queue("jobs", arguments={"b": 1, "a": 2}) == Queue("jobs", queue_arguments={"a": 2, "b": 1})
    assert replace(queue, durable=False).queue_arguments == queue.queue_arguments
    assert Exchange("jobs", type="topic", delivery_mode=1) == Exchange("jobs", "topic")


def kombu_exchange(name: str, kind: str = "direct") -> Any:
    return SimpleNamespace(name=name, type=kind, durable=True)


def kombu_queue(name: str, exchange: Any, key: str, **more: Any) -> Any:
    """An object with a kombu.Queue's attributes."""
    fields: dict[str, Any] = {
        "durable": True,
        "exclusive": False,
        "auto_delete": False,
        "queue_arguments": None,
        "bindings": (),
    }
    return SimpleNamespace(name=name, exchange=exchange, routing_key=key, **{**fields, **more})


def test_queues_and_exchanges_of_kombu_are_taken_by_settings_and_calls() -> None:
    media = kombu_exchange("media", "topic")
    bound = [SimpleNamespace(exchange=media, routing_key=key) for key in ("x", "y")]
    queues = [kombu_queue("a", media, "a.#", max_priority=3), kombu_queue("b", None, "", bindings=bound)]
    with make_app(task_queues=queues) as app:
        app.send_task("t", queue=kombu_queue("c", kombu_exchange("c"), "c"))
        for name in ("a", "b"):
            app.send_task("t", queue=name)  # which declares it
        app.send_task("t", exchange=media, routing_key="a.1")
        app.send_task("t", exchange=media, routing_key="y")

        assert app.memory_broker is not None
        assert [len(app.memory_broker.messages(name)) for name in ("a", "b", "c")] == [2, 2, 1]
        assert app.queues["a"].queue_arguments["x-max-priority"] == 3
        with pytest.raises(WrongValue, match="queue wants the name of a queue, or a Queue"):
            app.send_task("t", queue=SimpleNamespace(name="d"))

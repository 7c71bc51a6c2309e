"""What a call's message takes from the call's options, the task's, and the settings."""

from __future__ import annotations

from typing import Any

import pytest

from amqtask import AmqTask, Task
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
    assert plain.keys() == {"correlation_id", "reply_to", "content_type", "content_encoding", "priority"}


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

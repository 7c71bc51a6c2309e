"""What programs for Celery import and set, beside tasks and calls."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest

import amqtask
from amqtask import AmqTask, Task, current_app, current_task
from amqtask.ground import current
from amqtask.testing.worker import start_worker


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Iterator[AmqTask]:
    monkeypatch.setattr(current, "_default", [])
    monkeypatch.delenv("AMQTASK_BROKER_URL", raising=False)
    monkeypatch.delenv("CELERY_BROKER_URL", raising=False)
    made = AmqTask("shop", broker="memory://", backend="cache+memory://")
    yield made
    made.close()


def test_the_current_application_is_used_as_one_or_asked_for(app: AmqTask) -> None:
    app.task(name="add")(lambda x, y: x + y)

    assert current_app() is app
    assert current_app.conf is app.conf
    with start_worker(app):
        assert current_app.send_task("add", (1, 2)).get(timeout=60) == 3


@pytest.mark.usefixtures("app")
def test_without_an_application_there_is_a_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(current, "_default", [])

    assert current_app.main == "default"
    assert current_app.conf.task_default_queue == "amqtask"
    made = AmqTask("mine")
    assert current_app() is made


def test_the_current_task_is_the_one_that_runs(app: AmqTask) -> None:
    @app.task(name="who")
    def who() -> list[Any]:
        return [bool(current_task), current_task.name, current_task.request.id]

    with start_worker(app):
        sent = who.delay()
        assert sent.get(timeout=60) == [True, "who", sent.id]
    assert not current_task
    with pytest.raises(AttributeError, match="no task runs here"):
        _ = current_task.request


def test_the_application_has_a_class_of_tasks_that_may_be_replaced(app: AmqTask) -> None:
    class Loud(app.Task):  # type: ignore[misc, name-defined]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return f"{self.run(*args, **kwargs)}!"

    before = app.task(name="before")(lambda: "quiet")
    app.Task = Loud
    after = app.task(name="after")(lambda: "loud")

    assert issubclass(Loud, Task)
    with start_worker(app):
        assert (before.delay().get(timeout=60), after.delay().get(timeout=60)) == ("quiet", "loud!")


def test_an_id_for_a_task_is_made_as_in_celery() -> None:
    assert len({amqtask.uuid(), amqtask.uuid()}) == 2
    assert len(amqtask.uuid()) == 36


def test_a_configuration_with_other_things_in_it_can_be_given_whole(app: AmqTask) -> None:
    app.conf.update({"DEBUG": True, "SECRET_KEY": "s", "CELERY_TIMEZONE": "Asia/Shanghai", "task_default_queue": "q"})

    assert (app.conf.timezone, app.conf.task_default_queue) == ("Asia/Shanghai", "q")
    assert app.conf.DEBUG is True
    assert app.conf.unknown_names() == {}
    app.conf.update({"CELERY_TIMEZNOE": "x", "timezoen": "x", "BROKER_ULR": "x"})
    assert app.conf.unknown_names() == {
        "CELERY_TIMEZNOE": "timezone",
        "timezoen": "timezone",
        "BROKER_ULR": "broker_url",
    }


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"BROKER_HOST": "rabbit"}, "amqp://guest:**@rabbit:5672//"),
        (
            {
                "BROKER_HOST": "r",
                "BROKER_PORT": 5673,
                "BROKER_USER": "me",
                "BROKER_PASSWORD": "p@/",
                "BROKER_VHOST": "a/b",
            },
            "amqp://me:**@r:5673/a/b",
        ),
        ({"BROKER_HOST": "r", "BROKER_URL": "amqp://u:p@wins//"}, "amqp://u:**@wins:5672//"),
    ],
)
@pytest.mark.usefixtures("app")
def test_a_broker_in_parts_is_found(settings: dict[str, Any], name: str) -> None:
    found = AmqTask("old", config_source=settings, set_as_current=False)

    assert found.broker_name == name


def test_a_task_has_the_name_of_its_function_for_decorators_above_it() -> None:
    app = AmqTask("named", broker="memory://", set_as_current=False)

    def work() -> None:
        """Works."""

    class Job(Task[..., Any]):
        name = "job"

    task = app.task(work)

    @functools.wraps(task)
    def above() -> None:
        task()

    assert (task.__name__, above.__name__, above.__doc__) == ("work", "work", "Works.")
    assert above.__qualname__ == work.__qualname__
    assert app.register_task(Job()).__name__ == "Job"

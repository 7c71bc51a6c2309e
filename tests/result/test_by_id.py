"""A result made from an id that came from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from amqtask import AmqTask
from amqtask.exceptions import BackendNotConfigured
from amqtask.ground import current
from amqtask.result import AsyncResult
from amqtask.testing.worker import start_worker


@pytest.fixture
def app() -> Iterator[AmqTask]:
    made = AmqTask("shop", broker="memory://", backend="cache+memory://", set_as_current=False)
    made.task(name="add")(lambda x, y: x + y)
    yield made
    made.close()


def test_an_application_says_where_the_result_is(app: AmqTask) -> None:
    with start_worker(app):
        sent = app.tasks["add"].delay(2, 2)
        sent.get(timeout=60)

    assert AsyncResult(id=sent.id, app=app).get(timeout=60) == 4
    assert AsyncResult(sent.id, app=app).successful()


def test_a_task_stands_for_its_application(app: AmqTask) -> None:
    with start_worker(app):
        sent = app.tasks["add"].delay(2, 2)
        sent.get(timeout=60)

    assert AsyncResult(id=sent.id, app=app.tasks["add"]).get(timeout=60) == 4


def test_without_an_application_the_current_one_is_asked(app: AmqTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(current, "_default", [app])

    assert AsyncResult("from-elsewhere").state == "PENDING"


def test_an_application_that_keeps_no_results_is_named() -> None:
    app = AmqTask("shop", broker="memory://", set_as_current=False)

    with pytest.raises(BackendNotConfigured, match="set result_backend"):
        AsyncResult("from-elsewhere", app=app).get(timeout=1)


def test_what_is_no_application_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="is an application or a task of one, not 'tasks'"):
        AsyncResult("from-elsewhere", app="tasks")

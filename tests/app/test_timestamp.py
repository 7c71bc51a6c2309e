"""Messages say when they were published if the app wants it, and a retry has a time of its own."""

from __future__ import annotations

import time
from typing import Any

from amqtask import AmqTask
from amqtask.testing.worker import start_worker


def make_app(**settings: Any) -> AmqTask:
    return AmqTask("timed", broker="memory://", backend="cache+memory://", set_as_current=False, **settings)


def headers_of_one(app: AmqTask) -> dict[str, Any]:
    """The headers of the message of one call."""
    with app:
        app.send_task("t", queue="timed")
        assert app.memory_broker is not None
        [(properties, _)] = app.memory_broker.messages("timed")
        return dict(properties.headers)


def test_a_message_says_nothing_about_the_time_by_default() -> None:
    assert "timestamp_in_ms" not in headers_of_one(make_app())


def test_a_message_says_when_it_was_published() -> None:
    before = int(time.time() * 1000)

    assert before <= headers_of_one(make_app(task_send_timestamp=True))["timestamp_in_ms"] <= time.time() * 1000


def test_a_retry_does_not_keep_the_time_of_the_first_try() -> None:
    app, seen = make_app(), []

    @app.task(name="timed.again", bind=True, default_retry_delay=0)
    def again(self: Any) -> None:
        seen.append(self.request.get("timestamp_in_ms"))
        if not self.request.retries:
            raise self.retry()

    with app, start_worker(app):
        again.apply_async(headers={"timestamp_in_ms": 5}).get(timeout=60)

    assert seen == [5, None]

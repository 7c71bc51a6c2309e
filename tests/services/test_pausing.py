"""What others may write where the broker keeps which queues are paused."""

from __future__ import annotations

import pytest

from amqtask import AmqTask
from amqtask.remote.pauses import NOTE
from amqtask.testing.worker import start_worker

NOTES = [
    "garbage", "[]", "[" * 100_000, '{"paused": 5}', '{"paused": {"other": 5}}', '{"paused": {"other": {"since": 1e400}}}',
    '{"paused": {"other": {"since": "x", "by": [1]}}}',
]  # fmt: skip


@pytest.fixture
def app() -> AmqTask:
    return AmqTask("paused", broker="memory://", backend="cache+memory://", set_as_current=False)


@pytest.mark.parametrize("written", NOTES, ids=range(len(NOTES)))
def test_a_note_of_somebody_else_keeps_no_worker_waiting(app: AmqTask, written: str) -> None:
    add = app.task(name="add")(lambda: 1)
    app.broker.note(NOTE).write(written)

    with start_worker(app):
        assert add.delay().get(timeout=30) == 1


def test_a_pause_of_any_time_is_shown_and_holds(app: AmqTask) -> None:
    app.broker.note(NOTE).write('{"paused": {"mail": {"since": -1e300, "by": "ann"}}}')

    (pause,) = app.control.pauses.read().values()
    assert (pause.queue, pause.by, pause.began.year) == ("mail", "ann", 1970)

"""What others may write where the broker keeps which queues are paused."""

from __future__ import annotations

import time

import pytest

from amqtask import AmqTask
from amqtask.remote.kept import NOTE
from amqtask.testing.worker import start_worker
from tests.worker.bench import Bench

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


def test_paused_queues_of_others_take_a_worker_no_time() -> None:
    """It grew with the square of their number, on the worker's loop, whoever had written them."""
    bench = Bench()
    others = frozenset(f"other{number}" for number in range(10_000))
    started = time.process_time()

    bench.operations.keep_paused(others | {"q"})
    assert list(bench.worker.consumed) == []
    assert bench.worker.lifecycle.paused.keys() == others | {"q"}
    bench.operations.keep_paused(others)
    assert [queue.name for queue in bench.worker.consumed] == ["q"]
    bench.operations.keep_paused(frozenset())

    assert not bench.worker.lifecycle.paused
    assert time.process_time() - started < 10

"""`with app.pipeline()` on a real broker: everything called in the block is stored at its end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from amqtask import AmqTask, signals
from amqtask.exceptions import BrokerUnreachable, MessageTooLarge, Unroutable
from integration.conftest import Broker
from integration.nodes import free_port
from integration.waiting import PATIENT
from integration.workers import WorkerProcess

SAMPLE = "integration.apps.sample"


@pytest.fixture
def app(rabbit: Broker) -> Iterator[AmqTask]:
    """A producer."""
    with AmqTask("client", broker=rabbit.url, backend="rpc://", **PATIENT) as made:
        yield made


def test_all_calls_of_the_block_are_in_the_queue_at_its_end(rabbit: Broker, app: AmqTask) -> None:
    queue = rabbit.queue("piped")
    published: list[str] = []

    def note(headers: dict[str, str], **_: object) -> None:
        published.append(headers["id"])

    signals.after_task_publish.connect(note)
    try:
        with app.pipeline():
            results = [app.send_task("any.task", (number,), queue=queue) for number in range(2500)]
    finally:
        signals.after_task_publish.disconnect(note)
    assert rabbit.count(queue) == 2500
    assert published == [result.id for result in results]


def test_a_result_asked_for_in_the_block_comes(rabbit: Broker, app: AmqTask) -> None:
    queue = rabbit.queue("piped")
    with WorkerProcess(SAMPLE, "-Q", queue, "-P", "solo").start(), app.pipeline():
        assert app.send_task("sample.add", (2, 3), queue=queue).get(timeout=90) == 5


def test_a_call_that_cannot_be_stored_is_named_and_the_others_are_stored(rabbit: Broker, app: AmqTask) -> None:
    queue = rabbit.queue("piped")
    pipeline = app.pipeline()
    with pytest.raises(Unroutable), pipeline:  # noqa: PT012 - the block's end raises
        app.send_task("any.task", queue=queue)
        lost = app.send_task("any.task", exchange="amq.direct", routing_key="nowhere")
        app.send_task("any.task", queue=queue)
    assert list(pipeline.failed) == [lost.id]
    assert rabbit.count(queue) == 2


def test_headers_that_fit_no_frame_fail_their_call_and_no_other(rabbit: Broker, app: AmqTask) -> None:
    queue = rabbit.queue("piped")
    pipeline = app.pipeline()
    with pytest.raises(MessageTooLarge, match="frame_max"), pipeline:  # noqa: PT012 - the block's end raises
        for _ in range(20):
            app.send_task("any.task", queue=queue)
        large = app.send_task("any.task", queue=queue, headers={"large": "x" * 200_000})
        for _ in range(20):
            app.send_task("any.task", queue=queue)
    assert list(pipeline.failed) == [large.id]
    assert rabbit.count(queue) == 40


def test_a_broker_that_is_not_there_is_said_at_the_end() -> None:
    with AmqTask("client", broker=f"amqp://127.0.0.1:{free_port()}/", broker_publish_timeout=0.5) as app:
        pipeline = app.pipeline()
        with pytest.raises(BrokerUnreachable), pipeline:
            result = app.send_task("any.task")
        assert list(pipeline.failed) == [result.id]

"""A pipeline publishes what was called, in its order, when it says it does, and names what was not stored."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Sequence

import pytest

from amqtask.exceptions import PublishError, PublishRefused
from amqtask.pipeline import BURST, Pipeline, find_pipeline, flush_open
from amqtask.protocol.message import Message, Properties


class Stored:
    """Where a pipeline publishes to; refuses the ids in `refused`."""

    def __init__(self, *refused: str) -> None:
        self.bursts: list[list[str]] = []
        self.announced: list[str] = []
        self.refused = set(refused)

    def publish_many(self, messages: Sequence[Message]) -> list[PublishError | None]:
        ids = [message.properties.headers["id"] for message in messages]
        self.bursts.append(ids)
        return [PublishRefused(f"refused {found}") if found in self.refused else None for found in ids]

    def pipeline(self) -> Pipeline:
        return Pipeline(self, self.publish_many, self.settled)

    def settled(self, message: Message, error: PublishError | None) -> None:
        if error is None:
            self.announced.append(message.properties.headers["id"])


def call(task_id: str) -> Message:
    return Message(b"[]", Properties(headers={"id": task_id}), "", "queue")


def test_calls_leave_together_at_the_end_in_their_order() -> None:
    stored = Stored()
    with stored.pipeline() as pipeline:
        for task_id in "abc":
            pipeline.add(call(task_id))
        assert stored.announced == []
    assert stored.bursts == [["a", "b", "c"]]
    assert stored.announced == ["a", "b", "c"]


def test_an_empty_block_publishes_nothing() -> None:
    stored = Stored()
    with stored.pipeline():
        pass
    assert stored.bursts == []


def test_a_full_burst_does_not_wait_for_the_end() -> None:
    stored = Stored()
    with stored.pipeline() as pipeline:
        for number in range(BURST):
            pipeline.add(call(str(number)))
        # On a machine that stops for a moment, the first ones leave earlier because they have waited for long.
        assert stored.bursts


def test_what_waits_leaves_when_a_result_is_asked_for() -> None:
    stored = Stored()
    with stored.pipeline() as pipeline:
        pipeline.add(call("a"))
        flush_open()
        assert stored.announced == ["a"]


def test_a_block_that_fails_publishes_what_it_called() -> None:
    stored = Stored()
    with pytest.raises(ValueError, match="mine"), stored.pipeline() as pipeline:  # noqa: PT012 - the block's end raises
        pipeline.add(call("a"))
        raise ValueError("mine")
    assert stored.announced == ["a"]


def test_the_first_error_is_raised_and_each_is_kept_by_its_task() -> None:
    stored = Stored("b", "c")
    pipeline = stored.pipeline()
    with pytest.raises(PublishRefused, match="refused b"), pipeline:  # noqa: PT012 - the block's end raises
        for task_id in "abcd":
            pipeline.add(call(task_id))
    assert stored.announced == ["a", "d"]
    assert {task_id: str(error) for task_id, error in pipeline.failed.items()} == {"b": "refused b", "c": "refused c"}


def test_an_error_of_a_pipeline_keeps_the_error_of_its_block() -> None:
    stored = Stored("a")
    with pytest.raises(PublishRefused) as raised, stored.pipeline() as pipeline:  # noqa: PT012 - the block's end raises
        pipeline.add(call("a"))
        raise ValueError("mine")
    assert isinstance(raised.value.__context__, ValueError)


def test_only_its_owner_s_calls_inside_the_block_go_through_it() -> None:
    stored = Stored()
    assert find_pipeline(stored) is None
    with stored.pipeline() as pipeline:
        assert find_pipeline(stored) is pipeline
        assert find_pipeline(Stored()) is None
        with stored.pipeline() as inner:
            assert find_pipeline(stored) is inner
        assert find_pipeline(stored) is pipeline
    assert find_pipeline(stored) is None


def test_a_thread_with_a_copy_of_the_context_publishes_on_its_own() -> None:
    stored = Stored()
    found: list[Pipeline | None] = []
    with stored.pipeline():
        context = contextvars.copy_context()
        thread = threading.Thread(target=lambda: found.append(context.run(find_pipeline, stored)))
        thread.start()
        thread.join()
    found.append(context.run(find_pipeline, stored))
    assert found == [None, None]


def test_an_open_pipeline_is_not_opened_again() -> None:
    pipeline = Stored().pipeline()
    with pipeline, pytest.raises(RuntimeError, match="open already"):
        pipeline.__enter__()

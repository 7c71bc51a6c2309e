"""What the signals around publishing tell, when it goes well and when it does not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from amqtask import AmqTask, chain, chord, group, signals
from amqtask.exceptions import PublishError, Unroutable
from amqtask.testing.worker import start_worker


class Listener:
    """Writes down which signal came with which task id, or what it failed with."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, Any]] = []
        self._signals = (signals.before_task_publish, signals.after_task_publish, signals.task_publish_failed)
        for signal in self._signals:
            signal.connect(self.hear, weak=False)

    def hear(self, signal: signals.Signal, sender: str, headers: dict[str, Any], **more: Any) -> None:
        word = signal.name.split("_")[0] if signal is not signals.task_publish_failed else "failed"
        error = more.get("exception")
        self.seen.append((word, sender, type(error).__name__ if error else more.get("follow_up")))

    def stop(self) -> None:
        for signal in self._signals:
            signal.disconnect(self.hear)


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.stop()


@pytest.fixture
def app() -> Iterator[AmqTask]:
    with AmqTask("told", broker="memory://", backend="cache+memory://", set_as_current=False) as made:
        made.task(name="plain")(lambda *args: None)
        yield made


NOWHERE: dict[str, Any] = {"exchange": "", "routing_key": "nowhere"}


def test_a_publish_that_goes_well_is_told_before_and_after(app: AmqTask, listener: Listener) -> None:
    app.send_task("plain")

    assert listener.seen == [("before", "plain", False), ("after", "plain", None)]


def test_a_publish_that_fails_is_told_with_its_error(app: AmqTask, listener: Listener) -> None:
    with pytest.raises(Unroutable):
        app.send_task("plain", **NOWHERE)

    assert listener.seen == [("before", "plain", False), ("failed", "plain", "Unroutable")]


def test_of_a_burst_each_is_told_how_it_ended(app: AmqTask, listener: Listener) -> None:
    good, bad = app.tasks["plain"].s(), app.tasks["plain"].s().set(**NOWHERE)
    ends = [("after", "plain", None), ("failed", "plain", "Unroutable"), ("after", "plain", None)]

    for publish in (lambda: app.publish_many([good, bad, good]), group(good, bad, good).delay):
        listener.seen.clear()
        with pytest.raises(Unroutable):
            publish()
        assert listener.seen[3:] == ends

    listener.seen.clear()
    pipeline = app.pipeline()
    with pipeline:
        good.delay()
        bad.delay()
        good.delay()
        with pytest.raises(PublishError):
            pipeline.flush()
    assert listener.seen[3:] == ends


def test_retries_and_next_steps_are_told_where_they_are_made(app: AmqTask, listener: Listener) -> None:
    done = threading.Event()

    @app.task(name="twice", bind=True, default_retry_delay=0)
    def twice(self: Any) -> None:
        if not self.request.retries:
            raise self.retry()

    last = app.task(name="last")(done.set)
    with start_worker(app):
        chain(twice.si(), last.si()).delay()
        assert done.wait(60)

    # The worker may be faster than the producer, who is told of the confirm.
    assert ("after", "twice", None) in listener.seen
    assert [told for told in listener.seen if told[0] == "before"] == [
        ("before", "twice", False),
        ("before", "twice", True),
        ("before", "last", True),
    ]


def test_a_receiver_may_add_headers_to_a_next_step(app: AmqTask) -> None:
    seen: list[Any] = []
    done = threading.Event()

    def mark(headers: dict[str, Any], **_: Any) -> None:
        headers["mark"] = "here"

    @app.task(name="look", bind=True)
    def look(self: Any) -> None:
        seen.append(self.request.headers["mark"])
        done.set()

    signals.before_task_publish.connect(mark)
    try:
        with start_worker(app):
            chain(app.tasks["plain"].si(), look.si()).delay()
            assert done.wait(60)
    finally:
        signals.before_task_publish.disconnect(mark)

    assert seen == ["here"]


def test_no_receiver_is_called_on_a_worker_s_loop(app: AmqTask, listener: Listener) -> None:
    """The errback of a task that no slot runs is made by the worker itself."""
    done = threading.Event()
    last = app.task(name="last")(lambda *_: done.set())
    with start_worker(app, pool="threads"):
        app.send_task("nobody.knows", link_error=last.si())
        assert done.wait(60)

    assert listener.seen == [("before", "nobody.knows", False), ("after", "nobody.knows", None)]


@pytest.mark.parametrize("serializer", ["json", "pickle"])
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_receivers_get_the_arguments_and_may_change_them(serializer: str, compression: str | None) -> None:
    told: list[Any] = []

    def change(body: Any, **_: Any) -> None:
        args, kwargs, embed = body
        told.append((list(args), dict(kwargs), set(embed)))
        kwargs["tenant"] = "acme"

    def note(body: Any, **_: Any) -> None:
        told.append(body[1])

    with AmqTask("changed", broker="memory://", backend="cache+memory://", accept_content=["json", "pickle"]) as app:
        work = app.task(name="work")(lambda *args, **kwargs: [args, kwargs])
        signals.before_task_publish.connect(change)
        signals.after_task_publish.connect(note)
        try:
            with start_worker(app, pool="threads"):
                result = work.apply_async((1,), {"a": 2}, serializer=serializer, compression=compression).get(60)
        finally:
            signals.before_task_publish.disconnect(change)
            signals.after_task_publish.disconnect(note)

    assert result == [[1], {"a": 2, "tenant": "acme"}]
    assert told == [([1], {"a": 2}, {"callbacks", "errbacks", "chain", "chord"}), {"a": 2, "tenant": "acme"}]


def test_what_a_receiver_publishes_again_is_the_same_call(app: Any) -> None:
    def again(body: Any, headers: Any, exchange: Any, routing_key: Any, retry_policy: Any, **more: Any) -> None:
        with app.producer_pool.acquire(block=True) as producer:
            producer.publish(
                body, exchange=exchange, routing_key=routing_key, headers=headers, serializer="json", delivery_mode=None,
                retry=None, retry_policy=retry_policy,
            )  # fmt: skip

    groups: list[Any] = []
    app.task(name="members", bind=True)(lambda self, *_: groups.append(self.request.group))
    signals.before_task_publish.connect(again)
    try:
        with start_worker(app, pool="threads"):
            sign = app.signature
            result = chain(sign("plain", (42,)), chord([sign("members"), sign("plain")], sign("plain"))).delay()
            result.get(60)
            until = time.monotonic() + 60
            while len(groups) < 2 and time.monotonic() < until:
                time.sleep(0.01)
    finally:
        signals.before_task_publish.disconnect(again)

    assert len(groups) >= 2
    assert len(set(groups)) == 1


def test_receivers_get_the_properties_as_a_mapping_and_may_change_them(app: Any) -> None:
    told: list[Any] = []

    def change(properties: Any, **_: Any) -> None:
        told.append((properties["correlation_id"], properties.get("app_id"), "headers" in properties, len(properties)))
        properties.update(app_id="mine", priority=3)
        del properties["reply_to"]
        with pytest.raises(KeyError, match="no property"):
            properties["prioritie"] = 1

    signals.before_task_publish.connect(change)
    try:
        app.send_task("plain", task_id="one", queue="changed", reply_to="there")
    finally:
        signals.before_task_publish.disconnect(change)

    ((sent, _),) = app.memory_broker.messages("changed")
    assert told == [("one", None, False, 6)]
    assert (sent.app_id, sent.priority, sent.reply_to) == ("mine", 3, None)

"""Signals as Celery's users connect to them: bound methods, retries, signals of their own."""

from __future__ import annotations

import gc
import importlib
import weakref
from typing import Any

import pytest

from amqtask import AmqTask, signals
from amqtask.testing.worker import start_worker


class Listener:
    def __init__(self) -> None:
        self.heard = 0

    def hear(self, **_: Any) -> int:
        self.heard += 1
        return self.heard

    @classmethod
    def hear_all(cls, **_: Any) -> str:
        return cls.__name__


@pytest.fixture
def signal() -> Any:
    return importlib.import_module("amqtask.utils.dispatch").Signal(name="mine", providing_args={"what"})


def answers(signal: Any) -> list[Any]:
    return [answer for _, answer in signal.send(sender=None, what=1)]


def test_a_bound_method_is_called_while_its_object_lives(signal: Any) -> None:
    listener = Listener()
    signal.connect(listener.hear)
    signal.connect(listener.hear)
    gc.collect()

    assert answers(signal) == [1]
    assert signal.disconnect(listener.hear)
    assert answers(signal) == []


def test_a_bound_method_does_not_keep_its_object(signal: Any) -> None:
    listener, other = Listener(), Listener()
    signal.connect(listener.hear)
    signal.connect(other.hear)
    gone = weakref.ref(listener)
    del listener
    gc.collect()

    assert gone() is None
    assert (answers(signal), other.heard, len(signal.receivers)) == ([1], 1, 1)


def test_a_bound_method_that_is_held_keeps_its_object(signal: Any) -> None:
    signal.connect(Listener().hear, weak=False)
    gc.collect()

    assert answers(signal) == [1]


def test_a_class_method_is_called(signal: Any) -> None:
    signal.connect(Listener.hear_all)

    assert answers(signal) == ["Listener"]


def test_a_receiver_that_is_connected_with_retry_is_called_until_it_does_not_raise(
    signal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "FIRST_PAUSE", 0.0)
    attempts: list[int] = []

    def connects(**_: Any) -> str:
        attempts.append(1)
        if len(attempts) < 3:
            raise ConnectionError("not yet")
        return "connected"

    signal.connect(retry=True)(connects)
    assert answers(signal) == ["connected"]
    assert signal.disconnect(connects)


def test_signals_show_what_celery_s_do(signal: Any) -> None:
    signal.connect(Listener.hear_all)

    assert signal.providing_args == {"what"}
    assert signal.send_robust(sender=None)[0][1] == "Listener"
    task_prerun: Any = signals.task_prerun
    assert task_prerun.providing_args == {"task_id", "task", "args", "kwargs"}


def test_the_class_is_in_both_places() -> None:
    dispatch = importlib.import_module("amqtask.utils.dispatch")
    assert importlib.import_module("amqtask.utils.dispatch.signal").Signal is dispatch.Signal


def test_receivers_configure_a_worker_before_it_starts_and_add_queues() -> None:
    seen: list[Any] = []

    def configure(sender: str, instance: Any, conf: Any, options: Any, **_: Any) -> None:
        conf.task_annotations = {"add": {"rate_limit": "1000/s"}}
        seen.append(
            (sender, instance.hostname, instance.app.main, options["concurrency"], options.get("no_such_option"))
        )

    def add_queue(sender: str, instance: Any, **_: Any) -> None:
        instance.app.amqp.queues.select_add("extra")
        instance.app.amqp.queues.deselect("left")
        seen.append(sender)

    with AmqTask(
        "early", broker="memory://", backend="cache+memory://", set_as_current=False, task_queues=["main", "left"],
        task_default_queue="main",
    ) as app:  # fmt: skip
        add = app.task(name="add")(lambda x, y: x + y)
        signals.celeryd_init.connect(configure)
        signals.celeryd_after_setup.connect(add_queue)
        try:
            with start_worker(app, pool="threads", concurrency=2, hostname="w@h") as worker:
                assert add.apply_async((1, 2), queue="extra").get(60) == 3
                assert add.delay(2, 2).get(60) == 4
                assert sorted(queue.name for queue in worker.consumed) == ["extra", "main"]
        finally:
            signals.celeryd_init.disconnect(configure)
            signals.celeryd_after_setup.disconnect(add_queue)
        assert add.rate_limit == "1000/s"
    assert seen == [("w@h", "w@h", "early", 2, None), "w@h"]

"""Steps of an application's own start and stop with its worker."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
import pytest
from click.testing import CliRunner

from amqtask import AmqTask, Task, signals
from amqtask.assembly import build_worker
from amqtask.cli.base import Globals
from amqtask.cli.main import cli
from amqtask.compat import bootsteps
from amqtask.compat.bootsteps import Blueprint, StartStopStep, Step
from amqtask.worker.options import WorkerOptions

TOLD: list[Any] = []


@pytest.fixture
def app() -> Iterator[Any]:
    TOLD.clear()
    with AmqTask("steps", broker="memory://") as made:
        yield made


@contextmanager
def working(app: AmqTask, **options: Any) -> Iterator[Any]:
    """A worker in a thread, from when it is ready to its end."""
    ready = threading.Event()

    def is_ready(**_: Any) -> None:
        ready.set()

    signals.worker_ready.connect(is_ready)
    worker = build_worker(app, WorkerOptions(pool="solo", concurrency=1, install_signals=False, **options))
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        assert ready.wait(60)
        yield worker
    finally:
        signals.worker_ready.disconnect(is_ready)
        worker.stop()
        thread.join(60)
        worker.loop.close()


class First(StartStopStep):
    name = "proj.First"
    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, my_option: int = 1, **options: Any) -> None:
        super().__init__(parent, **options)
        self.value = my_option

    def start(self, parent: Any) -> None:
        TOLD.append(("first starts", parent.hostname, parent.app.main, self.value))

    def stop(self, parent: Any) -> None:
        TOLD.append("first stops")


class Alive(StartStopStep):
    """As probes for Kubernetes are written: touches a file now and then."""

    requires = (First, "celery.worker.components:Timer")

    def create(self, parent: Any) -> Any:
        self.touched = threading.Event()
        return None

    def start(self, parent: Any) -> None:
        TOLD.append("alive starts")
        self.timer = parent.timer.call_repeatedly(0.01, self.touch, (parent,), priority=10)
        TOLD.append(self)

    def touch(self, parent: Any) -> None:
        self.touched.set()

    def stop(self, parent: Any) -> None:
        self.timer.cancel()
        TOLD.append("alive stops")


class OfConsumer(StartStopStep):
    def start(self, parent: Any) -> None:
        TOLD.append(("consumes", parent.app.main, parent.controller.hostname))


class Never(Step):
    enabled = False

    def create(self, parent: Any) -> None:
        TOLD.append("never")


def test_steps_start_in_order_and_stop_in_the_other(app: Any) -> None:
    app.steps["worker"].update({Alive, First, Never})
    app.steps["consumer"].add(OfConsumer)

    with working(app, hostname="w@h", of_app={"my_option": 5}):
        step = next(told for told in TOLD if isinstance(told, Alive))
        assert step.touched.wait(60)

    assert [told for told in TOLD if told is not step] == [
        ("first starts", "w@h", "steps", 5),
        "alive starts",
        ("consumes", "steps", "w@h"),
        "alive stops",
        "first stops",
    ]


def test_a_step_that_cannot_stop_leaves_the_others(app: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Bad(StartStopStep):
        requires = (First,)

        def stop(self, parent: Any) -> None:
            raise RuntimeError("no end")

    app.steps["worker"].update({Bad, First})
    with working(app):
        pass

    assert TOLD[-1] == "first stops"
    assert "stop of the step test_a_step" in caplog.text or "no end" in caplog.text


def test_what_a_step_creates_starts_and_stops(app: Any) -> None:
    class Thing:
        def start(self) -> None:
            TOLD.append("on")

        def stop(self) -> None:
            TOLD.append("off")

    class Makes(StartStopStep):
        def create(self, parent: Any) -> Thing:
            return Thing()

    made = Blueprint([Makes]).apply(None)
    made.start(None)
    made.stop(None)

    assert TOLD == ["on", "off"]


def test_a_worker_takes_options_of_the_application(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    app.user_options["worker"].add(click.Option(["--my-option"], type=int, default=3))
    app.user_options["preload"].add(click.Option(["--tenant"]))
    told: list[Any] = []

    def note(options: Any, **_: Any) -> None:
        told.append(options)

    def no_worker(app: AmqTask, options: WorkerOptions) -> Any:
        told.append(options.of_app)
        raise click.ClickException("enough")

    monkeypatch.setattr("amqtask.cli.worker.build_worker", no_worker)
    signals.user_preload_options.connect(note)
    try:
        for words in ([], ["--my-option", "7", "--tenant=one"]):
            CliRunner().invoke(cli, ["worker", "-P", "solo", *words], obj=Globals(loaded=app))
    finally:
        signals.user_preload_options.disconnect(note)
    wrong = CliRunner().invoke(cli, ["worker", "--nonsense"], obj=Globals(loaded=app))

    first, second = {"my_option": 3, "tenant": None}, {"my_option": 7, "tenant": "one"}
    assert told == [first, first, second, second]
    assert "No such option" in wrong.output


def test_steps_at_celery_s_place_are_the_same() -> None:
    found = importlib.import_module("amqtask.bootsteps")

    assert found is bootsteps
    assert importlib.import_module("amqtask.app.task").Task is Task
    inside = importlib.import_module("amqtask.contrib.testing.app")
    assert inside is importlib.import_module("amqtask.compat.contrib.testing.app")
    assert importlib.import_module("amqtask.utils.time") is importlib.import_module("amqtask.compat.utils.time")

"""Who looks on sees each point of a task's life, may come and go, and cannot disturb the worker."""

from __future__ import annotations

import logging

import pytest

from amqtask import states
from amqtask.execution.request import Outcome, Request
from amqtask.worker.report import Observer
from tests.worker.bench import Bench


class Notes(Observer):
    """Writes down what it sees."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_received(self, request: Request) -> None:
        self.seen.append(f"received {request.id}")

    def on_started(self, request: Request) -> None:
        self.seen.append(f"started {request.id}")

    def on_ended(self, request: Request, outcome: Outcome) -> None:
        self.seen.append(f"{outcome.state} {request.id}")


def test_an_observer_sees_a_task_come_start_and_end() -> None:
    bench, notes = Bench(slots=1), Notes()
    bench.worker.observe(notes)
    bench.worker.observe(notes)

    bench.deliver("a", "b")
    bench.end("a")
    bench.loop.turn()

    assert notes.seen == ["received a", "received b", "started a", "SUCCESS a", "started b"]


def test_a_task_that_no_slot_runs_ends_too() -> None:
    bench, notes = Bench(), Notes()
    bench.worker.observe(notes)

    bench.deliver("a", task="nobody.knows")

    assert notes.seen == ["received a", f"{states.FAILURE} a"]


def test_a_held_task_is_seen_to_start_when_its_rate_lets_it() -> None:
    bench, notes = Bench(), Notes()
    bench.worker.throttle.set_rate("t", 1)
    bench.worker.observe(notes)

    bench.deliver("a", "b")
    bench.pass_time(1.1)

    assert [line for line in notes.seen if line.startswith("started")] == ["started a", "started b"]


def test_who_has_left_sees_nothing_more() -> None:
    bench, notes = Bench(), Notes()
    bench.worker.observe(notes)
    bench.deliver("a")

    bench.worker.unobserve(notes)
    bench.worker.unobserve(notes)
    bench.end("a")
    bench.deliver("b")

    assert notes.seen == ["received a", "started a"]


def test_what_nobody_overrides_is_not_called() -> None:
    bench = Bench()
    bench.worker.observe(Observer())

    report = bench.worker.report
    assert (report.sees_received, report.sees_started, report.sees_success) == (False, False, False)


def test_a_failing_observer_is_logged_and_the_task_is_answered(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Observer):
        def on_received(self, request: Request) -> None:
            raise RuntimeError("broken eye")

    bench, notes = Bench(), Notes()
    bench.worker.observe(Broken())
    bench.worker.observe(notes)

    with caplog.at_level(logging.ERROR):
        bench.deliver("a")
    bench.end("a")
    bench.loop.turn()

    assert bench.frames == [("ack", 1, False)]
    assert notes.seen == ["received a", "started a", "SUCCESS a"]
    assert "broken eye" in caplog.text

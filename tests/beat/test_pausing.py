"""Periodic tasks that are paused, resumed and run by hand: no beat sends a paused one, whatever restarts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta, timezone

import pytest

from amqtask import AmqTask
from amqtask.beat.build import build_beat
from amqtask.beat.contract import BeatOptions
from amqtask.beat.operating import Schedules
from amqtask.beat.scheduler import Scheduler
from amqtask.beat.service import Beat
from amqtask.exceptions import ConfigurationError, OperationalError
from integration.waiting import eventually
from tests.beat.bench import START, Bench, ListStore, entry


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.loop.close()


def names(bench: Bench) -> list[str]:
    return [name for name, _, _ in bench.sent]


def test_a_paused_entry_is_not_sent_whoever_leads_and_begins_anew_when_it_is_resumed(bench: Bench) -> None:
    paused = {"tick"}
    entries = (entry(), entry("other"))
    first = bench.beat(ListStore(*entries), read_paused=lambda: frozenset(paused))
    first.start()
    bench.leading(first)
    bench.passing(lambda: bool(bench.sent))
    first.stop()
    second = bench.beat(ListStore(*entries), read_paused=lambda: frozenset(paused))
    second.start()
    bench.leading(second)
    so_far = len(bench.sent)
    bench.passing(lambda: len(bench.sent) > so_far)
    assert set(names(bench)) == {"other"}

    paused.clear()
    third = bench.beat(ListStore(*entries), read_paused=lambda: frozenset(paused))
    third.start()  # its seed reaches the one that leads, as a state of somebody's who resumes does
    bench.passing(lambda: second.scheduler.next_of("tick") is not None)
    bench.until((bench.now - START).total_seconds() + 15)
    assert names(bench).count("tick") == 1
    for beat in (second, third):
        beat.stop()


def test_nothing_is_sent_before_it_is_known_what_is_paused(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    asked: list[int] = []

    def read() -> frozenset[str]:
        asked.append(1)
        if len(asked) < 3:
            raise OperationalError("the broker is away")
        return frozenset({"tick"})

    beat = bench.beat(ListStore(entry(seconds=1), entry("other", seconds=1)), read_paused=read)
    beat.start()
    bench.passing(lambda: bool(bench.sent))
    assert (len(asked), set(names(bench))) == (3, {"other"})
    assert "what is paused cannot be read, trying again: the broker is away" in caplog.text
    beat.stop()


def test_what_was_due_while_it_was_paused_is_not_made_up_for_by_the_next_leader() -> None:
    ran = START - timedelta(days=2)
    known = entry("nightly", seconds=3600, last_due_at=ran, last_run_at=ran, total_run_count=7)
    scheduler = Scheduler(timezone.utc)
    scheduler.update([entry("nightly", seconds=3600, enabled=False, last_due_at=ran, total_run_count=7)], START)
    scheduler.update([known], START)

    successor = Scheduler(timezone.utc)
    successor.update([known], START + timedelta(seconds=10))
    successor.resume([scheduler.positions], START + timedelta(seconds=10))
    assert successor.next_of("nightly") == START + timedelta(hours=1)
    assert successor.positions["nightly"].total_run_count == 7


class Running:
    """A beat of an application in memory, in a thread."""

    def __init__(self) -> None:
        self.app = AmqTask("shop", broker="memory://", set_as_current=False)
        self.app.conf.update(
            beat_scheduler="memory", task_default_queue="work",
            beat_schedule={
                "often": {"task": "tick", "schedule": 0.05, "args": ("x",)},
                "rarely": {"task": "tick", "schedule": 3600},
            },
        )  # fmt: skip
        self.app.task(name="tick")(lambda *args: None)
        self.schedules = Schedules(self.app)

    @contextmanager
    def beat(self) -> Iterator[Beat]:
        process = build_beat(self.app, BeatOptions())
        thread = threading.Thread(target=lambda: process.run(install_signals=False))
        thread.start()
        try:
            assert isinstance(process.beat, Beat)
            yield process.beat
        finally:
            process.stop()
            thread.join(30)

    def sent(self, name: str) -> int:
        broker = self.app.memory_broker
        assert broker is not None
        if "work" not in broker.queue_names():
            return 0
        return sum(properties.headers["periodic_task_name"] == name for properties, _ in broker.messages("work"))


def test_a_beat_that_runs_is_told_and_one_that_starts_later_knows() -> None:
    running = Running()
    with running.beat() as beat:
        eventually(lambda: running.sent("often") > 1)
        assert running.schedules.pause("often", "ann") is True
        eventually(lambda: beat.scheduler.next_of("often") is None and not beat.is_busy)
        before = running.sent("often")
        assert running.schedules.run("rarely")
        assert running.sent("rarely") == 1
    with running.beat() as beat:
        eventually(lambda: beat.is_leading and beat.scheduler.next_of("rarely") is not None and not beat.is_busy)
        eventually(lambda: beat.scheduler.next_of("often") is None)
        assert running.sent("often") == before
        assert {name: pause.by for name, pause in running.schedules.pauses.read().items()} == {"often": "ann"}
        assert running.schedules.pause("often") is False
        assert running.schedules.resume("often") is True
        eventually(lambda: running.sent("often") > before)
    assert running.schedules.resume("often") is False
    running.app.close()


def test_pauses_of_queues_and_of_other_schedules_are_left_alone() -> None:
    running = Running()
    running.app.control.pauses.pause("often")
    running.schedules.pause("rarely")
    other = Schedules(running.app, BeatOptions(scheduler="tests.beat.bench:ListStore"))

    assert list(running.app.control.pauses.read()) == ["often"]
    assert list(running.schedules.pauses.read()) == ["rarely"]
    assert list(other.pauses.read()) == []
    running.app.close()


def test_what_there_is_not_can_be_neither_paused_nor_run() -> None:
    running = Running()

    for act in (running.schedules.pause, running.schedules.run):
        with pytest.raises(ConfigurationError, match="there is no periodic task 'nightly'; there are often, rarely"):
            act("nightly")
    assert running.schedules.entries()[0].name == "often"
    running.app.close()

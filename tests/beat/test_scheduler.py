"""The scheduler: what is due when, after which gap, and what follows."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amqtask.beat.contract import Entry
from amqtask.beat.scheduler import Position, Scheduler
from amqtask.schedules import BaseSchedule, clocked, crontab, schedule

UTC = timezone.utc
START = datetime(2026, 5, 4, 12, tzinfo=UTC)


def after(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def entry(when: float | BaseSchedule = 10.0, name: str = "tick", **fields: Any) -> Entry:
    found = when if isinstance(when, BaseSchedule) else schedule(when)
    return Entry(name=name, task="tasks.tick", schedule=found, **fields)


def scheduler(*entries: Entry, **options: Any) -> Scheduler:
    made = Scheduler(UTC, **options)
    made.update(entries, START)
    return made


def send(made: Scheduler, now: datetime) -> list[tuple[str, float]]:
    """What is due, as (name, seconds after START); all of it is sent."""
    dues = made.take(now)
    for due in dues:
        made.advance(due)
    return [(due.entry.name, (due.due_at - START).total_seconds()) for due in dues]


def test_an_interval_is_due_once_per_interval_counted_from_when_it_was_first_seen() -> None:
    made = scheduler(entry(10))
    assert made.next_at == after(10)
    assert send(made, after(9.99)) == []
    assert send(made, after(10.4)) == [("tick", 10)]
    assert send(made, after(10.4)) == []
    assert made.next_at == after(20)


def test_what_is_due_stays_due_until_it_was_sent() -> None:
    made = scheduler(entry(10))
    assert [due.due_at for due in made.take(after(10))] == [after(10)]
    assert [due.due_at for due in made.take(after(21))] == [after(10), after(20)]


def test_what_is_due_together_comes_in_the_order_of_due_times() -> None:
    made = scheduler(entry(7, "b"), entry(5, "a"), entry(crontab(), "c"))
    assert send(made, after(11)) == [("a", 5), ("b", 7), ("a", 10)]


def test_after_a_short_gap_each_missed_due_time_is_sent_and_after_a_long_one_the_last() -> None:
    made = scheduler(entry(10), catch_up=30)
    assert send(made, after(40)) == [("tick", 10), ("tick", 20), ("tick", 30), ("tick", 40)]
    assert send(made, after(125)) == [("tick", 120)]
    assert made.next_at == after(130)


def test_after_a_long_stop_a_crontab_runs_once_for_its_last_due_time() -> None:
    made = scheduler(entry(crontab(minute="*/5")))
    dues = made.take(START + timedelta(days=400, minutes=3))
    assert [(due.due_at, due.is_catch_up) for due in dues] == [(START + timedelta(days=400), True)]


def test_a_crontab_overdue_for_longer_than_the_deadline_is_left_out() -> None:
    made = scheduler(entry(crontab(minute=0)), entry(3600, "interval"), deadline=600)
    assert send(made, after(3600 + 700)) == [("interval", 3600)]
    assert made.next_at == after(7200)
    assert send(made, after(7200 + 500)) == [("interval", 7200), ("tick", 7200)]


def test_another_scheduler_goes_on_exactly_where_this_one_ended() -> None:
    first = scheduler(entry(10), entry(3600, "hourly"))
    send(first, after(11))
    second = Scheduler(UTC)
    second.update([entry(10), entry(3600, "hourly")], after(25))
    second.resume([first.positions], after(25))
    assert send(second, after(25)) == [("tick", 20)]
    assert second.next_of("hourly") == after(3600)


def test_the_furthest_of_all_states_counts_and_so_does_what_the_store_remembers() -> None:
    made = Scheduler(UTC)
    made.update([entry(10, last_due_at=after(50), last_run_at=after(50), total_run_count=5)], after(55))
    states = [{"tick": Position(after(40), 4, True)}, {"tick": Position(after(54), 0, False)}]
    made.resume(states, after(55))
    assert made.positions["tick"] == Position(after(50), 5, True)
    made.resume([*states, {"tick": Position(after(60), 6, True)}], after(65))
    assert made.next_at == after(70)


def test_an_entry_that_never_ran_here_learns_where_it_ran_and_one_that_did_does_not() -> None:
    made = scheduler(entry(10), entry(10, "ran"))
    made.advance(made.take(after(10))[0])
    made.learn([{"tick": Position(after(9), 4, True), "ran": Position(after(20), 4, True), "other": Position(START)}])
    assert made.positions == {"ran": Position(after(10), 1, True), "tick": Position(after(9), 4, True)}
    assert made.next_of("tick") == after(19)


def test_positions_that_were_not_stored_are_taken_back() -> None:
    made = scheduler(entry(10))
    saved = made.positions
    send(made, after(10))
    made.resume([saved], after(12))
    assert send(made, after(12)) == [("tick", 10)]


def test_an_entry_of_another_version_keeps_its_place_for_a_day() -> None:
    made = scheduler(entry(10))
    made.resume([{"theirs": Position(START, 3, True)}], after(60))
    assert made.positions["theirs"] == Position(START, 3, True)
    made.resume([{"theirs": Position(START, 3, True)}], START + timedelta(days=2))
    assert "theirs" not in made.positions


def test_a_new_entry_begins_now_and_a_removed_one_ends() -> None:
    made = scheduler(entry(10))
    assert made.update([entry(10), entry(5, "new")], after(3))
    assert send(made, after(10)) == [("new", 8), ("tick", 10)]
    assert made.update([entry(5, "new")], after(11))
    assert send(made, after(21)) == [("new", 13), ("new", 18)]
    assert not made.update([entry(5, "new")], after(22))


def test_a_disabled_entry_is_not_due_and_does_not_catch_up_when_it_is_enabled() -> None:
    made = scheduler(entry(10))
    made.update([entry(10, enabled=False)], after(5))
    assert made.next_at is None
    made.update([entry(10, last_due_at=START)], after(1000))
    assert made.next_at == after(1010)


def test_a_changed_interval_counts_from_the_last_due_time_and_a_changed_crontab_from_now() -> None:
    made = scheduler(entry(3600), entry(crontab(0), "cron"))
    send(made, after(3600))
    made.update([entry(600), entry(crontab(30), "cron")], after(4000))
    assert made.next_of("tick") == after(4200)
    assert made.next_of("cron") == after(5400)
    made.update([entry(600), entry(crontab("*/5"), "cron")], after(4001))
    assert made.next_of("cron") == after(4200)


def test_a_clocked_entry_runs_once_also_when_its_time_has_passed() -> None:
    made = scheduler(entry(clocked(START - timedelta(hours=1)), one_off=True))
    assert send(made, START) == [("tick", -3600)]
    assert made.next_at is None
    made.update([entry(clocked(after(60)), one_off=True)], after(1))
    assert send(made, after(61)) == [("tick", 60)]


def test_a_one_off_entry_runs_once_and_again_when_it_is_enabled_again() -> None:
    once = entry(10, one_off=True)
    made = scheduler(once)
    assert send(made, after(25)) == [("tick", 10)]
    assert send(made, after(100)) == []
    made.update([replace(once, enabled=False)], after(101))
    made.update([once], after(102))
    assert send(made, after(112)) == [("tick", 112)]


def test_a_one_off_entry_that_its_store_disabled_and_somebody_enabled_meanwhile_runs_again() -> None:
    once = entry(10, one_off=True)
    made = scheduler(once)
    assert send(made, after(10)) == [("tick", 10)]
    made.update([once], after(11))  # read before the store was told
    assert made.next_at is None
    again = replace(once, last_due_at=after(10), last_run_at=after(10))
    made.update([again], after(12))
    assert made.next_at == after(22)

    successor = Scheduler(UTC)
    successor.update([again], after(12))
    successor.resume([{"tick": Position(after(10), 1, True)}], after(12))
    assert successor.next_at == after(22)


def test_nothing_is_due_before_the_start_nor_at_the_end() -> None:
    made = scheduler(entry(10, start_time=after(25), expires=after(46)))
    assert send(made, after(50)) == [("tick", 25), ("tick", 35), ("tick", 45)]
    assert made.next_at is None
    made = scheduler(entry(crontab(), start_time=after(65), expires=after(180)))
    assert send(made, after(125)) == [("tick", 120)]
    assert made.next_at is None


def test_an_interval_with_a_start_in_the_past_is_counted_from_it() -> None:
    made = scheduler(entry(60, start_time=START - timedelta(seconds=70)))
    assert made.next_at == after(50)


def test_a_long_stop_past_the_end_of_an_entry_is_caught_up_with_its_last_due_time() -> None:
    made = scheduler(entry(10, expires=after(46)))
    assert send(made, after(1000)) == [("tick", 40)]


def test_a_schedule_that_fails_is_left_out_and_the_others_go_on() -> None:
    class Broken(BaseSchedule):
        def next_due(self, after: datetime, zone: Any) -> datetime | None:
            raise RuntimeError("no idea")

    made = scheduler(entry(Broken(), "broken"), entry(10))
    assert send(made, after(10)) == [("tick", 10)]


def test_upcoming_is_what_would_be_sent() -> None:
    made = scheduler(entry(60), entry(crontab(1), "cron"))
    found = [(due.entry.name, (due.due_at - START).total_seconds()) for due in made.upcoming(after(130))]
    assert found == [("cron", 60), ("tick", 60), ("tick", 120)]


@given(
    steps=st.lists(st.floats(0.1, 25.0), min_size=1, max_size=30),
    deaths=st.sets(st.integers(0, 29)),
    interval=st.sampled_from([0.5, 1.0, 3.0, 7.0]),
)
def test_whatever_leaders_die_each_due_time_is_sent_and_only_unsaved_ones_again(
    steps: list[float], deaths: set[int], interval: float
) -> None:
    """Gaps below the window; a leader that dies has published its last batch, but not stored its state."""
    made, now, sent = scheduler(entry(interval), catch_up=30.0), START, []
    saved = made.positions
    for number, step in enumerate(steps):
        now += timedelta(seconds=step)
        sent += send(made, now)
        if number in deaths:
            made = Scheduler(UTC, catch_up=30.0)
            made.update([entry(interval)], now)
            made.resume([saved], now)
            sent += send(made, now)
        saved = made.positions
    found = {seconds for _, seconds in sent}
    count = (now - START) // timedelta(seconds=interval)
    assert found == {interval * number for number in range(1, count + 1)}


def test_the_count_of_runs_goes_on_from_what_the_store_remembers() -> None:
    made = scheduler(entry(10, total_run_count=7))
    assert [made.advance(due) for due in made.take(after(20))] == [8, 9]


def test_a_clock_that_was_ahead_holds_nothing_up(caplog: pytest.LogCaptureFixture) -> None:
    made = scheduler(entry(10.0))
    assert send(made, after(86_400))

    assert send(made, after(5)) == []
    assert "in the future: a clock was wrong" in caplog.text
    assert send(made, after(15)) == [("tick", 15.0)]


class Answering(BaseSchedule):
    """Answers as it is told."""

    def __init__(self, next_due: Any, latest_due: Any = None) -> None:
        super().__init__()
        self._next, self._latest = next_due, latest_due

    def next_due(self, after: datetime, zone: Any) -> Any:
        return self._next(after)

    def latest_due(self, after: datetime, until: datetime, zone: Any) -> Any:
        return self._latest(after) if self._latest else super().latest_due(after, until, zone)


def once(then: Any) -> Any:
    """The first answer is a second later, those after it are `then`'s."""
    return lambda moment: moment + timedelta(seconds=1) if moment < after(1) else then(moment)


NO_ANSWERS = {
    "without a zone": lambda moment: (moment + timedelta(seconds=1)).replace(tzinfo=None),
    "the same moment": lambda moment: moment,
    "an earlier one": lambda moment: moment - timedelta(days=1),
    "one moment for ever": lambda moment: after(-100),
    "a number": lambda moment: 1.0,
    "an exception": lambda moment: 1 / 0,
}


@pytest.mark.parametrize("answer", NO_ANSWERS.values(), ids=NO_ANSWERS)
@pytest.mark.parametrize("begins", [lambda then: then, once], ids=["from the beginning", "later"])
def test_a_schedule_of_ones_own_that_gives_no_later_moment_leaves_out_its_entry_only(
    caplog: pytest.LogCaptureFixture, begins: Any, answer: Any
) -> None:
    made = scheduler(entry(Answering(begins(answer)), "odd"), entry(1, "good"))
    made.resume([], START)
    sent = [*send(made, after(1)), *send(made, after(2)), *send(made, after(100))]
    assert [due for name, due in sent if name == "good"] == [1, 2, 100]
    assert [due for name, due in sent if name == "odd"] == ([1] if begins is once else [])
    assert caplog.text.count("cannot work out when odd is due") == 1


def test_a_catch_up_of_a_schedule_of_ones_own_that_gives_no_moment_is_its_first_missed_due_time() -> None:
    later = entry(Answering(lambda moment: moment + timedelta(seconds=10), lambda moment: 5), "odd")
    made = scheduler(later, entry(10, "good"))
    assert sorted(send(made, after(105))) == [("good", 100), ("odd", 10)]

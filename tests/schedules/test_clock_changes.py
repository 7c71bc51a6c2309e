"""Schedules where the clocks change: in many zones, held against a clock that is looked at every minute."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from functools import lru_cache
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amqtask.schedules import BaseSchedule, crontab, schedule

UTC = timezone.utc
MINUTE = timedelta(minutes=1)
BERLIN = ZoneInfo("Europe/Berlin")
# Changes by an hour, by half an hour, by a day, at midnight, in the south, twice a year around Ramadan, and none.
ZONES = [
    "Europe/Berlin", "Europe/Dublin", "America/New_York", "America/Sao_Paulo", "America/Havana", "America/St_Johns",
    "Asia/Beirut", "Asia/Gaza", "Asia/Kathmandu", "Asia/Shanghai", "Asia/Tehran", "Africa/Casablanca", "Africa/Cairo",
    "Atlantic/Azores", "Australia/Lord_Howe", "Australia/Sydney", "Antarctica/Troll", "Pacific/Apia",
    "Pacific/Chatham", "America/Scoresbysund", "America/Asuncion", "Asia/Amman", "Europe/Moscow",
]  # fmt: skip


@lru_cache
def changes_of(name: str, first_year: int, last_year: int) -> list[datetime]:
    """The first whole hour at or after each change of the zone's clock."""
    zone, moment = ZoneInfo(name), datetime(first_year, 1, 1, tzinfo=UTC)
    found = []
    while moment.year <= last_year:
        following = moment + timedelta(hours=1)
        if moment.astimezone(zone).utcoffset() != following.astimezone(zone).utcoffset():
            found.append(following)
        moment = following
    return found


def collect(entry: BaseSchedule, start: datetime, end: datetime, zone: ZoneInfo) -> list[datetime]:
    found: list[datetime] = []
    moment = entry.next_due(start, zone)
    while moment is not None and moment <= end:
        found.append(moment)
        moment = entry.next_due(moment, zone)
    return found


def by_looking(entry: crontab, start: datetime, end: datetime, zone: ZoneInfo) -> list[datetime]:
    """The same from a clock that is looked at every minute: no arithmetic of readings at all."""

    def matches(reading: datetime) -> bool:
        return (
            reading.minute in entry.minute
            and reading.hour in entry.hour
            and reading.isoweekday() % 7 in entry.day_of_week
            and reading.day in entry.day_of_month
            and reading.month in entry.month_of_year
        )

    hourly = len(entry.hour) == 24
    goes_on = hourly or str(entry._orig_minute).startswith("*")
    shown: set[datetime] = set()
    due: set[datetime] = set()
    moment = start - timedelta(days=2)
    latest = moment.astimezone(zone).replace(tzinfo=None, fold=0) - MINUTE
    while moment <= end:
        reading = moment.astimezone(zone).replace(tzinfo=None, fold=0)
        if matches(reading) and (goes_on or reading not in shown):
            due.add(moment)
        skipped = latest + MINUTE
        while not hourly and skipped < reading:
            if matches(skipped):
                due.add(moment)
            skipped += MINUTE
        shown.add(reading)
        latest = reading
        moment += MINUTE
    return sorted(each for each in due if start < each)


def hours() -> st.SearchStrategy[str]:
    return st.one_of(
        st.just("*"),
        st.sets(st.integers(0, 23), min_size=1, max_size=6).map(lambda found: ",".join(map(str, sorted(found)))),
        st.sampled_from(["*/2", "*/3", "0-4", "22-3", "1-3"]),
    )


def minutes() -> st.SearchStrategy[str]:
    return st.one_of(
        st.sampled_from(["*", "*/2", "*/7", "*/10", "*/30", "0", "30", "15,45", "0,1,59"]),
        st.integers(0, 59).map(str),
    )


@given(
    name=st.sampled_from(ZONES),
    which=st.integers(0, 200),
    minute=minutes(),
    hour=hours(),
    weekday=st.sampled_from(["*", "*", "sun", "sat,sun", "mon-fri"]),
    before=st.integers(1, 20 * 60),
)
@settings(max_examples=150, deadline=None)
def test_a_crontab_is_due_when_a_clock_looked_at_every_minute_says(
    name: str, which: int, minute: str, hour: str, weekday: str, before: int
) -> None:
    changes = changes_of(name, 2010, 2027) or [datetime(2026, 3, 29, 1, tzinfo=UTC)]
    change = changes[which % len(changes)]
    zone, entry = ZoneInfo(name), crontab(minute, hour, weekday)
    start, end = change - before * MINUTE, change + timedelta(hours=30)

    assert collect(entry, start, end, zone) == by_looking(entry, start, end, zone)


@given(
    name=st.sampled_from(ZONES),
    which=st.integers(0, 200),
    offset=st.integers(-26 * 3600, 26 * 3600),
    fraction=st.integers(0, 999_999),
    entry=st.one_of(
        st.builds(crontab, minutes(), hours(), st.sampled_from(["*", "mon", "sat,sun"])),
        st.builds(schedule, st.integers(1, 200_000), st.booleans()),
    ),
)
@settings(max_examples=300, deadline=None)
def test_the_next_due_time_is_later_and_does_not_depend_on_when_before_it_was_asked(
    name: str, which: int, offset: int, fraction: int, entry: BaseSchedule
) -> None:
    changes = changes_of(name, 2024, 2027) or [datetime(2026, 3, 29, 1, tzinfo=UTC)]
    zone = ZoneInfo(name)
    after = changes[which % len(changes)] + timedelta(seconds=offset, microseconds=fraction)
    due = entry.next_due(after, zone)
    assert due is not None
    assert due > after
    assert due.utcoffset() == timedelta(0)
    if isinstance(entry, crontab):
        assert entry.next_due(after + (due - after) / 2, zone) == due
        assert entry.latest_due(after, due, zone) == due
        following = entry.next_due(due, zone)
        assert following is not None
        assert entry.latest_due(after, following, zone) == following
    assert entry.latest_due(after, due - timedelta(microseconds=1), zone) is None


# -- the same in examples: Berlin's clock goes from 2 to 3 on 2026-03-29, from 3 back to 2 on 2026-10-25


def berlin(entry: BaseSchedule, start: str, end: str) -> list[str]:
    def moment(text: str) -> datetime:
        return datetime.fromisoformat(text).replace(tzinfo=BERLIN)

    found = collect(entry, moment(start), moment(end), BERLIN)
    return [each.astimezone(BERLIN).strftime("%H:%M%z")[:-2] for each in found]


def test_a_time_that_does_not_exist_is_due_once_when_the_clock_is_put_on() -> None:
    assert berlin(crontab(30, 2), "2026-03-29 00:00", "2026-03-29 23:00") == ["03:00+02"]
    assert berlin(crontab("0,15,30", 2), "2026-03-29 00:00", "2026-03-29 23:00") == ["03:00+02"]
    assert berlin(crontab(0, "2,3"), "2026-03-29 00:00", "2026-03-29 23:00") == ["03:00+02"]


def test_a_time_that_exists_twice_is_due_once() -> None:
    assert berlin(crontab(30, 2), "2026-10-25 00:00", "2026-10-25 23:00") == ["02:30+02"]


def test_an_entry_of_every_hour_runs_through_both() -> None:
    spring = berlin(crontab(30), "2026-03-29 00:00", "2026-03-29 05:00")
    assert spring == ["00:30+01", "01:30+01", "03:30+02", "04:30+02"]
    autumn = berlin(crontab(30), "2026-10-25 00:00", "2026-10-25 05:00")
    assert autumn == ["00:30+02", "01:30+02", "02:30+02", "02:30+01", "03:30+01", "04:30+01"]


def test_an_entry_of_every_n_minutes_in_certain_hours_goes_on_the_second_time() -> None:
    assert berlin(crontab("*/30", "1-3"), "2026-10-25 00:00", "2026-10-25 23:00") == [
        "01:00+02", "01:30+02", "02:00+02", "02:30+02", "02:00+01", "02:30+01", "03:00+01", "03:30+01",
    ]  # fmt: skip


def test_an_interval_counts_real_time_and_a_relative_day_is_a_calendar_day() -> None:
    day = timedelta(days=1)
    assert berlin(schedule(day), "2026-03-28 12:00", "2026-03-30 12:00") == ["13:00+02"]
    midnights = berlin(schedule(day, relative=True), "2026-03-28 12:00", "2026-03-31 12:00")
    assert midnights == ["00:00+01", "00:00+02", "00:00+02"]


@pytest.mark.parametrize("name", ["America/Havana", "America/Asuncion", "Asia/Beirut"])
def test_a_daily_entry_at_midnight_is_due_once_a_day_where_midnight_is_left_out_or_shown_twice(name: str) -> None:
    zone = ZoneInfo(name)
    start = datetime(2022, 1, 1, 12, tzinfo=zone)
    found = collect(crontab(0, 0), start, start + timedelta(days=365), zone)
    days = [each.astimezone(zone).date() for each in found]
    assert days == [start.date() + timedelta(days=number) for number in range(1, 366)]

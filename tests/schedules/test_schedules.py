"""Intervals, clocked and solar schedules, and what they share."""

from __future__ import annotations

import pickle
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any
from zoneinfo import ZoneInfo

import pytest

import amqtask
from amqtask.exceptions import ConfigurationError
from amqtask.schedules import ParseException, clocked, crontab, maybe_schedule, schedstate, schedule, solar, zone_named

UTC = timezone.utc


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def test_an_interval_counts_from_the_last_due_time() -> None:
    entry = schedule(10)
    assert entry.next_due(at("2026-05-04 07:00:03"), UTC) == at("2026-05-04 07:00:13")
    assert entry.latest_due(at("2026-05-04 07:00:03"), at("2026-05-04 08:00:00"), UTC) == at("2026-05-04 07:59:53")
    assert entry.latest_due(at("2026-05-04 07:00:03"), at("2026-05-04 07:00:12"), UTC) is None


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (timedelta(seconds=30), "2026-05-04 07:42:47"),
        (timedelta(minutes=10), "2026-05-04 07:52:00"),
        (timedelta(hours=2), "2026-05-04 09:00:00"),
        (timedelta(days=2), "2026-05-06 00:00:00"),
    ],
)
def test_a_relative_interval_is_rounded_down_to_its_resolution(interval: timedelta, expected: str) -> None:
    entry = schedule(interval, relative=True)
    assert entry.next_due(at("2026-05-04 07:42:17"), UTC) == at(expected)


def test_a_relative_hour_is_rounded_in_the_local_zone() -> None:
    entry = schedule(3600, relative=True)
    due = entry.next_due(at("2026-05-04 07:42:17"), ZoneInfo("Asia/Kathmandu"))
    assert due == at("2026-05-04 08:15")  # 14:00 there


@pytest.mark.parametrize("interval", [0, -1, None, "ten", timedelta(0), float("inf"), float("nan")])
def test_what_is_no_interval_is_an_error(interval: Any) -> None:
    with pytest.raises(ParseException, match="interval"):
        schedule(interval)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1, "1.00 second"), (10, "10.00 seconds"), (60, "1.00 minute"), (5400, "1.50 hours"), (86400, "1.00 day")],
)
def test_an_interval_says_how_long_it_is(seconds: float, text: str) -> None:
    assert schedule(seconds).human_seconds == text
    assert repr(schedule(seconds)) == f"<freq: {text}>"
    assert schedule(seconds).seconds == seconds


def test_intervals_are_equal_by_length_and_pickled() -> None:
    assert schedule(60) == schedule(timedelta(minutes=1)) == timedelta(minutes=1)
    assert schedule(60) != schedule(60, relative=True)
    assert schedule(60) != crontab()
    app: Any = object()
    copy = pickle.loads(pickle.dumps(schedule(60, relative=True, app=app)))
    assert copy == schedule(60, relative=True)
    assert copy.app is None


def test_is_due_answers_as_celery_does() -> None:
    entry = schedule(60, nowfun=lambda: at("2026-05-04 07:00:50"))
    assert entry.is_due(at("2026-05-04 07:00:00")) == schedstate(False, 10.0)
    assert entry.is_due(at("2026-05-04 06:59:50")) == schedstate(True, 60.0)
    assert entry.remaining_estimate(at("2026-05-04 07:00:00")) == timedelta(seconds=10)


def test_the_application_gives_now_zone_and_deadline() -> None:
    conf = SimpleNamespace(beat_cron_starting_deadline=300)
    app = SimpleNamespace(now=lambda: at("2026-05-04 07:07"), timezone=ZoneInfo("Asia/Shanghai"), conf=conf)
    daily = maybe_schedule(crontab(0, 15), app=app)
    assert daily.tz == app.timezone
    assert daily.is_due(at("2026-05-03 12:00")) == schedstate(False, timedelta(hours=23, minutes=53).total_seconds())
    conf.beat_cron_starting_deadline = 600
    assert daily.is_due(at("2026-05-03 12:00")).is_due


def test_maybe_schedule_takes_numbers_timedeltas_and_schedules() -> None:
    entry = crontab()
    assert maybe_schedule(None) is None
    assert maybe_schedule(30) == schedule(30)
    assert maybe_schedule(timedelta(hours=1), True) == schedule(3600, relative=True)
    assert maybe_schedule(entry) is entry
    with pytest.raises(ParseException, match="is not a schedule"):
        maybe_schedule("* * * * *")


def test_a_clocked_entry_is_due_once_also_when_its_time_has_passed_before_it_was_made() -> None:
    entry = clocked(at("2026-05-04 07:00"))
    assert entry.first_due(at("2026-05-05"), UTC) == at("2026-05-04 07:00")
    assert entry.next_due(at("2026-05-04 06:00"), UTC) == at("2026-05-04 07:00")
    assert entry.next_due(at("2026-05-04 07:00"), UTC) is None
    assert entry.latest_due(at("2026-05-01"), at("2026-05-05"), UTC) == at("2026-05-04 07:00")
    assert pickle.loads(pickle.dumps(entry)) == entry


def test_the_sun_sets_in_greenwich() -> None:
    entry = solar("sunset", 51.48, 0.0)
    due = entry.next_due(at("2026-06-21 12:00"), UTC)
    assert due is not None
    assert abs(due - at("2026-06-21 20:21")) < timedelta(minutes=3)
    following = entry.next_due(due, UTC)
    assert following is not None
    assert abs(following - due - timedelta(days=1)) < timedelta(minutes=3)
    assert entry.next_due(due - timedelta(seconds=1), UTC) == due
    assert entry.latest_due(at("2026-06-01"), following, UTC) == following
    assert repr(entry) == "<solar: sunset at latitude 51.48, longitude: 0.0>"
    assert pickle.loads(pickle.dumps(entry)) == entry


def test_the_events_of_a_day_come_in_their_order() -> None:
    names = ["dawn_astronomical", "dawn_nautical", "dawn_civil", "sunrise", "solar_noon"]
    names += ["sunset", "dusk_civil", "dusk_nautical", "dusk_astronomical"]
    dues = [solar(name, 48.1, 11.6).next_due(at("2026-03-20"), UTC) for name in names]
    assert None not in dues
    assert dues == sorted(dues)  # type: ignore[type-var]


def test_where_the_sun_does_not_rise_the_next_day_that_it_does_counts() -> None:
    due = solar("sunrise", 69.65, 18.96).next_due(at("2026-12-10"), UTC)  # Tromsø's polar night
    assert due is not None
    assert at("2027-01-10") < due < at("2027-01-25")


@pytest.mark.parametrize(("event", "lat", "lon"), [("noon", 0, 0), ("sunset", 91, 0), ("sunset", 0, -181)])
def test_what_is_no_event_or_place_is_an_error(event: str, lat: float, lon: float) -> None:
    with pytest.raises(ParseException, match="solar"):
        solar(event, lat, lon)


def test_a_zone_that_is_not_known_is_an_error_that_says_what_to_do() -> None:
    assert zone_named("utc") is zone_named("UTC") is crontab().tz is ZoneInfo("UTC")  # programs ask it for its key
    with pytest.raises(ConfigurationError, match="tzdata"):
        zone_named("Europe/Nowhere")


def test_crontab_is_a_public_name() -> None:
    assert amqtask.crontab is crontab

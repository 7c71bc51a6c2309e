"""crontab: what its fields mean, and when it is due."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from datetime import datetime, timedelta, timezone

import pytest

from amqtask.schedules import ParseException, crontab, crontab_parser, schedstate

UTC = timezone.utc


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def dues(entry: crontab, after: str, count: int) -> list[str]:
    moment, found = at(after), []
    for _ in range(count):
        following = entry.next_due(moment, UTC)
        assert following is not None
        moment = following
        found.append(moment.strftime("%Y-%m-%d %H:%M"))
    return found


@pytest.mark.parametrize(
    ("spec", "low", "high", "expected"),
    [
        ("*/15", 0, 60, {0, 15, 30, 45}),
        ("1,13,30-33,50-59/4", 0, 60, {1, 13, 30, 31, 32, 33, 50, 54, 58}),
        ("22-2", 0, 24, {22, 23, 0, 1, 2}),
        ("mon-fri", 0, 7, {1, 2, 3, 4, 5}),
        ("fri-mon", 0, 7, {5, 6, 0, 1}),
        ("Sunday,wed", 0, 7, {0, 3}),
        ("2-12/2", 1, 12, {2, 4, 6, 8, 10, 12}),
        ("sept-nov", 1, 12, {9, 10, 11}),
        ("*", 1, 31, set(range(1, 32))),
        ("*/3", 1, 31, {1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31}),
    ],
)
def test_an_expression_stands_for_numbers(spec: str, low: int, high: int, expected: set[int]) -> None:
    assert crontab_parser(high, low).parse(spec) == expected


@pytest.mark.parametrize(
    "spec", ["", "*/", "*/0", "5/10", "60", "1,,2", "-5", "1-", "x", "a-b", "*/x", "1-70", "*5", "1-2-3", "2.5"]
)
def test_an_expression_that_means_nothing_is_an_error_that_names_the_field(spec: str) -> None:
    with pytest.raises(ParseException, match="minute"):
        crontab(minute=spec)


@pytest.mark.parametrize("spec", [[], [60], {-1}, [1, "x"], range(58, 62)])
def test_numbers_out_of_range_are_errors(spec: Iterable[int]) -> None:
    with pytest.raises(ParseException, match="minute"):
        crontab(minute=spec)


@pytest.mark.parametrize("spec", [1.5, True, object()])
def test_what_is_no_field_is_a_type_error(spec: object) -> None:
    with pytest.raises(TypeError, match="hour must be"):
        crontab(hour=spec)  # type: ignore[arg-type]


def test_a_date_that_never_comes_is_an_error() -> None:
    with pytest.raises(ParseException, match="never occurs"):
        crontab(0, 0, day_of_month=30, month_of_year="feb")


def test_fields_may_be_ints_expressions_and_any_iterable() -> None:
    entry = crontab(minute=range(0, 60, 20), hour={7}, day_of_week="mon", day_of_month=iter([1, 2]), month_of_year=[3])
    assert entry.minute == {0, 20, 40}
    assert entry.hour == {7}
    assert entry.day_of_week == {1}
    assert entry.day_of_month == {1, 2}
    assert entry.month_of_year == {3}


def test_a_line_has_the_order_of_cron_and_celerys_constructor_its_own() -> None:
    assert crontab.from_string("5 4 3 2 mon") == crontab(5, 4, "mon", 3, 2)
    with pytest.raises(ParseException, match="4 fields, not 5"):
        crontab.from_string("5 4 3 2")


def test_due_times_are_strictly_after_the_moment() -> None:
    entry = crontab(minute=30, hour=7)
    assert entry.next_due(at("2026-05-04 07:29:59.999999"), UTC) == at("2026-05-04 07:30")
    assert entry.next_due(at("2026-05-04 07:30"), UTC) == at("2026-05-05 07:30")


@pytest.mark.parametrize(
    ("entry", "after", "expected"),
    [
        (crontab(), "2026-12-31 23:58:30", ["2026-12-31 23:59", "2027-01-01 00:00"]),
        (crontab(0, 0, day_of_month=31), "2026-01-31 00:00", ["2026-03-31 00:00", "2026-05-31 00:00"]),
        (crontab(0, 12, "mon", "1-7"), "2026-01-01", ["2026-01-05 12:00", "2026-02-02 12:00"]),
        (crontab(0, 0, day_of_month=29, month_of_year=2), "2024-02-29", ["2028-02-29 00:00", "2032-02-29 00:00"]),
        (crontab("0,30", "8-10", "mon-fri"), "2026-05-01 10:00", ["2026-05-01 10:30", "2026-05-04 08:00"]),
    ],
)
def test_due_times_follow_the_calendar(entry: crontab, after: str, expected: list[str]) -> None:
    assert dues(entry, after, len(expected)) == expected


def test_the_29th_of_february_on_a_sunday_is_found_across_a_century_without_leap_day() -> None:
    entry = crontab(0, 0, "sun", 29, 2)
    due = entry.next_due(at("2088-03-01"), UTC)
    assert due is not None
    assert (due.month, due.day, due.isoweekday()) == (2, 29, 7)


def test_the_one_to_catch_up_with_is_the_last() -> None:
    entry = crontab(minute="*/10")
    assert entry.latest_due(at("2020-01-01"), at("2026-05-04 07:29"), UTC) == at("2026-05-04 07:20")
    assert entry.latest_due(at("2026-05-04 07:20"), at("2026-05-04 07:29"), UTC) is None
    assert entry.latest_due(at("2026-05-04 07:19"), at("2026-05-04 07:20"), UTC) == at("2026-05-04 07:20")
    yearly = crontab(5, 4, day_of_month=3, month_of_year=2)
    assert yearly.latest_due(at("2020-01-01"), at("2026-01-01"), UTC) == at("2025-02-03 04:05")


def test_is_due_answers_as_celery_does() -> None:
    entry = crontab(minute=30, hour="*", nowfun=lambda: at("2026-05-04 07:40"))
    assert entry.is_due(at("2026-05-04 07:00")) == schedstate(True, 50 * 60.0)
    assert entry.is_due(at("2026-05-04 07:30")) == schedstate(False, 50 * 60.0)
    assert entry.remaining_estimate(at("2026-05-04 07:00")) == timedelta(minutes=-10)
    assert entry.is_due(datetime(2026, 5, 4, 7)).is_due


def test_a_zone_of_its_own_wins_over_the_applications() -> None:
    entry = crontab(0, 9, tz="Asia/Shanghai")
    assert entry.next_due(at("2026-05-04"), UTC) == at("2026-05-04 01:00")
    assert "Asia/Shanghai" in repr(entry)


def test_equality_hash_repr_and_pickle() -> None:
    entry = crontab(minute="*/15", hour=[4], tz="Europe/Berlin")
    assert entry == crontab(minute="0,15,30,45", hour=4, tz="Europe/Berlin")
    assert entry != crontab(minute="*/15", hour=4)
    assert hash(entry) == hash(crontab(minute="0-59/15", hour=4, tz="Europe/Berlin"))
    copy = pickle.loads(pickle.dumps(entry))
    assert copy == entry
    assert repr(copy) == repr(entry)
    assert copy.next_due(at("2026-05-04"), UTC) == entry.next_due(at("2026-05-04"), UTC)
    assert repr(crontab("0", "4", "*")) == "<crontab: 0 4 * * * (m/h/dM/MY/d)>"

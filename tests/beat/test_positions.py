"""Positions as they travel through the broker."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amqtask.beat.contract import Entry
from amqtask.beat.scheduler import Position, Scheduler, decode_positions, encode_positions, merged_positions
from amqtask.schedules import crontab, schedule

NOW = datetime(2026, 5, 4, 12, tzinfo=timezone.utc)
POSITIONS = st.builds(
    Position,
    st.datetimes(min_value=datetime(2000, 1, 1), max_value=datetime(2100, 1, 1), timezones=st.just(timezone.utc)),
    st.integers(0, 10**9),
    st.booleans(),
)


@given(st.dictionaries(st.text(), POSITIONS, max_size=5))
def test_what_was_written_is_read(positions: dict[str, Position]) -> None:
    assert decode_positions(encode_positions(positions)) == positions


def test_more_than_we_know_is_no_mistake() -> None:
    assert decode_positions(b'{"v": 2, "new": 1, "entries": {"a": ["2026-05-04T12:00:00+00:00", 3, 1, "more"]}}') == {
        "a": Position(NOW, 3, True)
    }


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"entries": {"a": [1]}}',
        b'{"entries": {"a": ["2026"]}}',
        b'{"entries": {"a": ["0001-01-01T00:00:00+23:59"]}}',
        b'{"entries": {"a": ["9999-12-31T23:59:59-23:59"]}}',
        b'{"entries": {"a": ["0001-01-02T00:00:00+00:00"]}}',
        b'{"entries": {"a": ["9999-12-30T00:00:00+00:00"]}}',
    ],
)
def test_what_is_no_state_is_a_value_error(body: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of whatever kind
        decode_positions(body)


@pytest.mark.parametrize("since", ["1970-01-02T00:00:00+00:00", "8999-12-31T00:00:00-12:00"])
@pytest.mark.parametrize("runs_at", [schedule(10), crontab(minute="5", hour="3"), crontab(day_of_month="31")])
@pytest.mark.parametrize("zone", ["UTC", "Pacific/Kiritimati", "America/Los_Angeles"])
def test_a_state_of_another_century_keeps_no_entry_from_running(
    since: str, runs_at: Any, zone: str, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = Scheduler(ZoneInfo(zone))
    scheduler.update([Entry(name="a", task="task", schedule=runs_at)], NOW)
    state = decode_positions(
        b'{"entries": {"a": ["%s", 3, 1], "other": ["%s", 3, 1]}}' % (since.encode(), since.encode())
    )

    scheduler.resume([state], NOW)
    for due in scheduler.take(NOW):
        scheduler.advance(due)

    assert scheduler.next_at is not None
    assert scheduler.next_at < NOW + timedelta(days=62)
    assert set(scheduler.positions) == {"a"}
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_number_of_runs_that_nobody_can_store_is_cut() -> None:
    digits = b"9" * 4300
    at = b"2026-05-04T12:00:00+00:00"
    read = decode_positions(b'{"entries": {"a": ["%s", %s, 1], "b": ["%s", -5]}}' % (at, digits, at))

    assert [position.total_run_count for position in read.values()] == [2**31 - 1, 0]


@given(st.lists(st.dictionaries(st.sampled_from("ab"), POSITIONS), max_size=4))
def test_merging_does_not_depend_on_the_order(states: list[dict[str, Position]]) -> None:
    assert merged_positions(states) == merged_positions(reversed(states))
    assert merged_positions([merged_positions(states), *states]) == merged_positions(states)


def test_who_ran_stands_further_than_who_was_seen_later() -> None:
    ran, seen = Position(NOW, 1, True), Position(NOW + timedelta(days=1))
    assert merged_positions([{"a": seen}, {"a": ran}]) == {"a": ran}

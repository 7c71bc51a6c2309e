"""The counting of integration.flow_soak, which nothing else would notice to be wrong."""

from __future__ import annotations

import pytest

from integration.flow_soak import Report, Row, most_at_once, most_within, share_used


def test_runs_at_once_are_counted() -> None:
    assert most_at_once([]) == 0
    assert most_at_once([(0, 2), (1, 3), (2, 4), (5, 6)]) == 2  # one that ends makes room at that time
    assert most_at_once([(0, 9), (1, 9), (2, 3)]) == 3


def test_the_used_part_of_a_limit_is_that_of_a_time() -> None:
    assert share_used([(0, 10), (0, 10)], 2, 0, 10) == 1
    assert share_used([(0, 10), (5, 20)], 2, 0, 10) == pytest.approx(0.75)
    assert share_used([(0, 10)] * 3, 2, 0, 20) == pytest.approx(0.5)
    assert share_used([(-5, 5)], 1, 0, 10) == pytest.approx(0.5)


def test_what_begins_within_a_time_is_counted() -> None:
    assert most_within([], 10) == 0
    assert most_within([0, 1, 2, 11, 12, 13, 14], 3) == 4


def test_a_report_is_right_where_nothing_was_exceeded_lost_or_doubled() -> None:
    row = Row("limited", 10, 11, 1, "8 at once", 8, True, 0.97, 0)
    booked = Row("booked", 10, 10, 0, "", 0, True, None, 0, 0)

    assert Report([row, booked], 2, 1, 0, 5.0).is_right
    assert not Report([Row("limited", 10, 11, 1, "8 at once", 9, False, 0.97, 0)], 2, 1, 0, 5.0).is_right
    assert not Report([Row("booked", 10, 10, 0, "", 0, True, None, 0, 1)], 2, 1, 0, 5.0).is_right
    assert not Report([row], 2, 1, 1, 5.0).is_right
    assert "97.0%" in str(Report([row, booked], 2, 1, 0, 5.0))

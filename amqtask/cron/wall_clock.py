"""Readings of a wall clock in a time zone, and the moments they stand for, also where the clock is put on or back.

A clock that is put on leaves readings out; one that is put back shows some twice (PEP 495). All moments are in UTC and
whole seconds apart from what the caller brought; zones are zoneinfo's (any tzinfo that honours `fold` will do).
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone, tzinfo
from typing import NamedTuple

_SECOND = timedelta(seconds=1)


class Moments(NamedTuple):
    """The moments at which a clock shows a reading."""

    first: datetime  # for one that is left out: the moment at which the clock jumps over it
    second: datetime | None  # the second time, when it is shown twice
    is_shown: bool


def moments_of(reading: datetime, zone: tzinfo) -> Moments:
    """The moments at which a clock in `zone` shows `reading` (a naive datetime)."""
    before, after = _offset_of(reading, zone, 0), _offset_of(reading, zone, 1)
    if before == after:
        return Moments(_utc(reading - before), None, True)
    if before > after:
        return Moments(_utc(reading - before), _utc(reading - after), True)
    return Moments(change_between(_utc(reading - after), _utc(reading - before), zone), None, False)


def reading_at(moment: datetime, zone: tzinfo) -> datetime:
    """What a clock in `zone` shows at `moment` (its `fold` is kept: 1 the second time)."""
    return moment.astimezone(zone).replace(tzinfo=None)


class SecondShowing(NamedTuple):
    """The readings that are about to be shown again."""

    start: datetime  # the first of them
    end: datetime  # the first that is not
    offset: timedelta  # of the zone, when they are shown again


def second_showing(moment: datetime, zone: tzinfo) -> SecondShowing | None:
    """When `moment` lies where readings are shown for the first of two times: what is shown again; else None."""
    reading = reading_at(moment, zone)
    if reading.fold:
        return None
    before, after = _offset_of(reading, zone, 0), _offset_of(reading, zone, 1)
    if before <= after:
        return None
    change = change_between(moment, moment + (before - after), zone)
    start = change.replace(tzinfo=None) + after
    return SecondShowing(start, start + (before - after), after)


def change_between(low: datetime, high: datetime, zone: tzinfo) -> datetime:
    """The first moment after `low` with the offset that `zone` has at `high`, which differs from that at `low`."""
    offset = high.astimezone(zone).utcoffset()
    # Clocks change on whole seconds (on whole minutes, for a century); `low` may carry a fraction.
    low = low.replace(microsecond=0)
    steps = -(-(high - low) // _SECOND)
    first, last = 0, steps
    while last - first > 1:
        middle = (first + last) // 2
        if (low + middle * _SECOND).astimezone(zone).utcoffset() == offset:
            last = middle
        else:
            first = middle
    return low + last * _SECOND


def _offset_of(reading: datetime, zone: tzinfo, fold: int) -> timedelta:
    offset = reading.replace(tzinfo=zone, fold=fold).utcoffset()
    return offset if offset is not None else timedelta(0)


def _utc(naive: datetime) -> datetime:
    return naive.replace(tzinfo=timezone.utc, fold=0)

"""What a crontab's fields say: expressions read into sets of numbers, and the next matching reading of a clock; that clock; and
the sun.

Pure. A "reading" is a naive datetime, what a clock on the wall shows. The grammar is Celery's
(celery/schedules.py, crontab_parser): `*`, numbers, names, `a-b` (also around the end: `fri-mon`, `22-2`), `/step` after
`*` or a range, and lists of these. Unlike cron, day of month and day of week must both match.

Readings of a wall clock in a time zone stand for moments, also where the clock is put on or back. A clock that is put on leaves
readings out; one that is put back shows some twice (PEP 495). All moments are in UTC and whole seconds apart from what the caller
brought; zones are zoneinfo's (any tzinfo that honours `fold` will do).
"""

from __future__ import annotations

from bisect import bisect_left
from calendar import monthrange
from collections.abc import Iterable
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from typing import Any, NamedTuple

from amqtask.exceptions import ConfigurationError

_SECOND = timedelta(seconds=1)
FieldSpec = int | str | Iterable[int]
DAY_NAMES = ("sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday")
MONTH_NAMES = (
    "january", "february", "march", "april", "may", "june",
    "july", "august", "september", "october", "november", "december",
)  # fmt: skip
_MINUTE = timedelta(minutes=1)
_DAYS_IN_MONTH = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
# The 29th of February on a given day of the week comes again after 40 years at the latest (across 2100, 2200 …).
_LONGEST_WAIT_YEARS = 41


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


class ParseException(ConfigurationError, ValueError):
    """A schedule that cannot be read; the message names the field and what is allowed there."""


class Field(NamedTuple):
    """One field of a crontab: its name for people, its smallest and largest number, and names for its numbers."""

    name: str
    low: int
    high: int
    value_names: tuple[str, ...] = ()

    def parse(self, spec: FieldSpec) -> frozenset[int]:
        """The numbers that a field's value stands for. Raises: ParseException, TypeError for what is no field at all."""
        if isinstance(spec, bool) or not isinstance(spec, (int, str, Iterable)):
            raise TypeError(
                f"crontab: {self.name} must be an int, a str or an iterable of ints, not {type(spec).__name__}"
            )
        if isinstance(spec, str):
            numbers = {number for part in spec.replace(" ", "").split(",") for number in self._part(part, spec)}
        else:
            numbers = {self._checked(number, spec) for number in ([spec] if isinstance(spec, int) else spec)}
        if not numbers:
            raise ParseException(f"crontab: {self.name} names no value at all")
        return frozenset(numbers)

    def _part(self, part: str, spec: str) -> list[int]:
        span, slash, step = part.partition("/")
        first, dash, last = span.partition("-")
        if span == "*":
            numbers = list(range(self.low, self.high + 1))
        elif dash:
            numbers = self._range(self._number(first, spec), self._number(last, spec))
        elif slash:
            raise ParseException(f"crontab: {self.name} {spec!r}: a step follows * or a range, as in */5 or 10-50/5")
        else:
            return [self._number(span, spec)]
        if not slash:
            return numbers
        if not step.isdecimal() or int(step) == 0:
            raise ParseException(f"crontab: {self.name} {spec!r}: the step after / must be a number above 0")
        return numbers[:: int(step)]

    def _range(self, first: int, last: int) -> list[int]:
        if last >= first:
            return list(range(first, last + 1))
        return [*range(first, self.high + 1), *range(self.low, last + 1)]

    def _number(self, text: str, spec: str) -> int:
        if text.isdecimal():
            return self._checked(int(text), spec)
        for number, name in enumerate(self.value_names, self.low):
            if len(text) >= 3 and name.startswith(text.lower()):
                return number
        raise ParseException(f"crontab: {self.name} {spec!r}: {text or 'an empty part'!r} is not a {self._allowed()}")

    def _checked(self, number: object, spec: object) -> int:
        if isinstance(number, str):
            return self._number(number, number)
        if not isinstance(number, int) or not self.low <= number <= self.high:
            raise ParseException(f"crontab: {self.name} {spec!r}: {number!r} is not a {self._allowed()}")
        return number

    def _allowed(self) -> str:
        named = f", nor a name such as {self.value_names[0][:3]}" if self.value_names else ""
        return f"number from {self.low} to {self.high}{named}"


MINUTE = Field("minute", 0, 59)
HOUR = Field("hour", 0, 23)
DAY_OF_WEEK = Field("day_of_week", 0, 6, DAY_NAMES)
DAY_OF_MONTH = Field("day_of_month", 1, 31)
MONTH_OF_YEAR = Field("month_of_year", 1, 12, MONTH_NAMES)


class Readings:
    """The readings of a clock at which a crontab is due."""

    def __init__(
        self,
        minutes: frozenset[int],
        hours: frozenset[int],
        weekdays: frozenset[int],
        days: frozenset[int],
        months: frozenset[int],
    ) -> None:
        if not any(day <= _DAYS_IN_MONTH[month - 1] for month in months for day in days):
            raise ParseException(f"crontab: day_of_month {sorted(days)} never occurs in month_of_year {sorted(months)}")
        self._times = [time(hour, minute) for hour in sorted(hours) for minute in sorted(minutes)]
        self._weekdays = weekdays
        self._days = sorted(days)
        self._months = sorted(months)

    def after(self, reading: datetime) -> datetime | None:
        """The first one after `reading`; None when no such day comes before the end of the calendar."""
        start = reading.replace(second=0, microsecond=0) + _MINUTE
        today = start.date()
        if self._is_day(today):
            index = bisect_left(self._times, start.time())
            if index < len(self._times):
                return datetime.combine(today, self._times[index])
        day = self._day_after(today)
        return datetime.combine(day, self._times[0]) if day is not None else None

    def _is_day(self, day: date) -> bool:
        return day.month in self._months and day.day in self._days and day.isoweekday() % 7 in self._weekdays

    def _day_after(self, today: date) -> date | None:
        for year in range(today.year, min(today.year + _LONGEST_WAIT_YEARS, 9999)):
            for month in self._months:
                if (year, month) < (today.year, today.month):
                    continue
                longest = monthrange(year, month)[1]
                for number in self._days:
                    if number <= longest and (day := date(year, month, number)) > today and self._is_day(day):
                        return day
        return None


# -- When the sun rises, sets and stands: one pure question to ephem, which is optional (extra `solar`).

SEARCH_DAYS = 366


class SolarEvent(NamedTuple):
    """How ephem finds an event: its method, horizon and centre."""

    method: str  # of ephem.Observer
    horizon: str  # degrees
    use_center: bool


_RISING, _SETTING = "next_rising", "next_setting"
# The sun's disc touches the horizon at -0:34 (refraction); twilights count its centre (ephem's documentation).
EVENTS = {
    "dawn_astronomical": SolarEvent(_RISING, "-18", True),
    "dawn_nautical": SolarEvent(_RISING, "-12", True),
    "dawn_civil": SolarEvent(_RISING, "-6", True),
    "sunrise": SolarEvent(_RISING, "-0:34", False),
    "solar_noon": SolarEvent("next_transit", "0", False),
    "sunset": SolarEvent(_SETTING, "-0:34", False),
    "dusk_civil": SolarEvent(_SETTING, "-6", True),
    "dusk_nautical": SolarEvent(_SETTING, "-12", True),
    "dusk_astronomical": SolarEvent(_SETTING, "-18", True),
}


def event_after(name: str, lat: float, lon: float, start: datetime) -> datetime | None:
    """The first event after `start` (UTC) at a place, in whole seconds; days without one (polar night) are left out.

    None when there is none within SEARCH_DAYS.
    """
    ephem = load_ephem()
    event = EVENTS[name]
    observer = ephem.Observer()
    observer.lat, observer.lon, observer.elev = str(lat), str(lon), 0
    observer.horizon, observer.pressure = event.horizon, 0
    sun = ephem.Sun()
    options = {"use_center": True} if event.use_center else {}
    moment = ephem.Date(start.replace(tzinfo=None))
    for _ in range(SEARCH_DAYS):
        try:
            event_time: datetime = getattr(observer, event.method)(sun, start=moment, **options).datetime()
        except ephem.CircumpolarError:
            moment = observer.next_antitransit(sun, start=moment)
        else:
            return event_time.replace(microsecond=0, tzinfo=timezone.utc)
    return None


def load_ephem() -> Any:
    """The library. Raises: ConfigurationError when it is not installed."""
    try:
        import ephem
    except ImportError as error:
        raise ConfigurationError("solar schedules need ephem: pip install amqtask[solar]") from error
    return ephem

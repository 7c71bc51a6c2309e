"""When periodic tasks are due: `schedule` (an interval), `crontab`, `solar`, `clocked`. Names as in celery.schedules.

All rests on one pure question that every schedule answers: `next_due(after, zone)`, the first due time strictly after a
moment. It looks at no clock and gives the same answer to everybody who asks, so that two schedulers agree on what is due
and a run has an identity: its entry and its due time. `is_due` and `remaining_estimate`, Celery's names, are that
question asked about now.

Where the clocks change (crontab):

* A reading that the clock leaves out (02:30, when 02:00 becomes 03:00) is due at the moment of the change; several of one
  entry there are due once. An entry of every hour (`hour` matches all 24) has its next hour then, and leaves it out.
* A reading that the clock shows twice is due the first time. Entries of every hour, and those whose `minute` is `*` or
  `*/N`, go on the second time too.
* Intervals count real time; `relative` ones are rounded down to the local day, hour or minute.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone, tzinfo
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from amqtask import cron
from amqtask.cron import ParseException
from amqtask.exceptions import ConfigurationError
from amqtask.ground.printable import count, described

__all__ = [
    "BaseSchedule", "ParseException", "clocked", "crontab", "crontab_parser", "maybe_schedule", "schedstate",
    "schedule", "solar", "zone_named",
]  # fmt: skip

_MINUTE = timedelta(minutes=1)
_HOUR = timedelta(hours=1)
_DAY = timedelta(days=1)
# What `is_due` answers for "never again": look once more in a day.
_LOOK_AGAIN = 86400.0


class schedstate(NamedTuple):
    """Celery's answer of `is_due`: whether to run now, and in how many seconds to look again."""

    is_due: bool
    next: float


def zone_named(name: str | tzinfo) -> tzinfo:
    """A time zone by its name ("Europe/Berlin"). Raises: ConfigurationError for one that this machine does not know."""
    if isinstance(name, tzinfo):
        return name
    is_utc = name.upper() == "UTC"
    try:
        return ZoneInfo("UTC" if is_utc else name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        if is_utc:  # also where the machine knows no other
            return timezone.utc
        raise ConfigurationError(
            f"no time zone {name!r} here: say one such as Europe/Berlin; if it is right, install the system's tzdata "
            "or `pip install tzdata`"
        ) from error


if TYPE_CHECKING:

    class ScheduleApp(Protocol):
        """The application, as a schedule asks it: for the time, its zone and the settings."""

        @property
        def timezone(self) -> tzinfo: ...

        @property
        def conf(self) -> Any: ...

        def now(self) -> datetime: ...


class BaseSchedule:
    """What all schedules share. A schedule of your own derives from it and defines `next_due`.

    `nowfun` returns the present time, for `is_due`; `app` is asked for it (and for the time zone) else. `tz`, a zone or
    its name, makes a schedule's clock its own instead of the application's.
    """

    nowfun: Callable[[], datetime] | None = None
    app: ScheduleApp | None = None
    relative: bool = False
    _tz: tzinfo | None = None

    def __init__(
        self,
        nowfun: Callable[[], datetime] | None = None,
        app: ScheduleApp | None = None,
        tz: str | tzinfo | None = None,
    ) -> None:
        self.nowfun = nowfun
        self.app = app
        if tz is not None:  # a class of one's own may have set it before
            self.tz = tz

    # -- the question

    def next_due(self, after: datetime, zone: tzinfo) -> datetime | None:
        """The first due time strictly after `after` (aware), in UTC; None when there is none. `zone` is the application's."""
        raise NotImplementedError

    def first_due(self, appeared_at: datetime, zone: tzinfo) -> datetime | None:
        """The first due time of an entry that appeared at `appeared_at` and never ran."""
        return due_after(self, appeared_at, zone)

    def latest_due(self, after: datetime, until: datetime, zone: tzinfo) -> datetime | None:
        """The last due time after `after` that is not after `until`: the one to catch up with; None when there is none."""
        latest = due_after(self, after, zone)
        if latest is None or latest > until:
            return None
        span = _MINUTE
        while until - span > latest:
            late = due_after(self, until - span, zone)
            if late is not None and late <= until:
                latest = late
                break
            span *= 2
        while (following := due_after(self, latest, zone)) is not None and following <= until:
            latest = following
        return latest

    # -- Celery's names

    def now(self) -> datetime:
        """The present time, aware."""
        if self.nowfun is not None:
            return _aware(self.nowfun())
        return _aware(self.app.now()) if self.app is not None else datetime.now(timezone.utc)

    @property
    def tz(self) -> tzinfo:
        """The time zone of this schedule."""
        if self._tz is not None:
            return self._tz
        zone: tzinfo = self.app.timezone if self.app is not None else zone_named("UTC")
        return zone

    @tz.setter
    def tz(self, zone: str | tzinfo | None) -> None:
        self._tz = zone_named(zone) if zone is not None else None

    # Times are reckoned in UTC, whatever a schedule's clock shows.
    utc_enabled = True

    def maybe_make_aware(self, dt: datetime, naive_as_utc: bool = True) -> datetime:
        """With a time zone: its own, or UTC (the schedule's without `naive_as_utc`) for one that has none."""
        return dt if dt.tzinfo is not None else dt.replace(tzinfo=timezone.utc if naive_as_utc else self.tz)

    def to_local(self, dt: datetime) -> datetime:
        """The moment in the time zone of this schedule."""
        return _aware(dt).astimezone(self.tz)

    def remaining_estimate(self, last_run_at: datetime) -> timedelta:
        """How long until it is due after a run at `last_run_at` (a naive one is UTC); negative when it is overdue."""
        due = self.next_due(_aware(last_run_at), self.tz)
        return (due if due is not None else datetime.max.replace(tzinfo=timezone.utc)) - self.now()

    def is_due(self, last_run_at: datetime) -> schedstate:
        """Whether it is due now after a run at `last_run_at`, and in how many seconds to look again."""
        now, zone = self.now(), self.tz
        due = self.next_due(_aware(last_run_at), zone)
        if due is not None and due > now:
            return schedstate(False, (due - now).total_seconds())
        following = self.next_due(now, zone)
        return schedstate(due is not None, (following - now).total_seconds() if following else _LOOK_AGAIN)

    def _zone_or(self, zone: tzinfo) -> tzinfo:
        return self._tz if self._tz is not None else zone

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "app": None}


class schedule(BaseSchedule):
    """Every `run_every` (seconds or a timedelta), counted from the last due time.

    `relative=True` rounds due times down to the resolution of the interval: one of hours is due on the hour, one of days
    at midnight. Raises: ParseException for an interval that is not above 0.
    """

    def __init__(
        self,
        run_every: float | timedelta | None = None,
        relative: bool = False,
        nowfun: Callable[[], datetime] | None = None,
        app: ScheduleApp | None = None,
        tz: str | tzinfo | None = None,
    ) -> None:
        super().__init__(nowfun, app, tz)
        self.run_every = _interval(run_every)
        self.relative = bool(relative)

    def next_due(self, after: datetime, zone: tzinfo) -> datetime:
        """One interval later; rounded down to the local day, hour or minute when `relative`."""
        after = after.astimezone(timezone.utc)
        if not self.relative or self.run_every < _MINUTE:
            return after + self.run_every
        return _rounded_down(after, self.run_every, self._zone_or(zone))

    def latest_due(self, after: datetime, until: datetime, zone: tzinfo) -> datetime | None:
        """The last whole number of intervals after `after`."""
        first = self.next_due(after, zone)
        if first > until:
            return None
        due = first + (until - first) // self.run_every * self.run_every
        if not self.relative or self.run_every < _MINUTE:
            return due
        # Rounding may have moved it out of step with the clock by up to one interval.
        rounded = self.next_due(due - self.run_every, zone)
        return rounded if first <= rounded <= until else first

    @property
    def seconds(self) -> float:
        """The interval in seconds."""
        return self.run_every.total_seconds()

    @property
    def human_seconds(self) -> str:
        """The interval for people: "10.00 seconds", "2.00 hours"."""
        for unit, size in (("day", 86400.0), ("hour", 3600.0), ("minute", 60.0)):
            if self.seconds >= size:
                number = self.seconds / size
                return f"{number:.2f} {unit}{'' if number == 1 else 's'}"
        return f"{self.seconds:.2f} second{'' if self.seconds == 1 else 's'}"

    def __repr__(self) -> str:
        return f"<freq: {self.human_seconds}{' relative' if self.relative else ''}>"

    def __eq__(self, other: object) -> bool:
        if isinstance(other, schedule):
            return self.run_every == other.run_every and self.relative == other.relative
        return self.run_every == other if isinstance(other, timedelta) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.run_every)


class _AtTimes(BaseSchedule):
    """A schedule that is equal to another one with the same key."""

    @property
    def _key(self) -> tuple[Any, ...]:
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        return self._key == other._key if isinstance(other, type(self)) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key)


class crontab(_AtTimes):
    """As in crontab(5): `crontab(hour=7, minute=30, day_of_week="mon-fri")`; a field that is left out is `*`.

    Each field takes an int, an expression (`"*/15"`, `"1,13,30-45"`, `"mon-fri"`) or an iterable of ints; days of the week
    run from 0, Sunday. All fields must match. Raises: ParseException, TypeError.
    """

    def __init__(
        self,
        minute: cron.FieldSpec = "*",
        hour: cron.FieldSpec = "*",
        day_of_week: cron.FieldSpec = "*",
        day_of_month: cron.FieldSpec = "*",
        month_of_year: cron.FieldSpec = "*",
        *,
        nowfun: Callable[[], datetime] | None = None,
        app: ScheduleApp | None = None,
        tz: str | tzinfo | None = None,
    ) -> None:
        super().__init__(nowfun, app, tz)
        specs = [_kept(spec) for spec in (minute, hour, day_of_week, day_of_month, month_of_year)]
        self._orig_minute, self._orig_hour, self._orig_day_of_week = specs[:3]
        self._orig_day_of_month, self._orig_month_of_year = specs[3:]
        self.minute = set(cron.MINUTE.parse(specs[0]))
        self.hour = set(cron.HOUR.parse(specs[1]))
        self.day_of_week = set(cron.DAY_OF_WEEK.parse(specs[2]))
        self.day_of_month = set(cron.DAY_OF_MONTH.parse(specs[3]))
        self.month_of_year = set(cron.MONTH_OF_YEAR.parse(specs[4]))
        self._readings = cron.Readings(
            frozenset(self.minute),
            frozenset(self.hour),
            frozenset(self.day_of_week),
            frozenset(self.day_of_month),
            frozenset(self.month_of_year),
        )
        self._is_hourly = len(self.hour) == 24
        self._goes_on = self._is_hourly or (isinstance(specs[0], str) and specs[0].strip().startswith("*"))

    @classmethod
    def from_string(cls, crontab: str) -> crontab:
        """From one line: minute, hour, day of month, month, day of week. Raises: ParseException."""
        fields = crontab.split()
        if len(fields) != 5:
            raise ParseException(
                f"crontab {crontab!r} has {count(len(fields), 'field')}, not 5: "
                "minute hour day_of_month month_of_year day_of_week"
            )
        minute, hour, day_of_month, month_of_year, day_of_week = fields
        return cls(minute, hour, day_of_week, day_of_month, month_of_year)

    def next_due(self, after: datetime, zone: tzinfo) -> datetime | None:
        """The next matching reading of the clock in `tz`, else in `zone`; see the module for clock changes."""
        zone = self._zone_or(zone)
        after = after.astimezone(timezone.utc)
        due = self._first_showing(after, zone)
        if self._goes_on and (shown := cron.second_showing(after, zone)) is not None:
            second_reading = self._readings.after(shown.start - timedelta(microseconds=1))
            if second_reading is not None and second_reading < shown.end:
                moment = (second_reading - shown.offset).replace(tzinfo=timezone.utc)
                return moment if due is None else min(due, moment)
        return due

    def _first_showing(self, after: datetime, zone: tzinfo) -> datetime | None:
        reading: datetime | None = cron.reading_at(after, zone).replace(fold=0)
        while reading is not None and (reading := self._readings.after(reading)) is not None:
            moments = cron.moments_of(reading, zone)
            if not moments.is_shown and self._is_hourly:
                continue
            if moments.first > after:
                return moments.first
            if self._goes_on and moments.second is not None and moments.second > after:
                return moments.second
        return None

    def remaining_delta(
        self, last_run_at: datetime, tz: tzinfo | None = None, ffwd: object = None
    ) -> tuple[datetime, timedelta, datetime]:
        """That run in the schedule's time, how long after it the next one is due, and the present time."""
        last = _aware(last_run_at).astimezone(tz or self.tz)
        due = self.next_due(last, self.tz)
        return last, (due or datetime.max.replace(tzinfo=timezone.utc)) - last, self.now().astimezone(tz or self.tz)

    def is_due(self, last_run_at: datetime) -> schedstate:
        """As for all schedules; what is overdue for more than `beat_cron_starting_deadline` seconds is left out."""
        state = super().is_due(last_run_at)
        deadline = self.app.conf.beat_cron_starting_deadline if self.app is not None else None
        if state.is_due and deadline is not None:
            now = self.now()
            latest = self.latest_due(_aware(last_run_at), now, self.tz)
            return state._replace(is_due=latest is not None and (now - latest).total_seconds() <= deadline)
        return state

    def __repr__(self) -> str:
        fields = (self._orig_minute, self._orig_hour, self._orig_day_of_month, self._orig_month_of_year)
        zone = f", {self._tz}" if self._tz is not None else ""
        return f"<crontab: {' '.join(map(str, fields))} {self._orig_day_of_week} (m/h/dM/MY/d){zone}>"

    @property
    def _key(self) -> tuple[Any, ...]:
        fields = (self.minute, self.hour, self.day_of_week, self.day_of_month, self.month_of_year)
        return *map(frozenset, fields), str(self._tz)


class crontab_parser:
    """Celery's name for reading one field: `crontab_parser(60).parse("*/15")` is `{0, 15, 30, 45}`."""

    ParseException = ParseException

    def __init__(self, max_: int = 60, min_: int = 0) -> None:
        fields = {(7, 0): cron.DAY_OF_WEEK, (12, 1): cron.MONTH_OF_YEAR}
        self._field = fields.get((max_, min_)) or cron.Field("the expression", min_, min_ + max_ - 1)

    def parse(self, spec: str) -> set[int]:
        """The numbers it stands for. Raises: ParseException."""
        return set(self._field.parse(spec))


class clocked(_AtTimes):
    """Once, at one time (a naive one is UTC); an entry that is made later than that is due at once."""

    def __init__(
        self, clocked_time: datetime, nowfun: Callable[[], datetime] | None = None, app: ScheduleApp | None = None
    ) -> None:
        super().__init__(nowfun, app)
        self.clocked_time = _aware(clocked_time)

    def next_due(self, after: datetime, zone: tzinfo) -> datetime | None:
        """The clocked time, while it is to come."""
        return self.clocked_time.astimezone(timezone.utc) if self.clocked_time > after else None

    def first_due(self, appeared_at: datetime, zone: tzinfo) -> datetime | None:
        """The clocked time, also when it has passed."""
        return self.clocked_time.astimezone(timezone.utc)

    def __repr__(self) -> str:
        return f"<clocked: {self.clocked_time}>"

    @property
    def _key(self) -> tuple[Any, ...]:
        return (self.clocked_time,)


class solar(_AtTimes):
    """At an event of the sun (`"sunset"`, `"dawn_civil"` …) at a latitude and longitude in degrees, to the second.

    A day on which it does not happen (polar night) is left out. Needs `pip install amqtask[solar]`.
    Raises: ParseException; ConfigurationError when ephem is not installed.
    """

    _all_events = frozenset(cron.EVENTS)

    def __init__(
        self,
        event: str,
        lat: float,
        lon: float,
        nowfun: Callable[[], datetime] | None = None,
        app: ScheduleApp | None = None,
    ) -> None:
        super().__init__(nowfun, app)
        if event not in cron.EVENTS:
            raise ParseException(f"solar: no event {event!r}, only {', '.join(cron.EVENTS)}")
        for name, value, limit in (("lat", lat, 90), ("lon", lon, 180)):
            if not -limit <= value <= limit:
                raise ParseException(f"solar: {name} {value!r} is not between -{limit} and {limit} degrees")
        cron.load_ephem()
        self.event = event
        self.lat = lat
        self.lon = lon

    def next_due(self, after: datetime, zone: tzinfo) -> datetime | None:
        """The first event after `after` within 366 days."""
        after = after.astimezone(timezone.utc)
        # From the day's beginning, so that all who ask on one day get the same answer to the last digit.
        start = after.replace(hour=0, minute=0, second=0, microsecond=0)
        while (due := cron.event_after(self.event, self.lat, self.lon, start)) is not None and due <= after:
            start = due + _MINUTE
        return due

    def __repr__(self) -> str:
        return f"<solar: {self.event} at latitude {self.lat}, longitude: {self.lon}>"

    @property
    def _key(self) -> tuple[Any, ...]:
        return self.event, self.lat, self.lon


def due_after(every: BaseSchedule, after: datetime, zone: tzinfo) -> datetime | None:
    """What a schedule, which may be of one's own, says of the first due time after a moment. Raises: ValueError for an answer
    that is none (who goes on from it would never come to an end); what the schedule raises."""
    due = checked_due(every.next_due(after, zone), "next_due")
    if due is not None and due <= after:
        raise ValueError(f"next_due gave {due}, which is not after {after}")
    return due


def checked_due(due: datetime | None, method: str) -> datetime | None:
    """A due time, as `method` of a schedule gave it. Raises: ValueError for what is none."""
    if due is None or (isinstance(due, datetime) and due.tzinfo is not None):
        return due
    raise ValueError(f"{method} gave {described(due)}, not a datetime with a time zone, nor None")


def maybe_schedule(spec: Any, relative: bool = False, app: ScheduleApp | None = None) -> Any:
    """A number of seconds or a timedelta as a schedule; a schedule as it is, with `app`. Raises: ParseException."""
    if spec is None:
        return None
    if isinstance(spec, (int, float, timedelta)) and not isinstance(spec, bool):
        return schedule(spec, relative, app=app)
    if not callable(getattr(spec, "next_due", None)):
        raise ParseException(
            f"{spec!r} is not a schedule: say seconds, a timedelta, schedule(), crontab() or solar() of amqtask.schedules"
        )
    if app is not None:
        spec.app = app
    return spec


def _interval(spec: Any) -> timedelta:
    try:
        interval = spec if isinstance(spec, timedelta) else timedelta(seconds=spec)
    except (TypeError, OverflowError, ValueError) as error:
        raise ParseException(f"schedule: {spec!r} is not an interval: say seconds or a timedelta") from error
    if interval <= timedelta(0):
        raise ParseException(f"schedule: an interval must be longer than nothing, not {spec!r}")
    return interval


def _rounded_down(after: datetime, interval: timedelta, zone: tzinfo) -> datetime:
    if interval >= _DAY:
        # Calendar days: the first midnight (or what stands for it) of the local day that many days on.
        reading = cron.reading_at(after, zone).replace(fold=0) + interval
        midnight = cron.moments_of(reading.replace(hour=0, minute=0, second=0, microsecond=0), zone)
        # A clock put back from after midnight to before it shows midnight twice; the first may have passed.
        return midnight.second if midnight.first <= after and midnight.second is not None else midnight.first
    reading = cron.reading_at(after + interval, zone)
    excess = timedelta(minutes=reading.minute if interval >= _HOUR else 0, seconds=reading.second)
    return after + interval - excess - timedelta(microseconds=reading.microsecond)


def _kept(spec: object) -> Any:
    """A field as given; an iterator is read once and kept, so that it can be shown and pickled."""
    if spec is None:
        return "*"
    return spec if isinstance(spec, (int, str)) or not hasattr(spec, "__iter__") else tuple(spec)


def _aware(moment: datetime) -> datetime:
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=timezone.utc)

"""`celery.utils.time`."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime, timedelta, tzinfo
from datetime import timezone as _timezone
from typing import Any
from zoneinfo import ZoneInfo

__all__ = [
    "adjust_timestamp", "delta_resolution", "get_exponential_backoff_interval", "humanize_seconds", "is_naive", "localize",
    "make_aware", "maybe_iso8601", "maybe_make_aware", "maybe_timedelta", "rate", "remaining", "timezone", "to_utc", "utcoffset",
    "weekday",
]  # fmt: skip

_UNITS = (("day", 86400.0), ("hour", 3600.0), ("minute", 60.0), ("second", 1.0))
_RATES = {"s": 1.0, "m": 60.0, "h": 3600.0}
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")


class _Zones:
    """`timezone.utc`, `timezone.get_timezone(name)`, `timezone.local`."""

    utc = _timezone.utc

    @property
    def local(self) -> tzinfo:
        """The machine's zone."""
        zone = datetime.now().astimezone().tzinfo
        assert zone is not None
        return zone

    def get_timezone(self, zone: str | tzinfo) -> tzinfo:
        """The zone of a name."""
        return ZoneInfo(zone) if isinstance(zone, str) else zone

    tz_or_local = get_timezone


timezone = _Zones()


def maybe_timedelta(delta: object) -> Any:
    """Seconds as a timedelta."""
    return timedelta(seconds=delta) if isinstance(delta, (int, float)) and not isinstance(delta, bool) else delta


def maybe_iso8601(dt: datetime | str | None) -> datetime | None:
    """ISO 8601 text as a datetime."""
    return datetime.fromisoformat(dt.replace("Z", "+00:00")) if isinstance(dt, str) else dt


def is_naive(dt: datetime) -> bool:
    """Whether it has no zone."""
    return dt.tzinfo is None or dt.tzinfo.utcoffset(dt) is None


def make_aware(dt: datetime, tz: tzinfo) -> datetime:
    """The same time of day in a zone."""
    return dt.replace(tzinfo=tz)


def maybe_make_aware(dt: datetime, tz: tzinfo | None = None, naive_as_utc: bool = True) -> datetime:
    """One without a zone in UTC (or `tz`); seen in `tz`."""
    if is_naive(dt):
        dt = make_aware(dt, _timezone.utc if naive_as_utc or tz is None else tz)
    return dt if tz is None else dt.astimezone(tz)


def localize(dt: datetime, tz: tzinfo) -> datetime:
    """The same moment seen in a zone."""
    return maybe_make_aware(dt).astimezone(tz)


def to_utc(dt: datetime) -> datetime:
    """One without a zone is in UTC."""
    return make_aware(dt, _timezone.utc)


def utcoffset(time: object = None, localtime: object = None) -> int:
    """Whole hours between UTC and the machine's zone, west is positive."""
    offset = datetime.now().astimezone().utcoffset() or timedelta()
    return -int(offset.total_seconds() // 3600)


def adjust_timestamp(ts: float, offset: int, here: Callable[..., int] = utcoffset) -> float:
    """A timestamp of a host with another offset."""
    return ts - (offset - here()) * 3600


def remaining(start: datetime, ends_in: timedelta, now: datetime | None = None, relative: bool = False) -> timedelta:
    """How long until `start + ends_in`."""
    moment = now or datetime.now(_timezone.utc)
    if relative:
        return ends_in - timedelta(seconds=(moment - start).total_seconds() % max(ends_in.total_seconds(), 1e-6))
    return start + ends_in - moment


def delta_resolution(dt: datetime, delta: timedelta) -> datetime:
    """Round down to the unit of the delta."""
    seconds = max(delta.total_seconds(), 0)
    fields: tuple[str, ...] = ("microsecond",)
    if seconds >= 60:
        fields += ("second",)
    if seconds >= 3600:
        fields += ("minute",)
    if seconds >= 86400:
        fields += ("hour",)
    return dt.replace(**dict.fromkeys(fields, 0)) if seconds >= 1 else dt  # type: ignore[arg-type] # names of int fields


def rate(r: str | float | None) -> float:
    """Tasks a second of `10/m` and the like."""
    if not r:
        return 0
    if isinstance(r, str):
        number, _, unit = r.partition("/")
        return float(number) / _RATES[unit or "s"]
    return float(r)


def weekday(name: str) -> int:
    """0 for Sunday … 6. Raises: KeyError."""
    try:
        return _DAYS.index(name[:3].lower())
    except ValueError:
        raise KeyError(name) from None


def humanize_seconds(secs: float, prefix: str = "", sep: str = "", now: str = "now", microseconds: bool = False) -> str:
    """`in 2.00 minutes`."""
    secs = float(f"{float(secs):.2f}")
    for unit, divider in _UNITS:
        if secs >= divider:
            value = secs / divider
            plural = "" if value == 1 else "s"
            return f"{prefix}{sep}{value:.2f} {unit}{plural}"
    return f"{prefix}{sep}{secs:.2f} seconds" if microseconds and secs > 0 else now


def get_exponential_backoff_interval(factor: int, retries: int, maximum: int, full_jitter: bool = False) -> int:
    """Seconds before a retry."""
    countdown = min(maximum, factor * 2**retries)
    return max(0, random.randrange(countdown + 1) if full_jitter else countdown)


def parse_iso8601(datestring: str) -> datetime:
    """The datetime of a text. Raises: ValueError."""
    return datetime.fromisoformat(datestring.replace("Z", "+00:00"))

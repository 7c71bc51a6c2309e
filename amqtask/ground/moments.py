"""Times as a person writes them."""

from __future__ import annotations

from datetime import datetime, timedelta

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def moment(written: str) -> datetime:
    """A time in ISO 8601 (local without a zone), or so long ago: 30s, 10m, 2h, 7d. Raises: ValueError."""
    text = written.strip()
    number, unit = text[:-1], _UNITS.get(text[-1:])
    try:
        if unit is not None and number.replace(".", "", 1).isdecimal():
            return datetime.now().astimezone() - timedelta(seconds=float(number) * unit)
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        raise ValueError(f"{text[:100]!r} is no time: 2026-11-30T08:15, or so long ago: 30s, 10m, 2h, 7d") from None

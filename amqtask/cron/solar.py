"""When the sun rises, sets and stands: one pure question to ephem, which is optional (extra `solar`)."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any, NamedTuple

from amqtask.exceptions import ConfigurationError

SEARCH_DAYS = 366


class Event(NamedTuple):
    """How ephem finds an event: its method, horizon and centre."""

    method: str  # of ephem.Observer
    horizon: str  # degrees
    use_center: bool


_RISING, _SETTING = "next_rising", "next_setting"
# The sun's disc touches the horizon at -0:34 (refraction); twilights count its centre (ephem's documentation).
EVENTS = {
    "dawn_astronomical": Event(_RISING, "-18", True),
    "dawn_nautical": Event(_RISING, "-12", True),
    "dawn_civil": Event(_RISING, "-6", True),
    "sunrise": Event(_RISING, "-0:34", False),
    "solar_noon": Event("next_transit", "0", False),
    "sunset": Event(_SETTING, "-0:34", False),
    "dusk_civil": Event(_SETTING, "-6", True),
    "dusk_nautical": Event(_SETTING, "-12", True),
    "dusk_astronomical": Event(_SETTING, "-18", True),
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

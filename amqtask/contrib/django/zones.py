"""A model field for time zones: a ZoneInfo in Python, its name in the database (as django-timezone-field keeps it)."""

from __future__ import annotations

from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from django import forms
from django.conf import settings
from django.core.exceptions import ValidationError
from django.db import models
from django.utils import timezone

from amqtask.ground.current import find_current_app

MAX_LENGTH = 63
# The admin would have a line of text for any CharField.
_OURS = frozenset({"choices_form_class", "form_class", "widget"})

if TYPE_CHECKING:
    CharField = models.CharField[Any, Any]
else:
    CharField = models.CharField  # takes no type arguments when it runs


class UnknownZone:
    """A name in the database that is no time zone here (another program's, or a machine without zone data): shown, never used."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __str__(self) -> str:
        return self.key


class TimeZoneField(CharField):
    """Takes a ZoneInfo or the name of one; an unknown name is a ValidationError."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options.setdefault("max_length", MAX_LENGTH)
        super().__init__(*args, **options)

    def to_python(self, value: object) -> ZoneInfo | UnknownZone | None:
        """The zone of a name; an empty name is None."""
        if value is None or isinstance(value, (ZoneInfo, UnknownZone)):
            return value
        return zone(str(value)) if value else None

    def from_db_value(self, value: object, *_: object) -> ZoneInfo | UnknownZone | None:
        """What the database has as a zone. One bad row must not keep the others from being read."""
        try:
            return self.to_python(value)
        except ValidationError:
            return UnknownZone(str(value))

    def get_prep_value(self, value: object) -> str | None:
        """The zone's name."""
        zone = self.to_python(value)
        return None if zone is None else zone.key

    def run_validators(self, value: object) -> None:
        """Run the validators on the zone's name, which has a length."""
        super().run_validators(self.get_prep_value(value))

    def value_to_string(self, obj: models.Model) -> str:
        """The zone's name, for fixtures."""
        return str(self.get_prep_value(self.value_from_object(obj)) or "")

    def formfield(self, **options: Any) -> Any:
        """A list of all zones."""
        return super().formfield(
            choices_form_class=None,
            form_class=_ZoneChoice,
            **{name: value for name, value in options.items() if name not in _OURS},
        )


class _ZoneChoice(forms.TypedChoiceField):
    def __init__(self, *, max_length: int | None = None, **options: Any) -> None:
        # A CharField of the model passes its length on, which a list has no use for.
        super().__init__(choices=_choices, coerce=zone, **options)

    def prepare_value(self, value: object) -> Any:
        return value.key if isinstance(value, (ZoneInfo, UnknownZone)) else value


def _choices() -> list[tuple[str, str]]:
    return [(name, name) for name in zone_names()]


def default_zone() -> str:
    """The time zone of new schedules: the application's `timezone`, else Django's TIME_ZONE."""
    app = find_current_app()
    named = app.conf.timezone if app is not None else settings.TIME_ZONE
    return str(named or "UTC")


def zone(name: str) -> ZoneInfo:
    """The zone of a name. Raises: ValidationError."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValidationError(f"there is no time zone {name!r}; names are like Europe/Paris or UTC") from error


@lru_cache(maxsize=1)
def zone_names() -> tuple[str, ...]:
    """All zones of this machine, sorted."""
    return tuple(sorted(available_timezones() - {"localtime", "Factory"}))


# -- Moments on their way into and out of a database: Django keeps naive times in TIME_ZONE where USE_TZ is off.


def aware(moment: datetime) -> datetime:
    """The moment that a value of the database stands for."""
    return timezone.make_aware(moment, timezone.get_default_timezone()) if timezone.is_naive(moment) else moment


def stored(moment: datetime) -> datetime:
    """The value for the database of an aware moment."""
    return moment if settings.USE_TZ else timezone.make_naive(moment, timezone.get_default_timezone())

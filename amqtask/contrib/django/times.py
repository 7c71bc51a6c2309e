"""Moments on their way into and out of a database: Django keeps naive local times where USE_TZ is off."""

from __future__ import annotations

from datetime import datetime

from django.conf import settings
from django.utils import timezone


def aware(moment: datetime) -> datetime:
    """The moment that a value of the database stands for."""
    return timezone.make_aware(moment) if timezone.is_naive(moment) else moment


def stored(moment: datetime) -> datetime:
    """The value for the database of an aware moment."""
    return moment if settings.USE_TZ else timezone.make_naive(moment)

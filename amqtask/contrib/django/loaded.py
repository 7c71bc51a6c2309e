"""Django's applications and settings, loaded for those who do not know Django."""

from __future__ import annotations

import django
from django.apps import apps
from django.conf import settings


def load_applications() -> None:
    """Have Django's applications ready; nothing is done if they are."""
    if not apps.ready:
        django.setup()


def time_zone() -> str:
    """The settings' TIME_ZONE."""
    return str(settings.TIME_ZONE)
